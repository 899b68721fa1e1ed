"""One question from the command line: media and text in, the reply on the terminal as it is made, and as sound."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from omni_jax.engine.outputs import Event, Options, Reply
from omni_jax.engine.talker_engine import TalkerParams
from omni_jax.errors import InputError
from omni_jax.generation.model import load
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import Usage
from omni_jax.serving.wav import GrowingWav

_FILE = tyro.conf.arg(metavar="FILE")


@dataclass(frozen=True)
class Chat:
    """Asks a model one question and prints its answer as it is made.

    Only the answer goes to stdout, and its sound to a file, both as they are made; progress, and the time of each stage
    at the end, go to stderr. The model sees images first, then sounds, then videos, each kind in the order given, and
    the text last: it was trained with media before the question.

    For instance:

        python serve.py chat --model out/model \\
            --image menu.jpg --text "Which dish is cheapest?" --out answer.wav
    """

    model: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder that tools/convert.py to-jax wrote."""
    text: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to ask. Given again, the texts follow each other as they are."""
    image: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A picture."""
    audio: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A sound, or a video of which only the sound is wanted."""
    video: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _FILE] = ()
    """A video."""
    speak: bool = False
    """Speak the answer too, into reply.wav unless --out names another file."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.wav")] = None
    """Speak the answer into this file: 24 kHz, 16 bits, one channel. It grows while the answer is made."""
    voice: str | None = None
    """Who speaks; without it, Chelsie, or the checkpoint's first voice."""
    talker: TalkerParams = field(default_factory=TalkerParams)
    """How the answer is spoken."""
    system: str | None = None
    """The system prompt; without it, the chat template's own, or with --out the one that speech was trained with."""
    use_audio_in_video: Literal["auto", "true", "false"] = "auto"
    """Whether to hear the videos too. auto: those that have a sound track; true: a silent video is an error."""
    fps: float | None = None
    """Frames to look at in each second of a video; without it, the model's usual 2."""
    max_tokens: int = Options.max_tokens
    """Length of the answer in tokens, at most."""
    temperature: float = Options.temperature
    """0 takes the likeliest word each time; more is more varied."""
    top_k: int = Options.top_k
    """Draw among the k likeliest words; 0: among all."""
    top_p: float = Options.top_p
    """Draw among the likeliest words that together have this probability."""
    repetition_penalty: float = Options.repetition_penalty
    """Over 1 makes words less likely that have been said already."""
    seed: int = Options.seed
    """Of the draws; the same seed gives the same answer."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End the answer before this string."""
    allow_urls: bool = False
    """Fetch media that are addresses on the web."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What to compute in; without it, what the checkpoint holds."""

    def run(self) -> None:
        """Raises InputError, CheckpointError or ConfigError where there is no answer."""
        messages, options = self.messages(), self.options()
        Options.create(**options)  # a mistake in them shows before a large model is loaded
        terminal = Console(stderr=True)
        sound = self.sound
        if sound is not None and not sound.resolve().parent.is_dir():
            raise InputError(f"--out {sound}: the folder {sound.resolve().parent} does not exist")
        started = time.perf_counter()
        components = ("thinker",) if sound is None else None
        with terminal.status(f"loading {self.model}"):
            model = load(self.model, dtype=self.dtype, components=components, allow_urls=self.allow_urls)
        loaded = time.perf_counter() - started
        with terminal.status("reading the question and compiling for its length") as waiting:
            events = model.stream(messages, **options)
            with contextlib.nullcontext() if sound is None else GrowingWav(sound, SAMPLE_RATE) as wav:
                played = _play(events, wav, waiting.stop)
        _finish(terminal, played, loaded, sound)

    @property
    def sound(self) -> Path | None:
        """The file that is spoken into, if the answer is spoken."""
        return Path("reply.wav") if self.speak and self.out is None else self.out

    def messages(self) -> list[dict[str, Any]]:
        """The dialogue. InputError if there is nothing in it."""
        video: dict[str, Any] = {
            "use_audio_in_video": {"auto": "auto", "true": True, "false": False}[self.use_audio_in_video]
        }
        if self.fps is not None:
            video["fps"] = self.fps
        parts: list[dict[str, Any]] = [{"type": "image", "image": source} for source in self.image]
        parts += [{"type": "audio", "audio": source} for source in self.audio]
        parts += [{"type": "video", "video": source, **video} for source in self.video]
        parts += [{"type": "text", "text": text} for text in self.text]
        if not parts:
            raise InputError("nothing to answer: give --text, --image, --audio or --video")
        prompt = SPEECH_SYSTEM_PROMPT if self.system is None and self.sound is not None else self.system
        system = [] if prompt is None else [{"role": "system", "content": prompt}]
        return [*system, {"role": "user", "content": parts}]

    def options(self) -> dict[str, Any]:
        """The keyword arguments of ``OmniModel.stream``."""
        names = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
        options = {name: getattr(self, name) for name in names}
        if self.sound is not None:
            usual = dataclasses.asdict(TalkerParams())  # its seed, unless given, is that of the text
            talker = {k: v for k, v in dataclasses.asdict(self.talker).items() if v != usual[k]}
            options |= dict(modalities=("text", "audio"), voice=self.voice, talker=talker)
        return options


@dataclass
class _Played:
    """What came of a reply, and after how many seconds its first text and its first sound did."""

    reply: Reply
    text: float | None = None
    sound: float | None = None


def _play(events: Iterator[Event], wav: GrowingWav | None, first: Callable[[], None]) -> _Played:
    """Writes pieces as they come; ``first`` is called before the first text."""
    started, text, sound = time.perf_counter(), None, None
    for event in events:
        since = time.perf_counter() - started
        if event.text:
            text = since if text is None else text
            first()
            sys.stdout.write(event.text)
            sys.stdout.flush()
        if event.audio is not None and wav is not None:
            sound = since if sound is None else sound
            wav.write(event.audio)
        if event.reply is not None:
            return _Played(event.reply, text, sound)
    raise AssertionError("a stream ends with a reply")


def _finish(terminal: Console, played: _Played, loaded: float, out: Path | None) -> None:
    sys.stdout.write("\n")
    sys.stdout.flush()
    reply = played.reply
    times, made = reply.timings, len(reply.token_ids)
    cut = "" if reply.finish_reason == "stop" else "; cut at --max-tokens or the end of the context"
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    rows = {"load": loaded}
    rows |= {name: getattr(times, name) for name in ("prepare", "encode", "prefill", "decode")}
    if out is not None:
        rows |= {"talk": times.talk, "wave": times.wave}
    for stage, seconds in rows.items():
        table.add_row(stage, f"{seconds:.2f}")
    terminal.print()
    terminal.print(table)
    lines = [f"prompt: {_describe(reply.usage)}", f"reply: {made} tokens, {made / times.decode:.1f} a second{cut}"]
    if out is not None and reply.audio is not None:
        lines.append(f"speech: {len(reply.codec_ids)} codes, {len(reply.audio) / reply.sample_rate:.2f} s in {out}")
    firsts = [f"{name} after {at:.2f} s" for name, at in (("text", played.text), ("sound", played.sound)) if at]
    lines += [f"first {', '.join(firsts)}"] if firsts else []
    lines.append("all but load and prepare include compiling for these lengths")
    for line in lines:
        terminal.print(line, highlight=False, soft_wrap=True)


def _describe(usage: Usage) -> str:
    kinds = [f"{n} {kind}" for kind in ("text", "image", "video", "audio") if (n := getattr(usage, kind))]
    seconds = [
        f"{n:.1f} s of {name}" for name, n in (("sound", usage.audio_seconds), ("video", usage.video_seconds)) if n
    ]
    return f"{usage.total} tokens ({', '.join(kinds)})" + "".join(f", {s}" for s in seconds)
