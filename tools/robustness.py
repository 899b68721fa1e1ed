"""What a model still answers when packets of its input come late, twice or never.

    python tools/robustness.py out/omni-tiny/thinker-sft out/omni-tiny/data/test.jsonl --out robustness.json

Held-out questions by voice, and videos with a question in text, are sent as a connection would send them: sound in
packets of 20 ms, pictures as they were taken. The receiver fills what is missing with silence, since it knows from the
packets' numbers how much it is, and gives all to ``OmniModel.listen``:

* lost: a packet never comes; of a picture the one before it stays.
* late: it comes after its place was filled. Sound is dropped; the session refuses a picture that is older than one it
  has, and goes on.
* twice: a receiver that does not look at numbers plays it again, so that all sound after it is later than its picture.

OUT has, by damage and by task, how many were answered rightly, how many pictures the session refused, and how many
sessions ended in an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from jaxtyping import Float, UInt8
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checks import check_int
from omni_jax.errors import InputError
from omni_jax.generation.model import OmniModel
from omni_jax.plain_files import replace_file
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.media import read_audio
from tools.command_errors import exit_on_error
from tools.row_files import read_values
from tools.score_world import Answered
from tools.world.pictures import FRAME_RATE, read_frames

Kind = Literal["lost", "late", "twice"]
PACKET = 320  # samples at 16 kHz: 20 ms
RATE = 16_000
_LATE_BY = 3  # pictures that are sent before one that is late
_VIDEO_TASKS = ("colour-at-sound", "word-at-shape", "order", "direction")
_VOICE_TASKS = ("opposite-voice", "day-voice", "owner-voice")


@dataclass(frozen=True)
class Options:
    """What is asked."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Held-out rows of tools/make_world.py, with all tasks."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """What was found."""
    most: int = 50
    """Rows of each task, at most."""
    fractions: tuple[float, ...] = (0.05, 0.2, 0.5)
    """Of the packets that are damaged."""
    max_tokens: int = 48
    """Of an answer."""
    seed: int = 0
    """Of which packets are damaged."""


@dataclass(frozen=True)
class Damage:
    """What happens to packets.

    Attributes:
      kind: of the damage.
      fraction: of the packets, each by itself.
    """

    kind: Kind
    fraction: float

    def __str__(self) -> str:
        return f"{100 * self.fraction:.0f} % {self.kind}" if self.fraction else "all in time"


@dataclass(frozen=True, eq=False)
class Sent:
    """The media of a question.

    Attributes:
      samples: of its sound, at ``RATE``; none: there is no sound.
      frames: of its pictures, ``FRAME_RATE`` a second; none: there are none.
    """

    samples: Float[np.ndarray, " n"] | None
    frames: Sequence[UInt8[np.ndarray, "height width 3"]]


class Question(NamedTuple):
    """A row that is sent: its media, and its question in text, which is empty where it is spoken."""

    task: str
    sent: Sent
    text: str
    answer: str


def damage_sound(samples: Float[np.ndarray, " n"], damage: Damage, rng: np.random.Generator) -> Float[np.ndarray, " m"]:
    """What a receiver plays.

    Args:
      samples: that were sent, at ``RATE``.
      damage: of its packets.
      rng: which of them.

    Returns:
      m is n, unless packets come twice: then more by so many packets.
    """
    packets = [samples[start : start + PACKET] for start in range(0, len(samples), PACKET)]
    hit = rng.random(len(packets)) < damage.fraction
    played = []
    for packet, is_hit in zip(packets, hit, strict=True):
        if is_hit and damage.kind == "twice":
            played += [packet, packet]
        else:
            played.append(np.zeros_like(packet) if is_hit else packet)
    return np.concatenate(played)


def order_frames(count: int, damage: Damage, rng: np.random.Generator) -> list[int]:
    """The numbers of pictures in the order in which they come."""
    hit = rng.random(count) < damage.fraction
    if damage.kind == "late":
        # one that is late comes after some that were sent behind it
        arrival = np.arange(count) + hit * (_LATE_BY + 0.5)
        return [int(number) for number in np.argsort(arrival, kind="stable")]
    copies = 2 if damage.kind == "twice" else 0
    return [number for number in range(count) for _ in range(copies if hit[number] else 1)]


def send(
    model: OmniModel, sent: Sent, damage: Damage, question: str, rng: np.random.Generator, max_tokens: int
) -> tuple[str, int]:
    """The model's answer to what comes, and how many pictures its session refused.

    Raises:
      InputError: if nothing came.
    """
    has_sound = sent.samples is not None
    played = np.zeros(0, np.float32) if sent.samples is None else damage_sound(sent.samples, damage, rng)
    frames = order_frames(len(sent.frames), damage, rng)
    session = model.listen(audio=has_sound, video=bool(sent.frames), modalities=("text",), max_tokens=max_tokens)
    refused = 0
    hop = RATE // FRAME_RATE  # samples between two pictures
    for place in range(max(len(frames), -(-len(played) // hop))):
        if place < len(frames):
            try:
                session.video(sent.frames[frames[place]], frames[place] / FRAME_RATE)
            except InputError:
                refused += 1
        samples = played[place * hop : (place + 1) * hop]
        if len(samples):
            session.audio(samples, RATE)
    return "".join(event.text or "" for event in session.answer(question)), refused


def read_questions(rows: Path, most: int) -> Iterator[Question]:
    """The rows that are sent, so many of each task at most.

    Raises:
      InputError: if the rows cannot be read.
    """
    counts: dict[str, int] = {}
    for values in read_values(rows):
        task = values["task"]
        counts[task] = counts.get(task, 0) + 1
        if task not in (*_VIDEO_TASKS, *_VOICE_TASKS) or counts[task] > most:
            continue
        question, answer = (message["content"] for message in values["messages"])
        yield Question(task, _read_media(values, rows.parent), question.split(">")[-1], answer)


def _read_media(values: Mapping[str, Any], folder: Path) -> Sent:
    settings = MelSettings(sampling_rate=RATE)
    if "videos" in values:
        path = folder / values["videos"][0]
        frames, has_sound = read_frames(path)
        return Sent(read_audio(str(path), settings) if has_sound else None, frames)
    return Sent(read_audio(str(folder / values["audios"][0]), settings), ())


def measure(options: Options) -> dict[str, dict[str, dict[str, int]]]:
    """Right answers by damage and task.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--most", options.most, 1)
    questions = list(read_questions(options.rows, options.most))
    if not questions:
        raise InputError(f"{options.rows}: has no row of {', '.join((*_VIDEO_TASKS, *_VOICE_TASKS))}")
    model = omni_jax.load(options.model, components=("thinker",))
    kinds: tuple[Kind, ...] = ("lost", "late", "twice")
    damages = [Damage("lost", 0.0), *(Damage(kind, fraction) for kind in kinds for fraction in options.fractions)]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for damage in damages:
        rng = np.random.default_rng(options.seed)
        counts: dict[str, dict[str, int]] = {}
        for question in track(questions, description=str(damage), console=Console(stderr=True)):
            own = counts.setdefault(question.task, {"asked": 0, "right": 0, "refused": 0, "failed": 0})
            own["asked"] += 1
            try:
                text, refused = send(model, question.sent, damage, question.text, rng, options.max_tokens)
            except InputError:
                own["failed"] += 1
                continue
            own["refused"] += refused
            own["right"] += Answered(question.task, "", question.answer, text).is_right
        found[str(damage)] = counts
    return found


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with exit_on_error():
        found = measure(options)
    replace_file(options.out, (json.dumps(found, indent=2) + "\n").encode())
    for damage, counts in found.items():
        right = ", ".join(f"{task} {own['right']} of {own['asked']}" for task, own in counts.items())
        print(f"{damage}: {right}")


if __name__ == "__main__":
    main()
