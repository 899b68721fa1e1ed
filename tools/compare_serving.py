"""Whether a model answers alike offline (a batch), streamed (one by one) and in a batch file (``serve.py batch``).

    python tools/compare_serving.py checkpoints/omni-tiny out/world/test.jsonl --items 500

Rows are taken from all tasks in turn, and are answered greedily in float32. A model with a Talker also speaks, in its
voices in turn; codes are drawn with one seed. Texts and codes must be the same all three ways, the pieces of a stream
must add up to its reply, and no reply may run to its limit; what is not so is printed, and the command ends with 1.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint.store import components
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int
from omni_jax.data.replies import LastReply
from omni_jax.engine.outputs import Reply
from omni_jax.generation.model import OmniModel
from tools.command_errors import exit_on_error
from tools.row_files import write_values
from tools.run_commands import run
from tools.task_rows import choose_in_turn, with_speech_prompt

SEED = 0  # of codes


@dataclass(frozen=True)
class Options:
    """What is compared."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with a task, of tools/make_world.py."""
    items: int | None = None
    """How many are answered; all if nothing is said."""
    slots: int = 16
    """That are answered at once."""
    max_tokens: int = 48
    """Of an answer."""
    max_codes: int = 1000
    """Of the speech of one: twenty seconds, more than a list of forty words takes."""


class Question(NamedTuple):
    """A row as it is asked."""

    task: str
    row: str
    messages: Sequence[Any]
    voice: str | None


class Answer(NamedTuple):
    """What is compared of a reply."""

    text: str
    finish_reason: str
    codes: tuple[int, ...]

    @classmethod
    def of(cls, reply: Reply) -> Answer:
        return cls(reply.error or reply.text, reply.finish_reason, reply.codec_ids)


class Compared(NamedTuple):
    """A row's answers, and whether the pieces of its stream added up to the streamed one."""

    question: Question
    offline: Answer
    streamed: Answer
    adds_up: bool
    batch_file: Answer

    def find_differences(self, options: Options) -> list[str]:
        """What is not as it should be."""
        found = []
        for name, answer in (("streamed", self.streamed), ("in a batch file", self.batch_file)):
            if answer.text != self.offline.text:
                found.append(f"{self.offline.text!r}, {name} {answer.text!r}")
            elif answer.codes != self.offline.codes:
                found.append(f"other codes {name}")
        if not self.adds_up:
            found.append("pieces of the stream do not add up to its reply")
        if self.offline.finish_reason == "length":
            found.append(f"no end within {options.max_tokens} tokens")
        if len(self.offline.codes) >= options.max_codes:
            found.append(f"no end within {options.max_codes} codes")
        return found


def make_questions(chosen: Sequence[tuple[str, LastReply]], voices: Sequence[str]) -> list[Question]:
    """Rows under the system prompt of speech, in the voices in turn; as they are if there is no voice."""
    questions = []
    for number, (task, reply) in enumerate(chosen):
        if voices:
            voice = voices[number % len(voices)]
            questions.append(Question(task, reply.row, with_speech_prompt(reply.prompt), voice))
        else:
            questions.append(Question(task, reply.row, reply.prompt, None))
    return questions


def reply_options(question: Question, options: Options) -> dict[str, Any]:
    """Keyword arguments of ``OmniModel.generate``."""
    if question.voice is None:
        return dict(max_tokens=options.max_tokens)
    talker = dict(seed=SEED, max_tokens=options.max_codes)
    return dict(max_tokens=options.max_tokens, modalities=("text", "audio"), voice=question.voice, talker=talker)


def answer_offline(model: OmniModel, questions: Sequence[Question], options: Options) -> dict[str, Answer]:
    """Answers of ``generate_batch`` by row, a voice at a time."""
    found = {}
    for voice in dict.fromkeys(question.voice for question in questions):
        own = [question for question in questions if question.voice == voice]
        starts = range(0, len(own), 4 * options.slots)
        for start in track(starts, description=f"offline, {voice or 'text'}", console=Console(stderr=True)):
            part = own[start : start + 4 * options.slots]
            messages = [question.messages for question in part]
            replies = model.generate_batch(messages, batch_size=options.slots, **reply_options(part[0], options))
            found |= {question.row: Answer.of(reply) for question, reply in zip(part, replies, strict=True)}
    return found


def answer_streamed(model: OmniModel, question: Question, options: Options) -> tuple[Answer, bool]:
    """The streamed reply, and whether its pieces add up to it."""
    text = ""
    num_samples = 0
    reply = None
    for event in model.stream(question.messages, **reply_options(question, options)):
        text += event.text or ""
        num_samples += 0 if event.audio is None else len(event.audio)
        reply = event.reply
    assert reply is not None
    return Answer.of(reply), text == reply.text and num_samples == (0 if reply.audio is None else len(reply.audio))


def answer_file(questions: Sequence[Question], folder: Path, options: Options) -> dict[str, Answer]:
    """Answers of ``serve.py batch`` by row.

    Raises:
      SystemExit: if it fails.
    """
    requests = []
    for question in questions:
        params = [dict(max_tokens=options.max_tokens)]
        body: dict[str, Any] = dict(messages=question.messages, return_token_ids=True, sampling_params_list=params)
        if question.voice is not None:
            body |= dict(modalities=["text", "audio"], audio=dict(voice=question.voice, format="wav"))
            params.append(dict(seed=SEED, max_tokens=options.max_codes))
        requests.append(dict(custom_id=question.row, method="POST", url="/v1/chat/completions", body=body))
    written = write_values(folder / "requests.jsonl", requests)
    results = folder / "results.jsonl"
    run(
        *(
            "serve.py",
            "batch",
            "--model",
            options.model,
            "-i",
            written,
            "-o",
            results,
            "--audio-dir",
            folder / "speech",
        ),
        *("--media-root", options.rows.resolve().parent, "--slots", options.slots, "--dtype", "float32"),
    )
    found = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if result["error"] is not None:
            found[result["custom_id"]] = Answer(result["error"]["message"], "error", ())
            continue
        (choice,) = result["response"]["body"]["choices"]
        codes = choice["message"].get("audio", {}).get("codec_ids", ())
        found[result["custom_id"]] = Answer(choice["message"]["content"], choice["finish_reason"], tuple(codes))
    return found


def compare(options: Options) -> Iterator[Compared]:
    """All answers to each row.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--slots", options.slots, 1)
    if options.items is not None:
        check_int("--items", options.items, 1)
    chosen = choose_in_turn(options.rows, options.items)
    speaks = "talker" in components(resolve_checkpoint(options.model))
    names = ("thinker", "talker", "token2wav") if speaks else ("thinker",)
    model = omni_jax.load(options.model, components=names, dtype="float32")
    questions = make_questions(chosen, list(model.voices) if speaks else [])
    offline = answer_offline(model, questions, options)
    streamed = []
    for question in track(questions, description="streamed", console=Console(stderr=True)):
        streamed.append(answer_streamed(model, question, options))
    with tempfile.TemporaryDirectory() as folder:
        batch_file = answer_file(questions, Path(folder), options)
    for question, (answer, adds_up) in zip(questions, streamed, strict=True):
        yield Compared(question, offline[question.row], answer, adds_up, batch_file[question.row])


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with exit_on_error():
        found = list(compare(options))
    alike = 0
    for one in found:
        differences = one.find_differences(options)
        alike += not differences
        for text in differences:
            print(f"{one.question.row} ({one.question.task}): {text}")
    spoken = sum(bool(one.offline.codes) for one in found)
    print(f"{alike} of {len(found)} rows are answered alike offline, streamed and in a batch file; {spoken} are spoken")
    if alike < len(found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
