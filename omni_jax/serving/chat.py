"""One question from the command line: media and text in, the reply on the terminal as it is made, and as sound."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from omni_jax.checks import printable
from omni_jax.compile_cache import keep_compiled_programs
from omni_jax.engine.outputs import Event, Reply, Timings
from omni_jax.errors import InputError
from omni_jax.generation.load_model import load
from omni_jax.generation.options import Options
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.plain_files import replace_file
from omni_jax.processing.captions import CaptionFormat, make_captions, write_captions
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import Usage
from omni_jax.serving.commands import ChatCommand
from omni_jax.serving.wav import GrowingWav

_ADAPTER = "adapter"  # the name of the only one
_USE_AUDIO = {"auto": "auto", "true": True, "false": False}


def run_chat(command: ChatCommand) -> None:
    """Answers the question.

    Raises:
      InputError, CheckpointError, ConfigError: where there is no answer.
    """
    # what is wrong with the options shows before a large model is loaded
    messages = make_messages(command)
    options = make_options(command)
    Options.create(**options)  # for its errors alone
    sound_path = find_sound_path(command)
    if sound_path is not None and not sound_path.resolve().parent.is_dir():
        raise InputError(f"--out {sound_path}: the folder {sound_path.resolve().parent} does not exist")
    if sound_path is None and command.captions:
        raise InputError("--captions are written beside a file of sound: give --out or --speak too")
    # figures go to stderr, so that stdout holds the answer and nothing else
    terminal = Console(stderr=True, markup=False)
    start_time = time.perf_counter()
    # without speech two of the three components need not be loaded
    components = ("thinker",) if sound_path is None else None
    with terminal.status(Text(f"loading {printable(str(command.model))}")):
        model = load(
            command.model,
            dtype=command.dtype,
            components=components,
            allow_web=command.allow_web,
            allow_buckets=command.allow_buckets,
            isolate_media=command.isolate_media,
            token2wav=dataclasses.asdict(command.token2wav),
            quantization=command.quantization,
            kv_cache_dtype=command.kv_cache_dtype,
            adapters={} if command.adapter is None else {_ADAPTER: command.adapter},
            speaker_model=command.speaker_model,
            speech_tokenizer=command.speech_tokenizer,
        )
    load_seconds = time.perf_counter() - start_time
    # the spinner turns until the first text, which would be written into its line
    with terminal.status("reading the question and compiling for its length") as waiting:
        events = model.stream(messages, **options)
        with contextlib.nullcontext() if sound_path is None else GrowingWav(sound_path, SAMPLE_RATE) as wav:
            answer = _play(events, wav, waiting.stop)
    if sound_path is not None:
        write_caption_files(answer.reply, sound_path, command.captions)
    _print_figures(terminal, answer, load_seconds, sound_path)


def find_sound_path(command: ChatCommand) -> Path | None:
    """The file that is spoken into, if the answer is spoken."""
    if command.speak and command.out is None:
        return Path("reply.wav")
    return command.out


def make_messages(command: ChatCommand) -> list[dict[str, Any]]:
    """The dialogue.

    Raises:
      InputError: if there is nothing in it.
    """
    video_options: dict[str, Any] = {"use_audio_in_video": _USE_AUDIO[command.use_audio_in_video]}
    if command.fps is not None:
        video_options["fps"] = command.fps
    # media before text, as in training
    parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in command.image]
    parts += [{"type": "audio", "audio": source} for source in command.audio]
    parts += [{"type": "video", "video": source, **video_options} for source in command.video]
    parts += [{"type": "text", "text": text} for text in command.text]
    if not parts and command.reply_text is None:
        raise InputError("nothing to answer: give --text, --image, --audio or --video, or --reply-text")
    # under another system prompt the model may speak badly; without speech the template puts in its own
    system_prompt = command.system
    if system_prompt is None and find_sound_path(command) is not None:
        system_prompt = SPEECH_SYSTEM_PROMPT
    messages: list[dict[str, Any]] = []
    if system_prompt is not None:
        messages.append({"role": "system", "content": system_prompt})
    if parts:
        messages.append({"role": "user", "content": parts})
    return messages


def make_options(command: ChatCommand) -> dict[str, Any]:
    """The keyword arguments of ``OmniModel.stream``; what is None is left to it."""
    options: dict[str, Any] = {
        "max_tokens": command.max_tokens,
        "stop": command.stop,
        **_without_none(dataclasses.asdict(command.sampling)),
    }
    if command.reply_text is not None:
        options["reply_text"] = command.reply_text
    if command.adapter is not None:
        options["adapter"] = _ADAPTER
    if find_sound_path(command) is not None:
        options["modalities"] = ("text", "audio")
        options["voice"] = _make_voice(command)
        # without a seed the Talker takes that of the text
        options["talker"] = _without_none(dataclasses.asdict(command.talker))
    return options


def _make_voice(command: ChatCommand) -> str | dict[str, Any] | None:
    if command.ref_audio is None:
        if command.ref_text is not None:
            raise InputError("--ref-text is what a clip says; give the clip too, --ref-audio")
        return command.voice
    return {"ref_audio": command.ref_audio, "ref_text": command.ref_text, "like": command.voice}


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def write_caption_files(reply: Reply, sound_path: Path, formats: Sequence[CaptionFormat]) -> None:
    """Writes when which words are spoken into files beside that of the sound."""
    for caption_format in formats:
        captions = write_captions(make_captions(reply.text, reply.words), caption_format)
        replace_file(sound_path.with_suffix(f".{caption_format}"), captions.encode())


@dataclass
class _Answer:
    """A reply that has been played.

    Attributes:
      reply: the whole of it.
      first_text_seconds: after which its first text came, if any did.
      first_sound_seconds: likewise of its sound.
    """

    reply: Reply
    first_text_seconds: float | None = None
    first_sound_seconds: float | None = None


def _play(events: Iterator[Event], wav: GrowingWav | None, on_first_text: Callable[[], None]) -> _Answer:
    """Writes pieces as they come; ``on_first_text`` is called before the first text."""
    start_time = time.perf_counter()
    first_text_seconds = None
    first_sound_seconds = None
    for event in events:
        seconds = time.perf_counter() - start_time
        # an event may have sound alone; text is shown as soon as it is there
        if event.text:
            if first_text_seconds is None:
                first_text_seconds = seconds
                on_first_text()
            sys.stdout.write(printable(event.text))  # the model may repeat what a file told it
            sys.stdout.flush()
        if event.audio is not None and wav is not None:
            if first_sound_seconds is None:
                first_sound_seconds = seconds
            wav.write(event.audio)
        if event.reply is not None:
            return _Answer(event.reply, first_text_seconds, first_sound_seconds)
    raise AssertionError("a stream ends with a reply")


def _print_figures(terminal: Console, answer: _Answer, load_seconds: float, sound_path: Path | None) -> None:
    # ends the line of the answer before anything is written beside it
    sys.stdout.write("\n")
    sys.stdout.flush()
    reply = answer.reply
    terminal.print()
    terminal.print(_make_timing_table(reply.timings, load_seconds, speaks=sound_path is not None))
    lines = [f"prompt: {_describe_usage(reply.usage)}", f"reply: {describe_reply(reply)}"]
    if sound_path is not None and reply.audio is not None:
        seconds = len(reply.audio) / reply.sample_rate
        lines.append(f"speech: {len(reply.codec_ids)} codes, {seconds:.2f} s in {printable(str(sound_path))}")
    firsts = []
    for name, first_seconds in (("text", answer.first_text_seconds), ("sound", answer.first_sound_seconds)):
        if first_seconds is not None:
            firsts.append(f"{name} after {first_seconds:.2f} s")
    if firsts:
        lines.append(f"first {', '.join(firsts)}")
    lines.append("all but load and prepare include compiling for these lengths")
    if (kept := keep_compiled_programs()) is not None:
        lines.append(f"compiled programs are kept in {printable(kept)}")
    # long lines are for the terminal to wrap, so that they can be copied as one
    for line in lines:
        terminal.print(line, highlight=False, soft_wrap=True)


def _make_timing_table(timings: Timings, load_seconds: float, *, speaks: bool) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    # in the order in which they run
    stages = {"load": load_seconds}
    for name in ("prepare", "encode", "prefill", "decode"):
        stages[name] = getattr(timings, name)
    if speaks:
        stages["talker"] = timings.talker
        stages["token2wav"] = timings.token2wav
    for name, seconds in stages.items():
        table.add_row(name, f"{seconds:.2f}")
    return table


def describe_reply(reply: Reply) -> str:
    """How long a reply is, how fast it came, and why it ends."""
    num_tokens = len(reply.token_ids)
    text = f"{num_tokens} tokens"
    # a reply of one token is drawn from the prompt's logits, which no decoding may have followed
    if reply.timings.decode > 0:
        text += f", {num_tokens / reply.timings.decode:.1f} a second"
    if reply.finish_reason != "stop":
        text += "; cut at --max-tokens or the end of the context"
    return text


def _describe_usage(usage: Usage) -> str:
    counts = []
    for kind in ("text", "image", "video", "audio"):
        if count := getattr(usage, kind):
            counts.append(f"{count} {kind}")
    text = f"{usage.total} tokens ({', '.join(counts)})"
    for name, seconds in (("sound", usage.audio_seconds), ("video", usage.video_seconds)):
        if seconds:
            text += f", {seconds:.1f} s of {name}"
    # parts of the media that the model never saw or heard
    if usage.num_bad_packets == 1:
        text += "; 1 damaged packet was left out"
    elif usage.num_bad_packets > 1:
        text += f"; {usage.num_bad_packets} damaged packets were left out"
    return text
