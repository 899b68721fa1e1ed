"""What a question of the small world is made of, and in which part of the data it may be."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

from tools.world.pictures import Ground, Thing

Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Spoken:
    """A text in a synthesizer's voice."""

    text: str
    voice: str
    rate: float


@dataclass(frozen=True)
class Picture:
    """A picture to draw."""

    things: tuple[Thing, ...]
    ground: Ground
    sign: str = ""


@dataclass(frozen=True)
class Effect:
    """A sound effect to make."""

    name: str
    pitch: float
    seed: int


@dataclass(frozen=True)
class Video:
    """A video to draw."""

    frames: tuple[Picture, ...]
    """FRAME_RATE a second."""
    sounds: tuple[tuple[float, Spoken | Effect], ...] | None = None
    """Each with the second at which it starts; None: the video has no sound track."""
    noise: float = 0.002
    """Standard deviation of the sound track's noise."""


Medium = Spoken | Picture | Video
_TAGS = {Spoken: "<audio>", Picture: "<image>", Video: "<video>"}


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    media: tuple[Medium, ...] = ()
    """In the order in which the question has them, before its text."""

    @property
    def content(self) -> str:
        """The question with a tag for each medium."""
        return "".join(_TAGS[type(medium)] for medium in self.media) + self.question


@dataclass(frozen=True)
class Item:
    """A dialogue with its task."""

    task: str
    key: str
    """The combination that is asked for, which decides the item's part."""
    turns: tuple[Turn, ...]
    seen: tuple[str, ...] = ()
    """Other combinations that it shows; in training they are all of training."""
    reply: Spoken | None = None
    """The last answer, spoken."""


def part_of(key: str) -> Part:
    """The part of the data that a combination belongs to: one in ten to valid, one in ten to test."""
    number = zlib.crc32(key.encode()) % 10
    return "test" if number == 0 else "valid" if number == 1 else "train"


def fits_part(item: Item, part: Part) -> bool:
    """Whether an item may be in a part."""
    if part_of(item.key) != part:
        return False
    return part != "train" or all(part_of(key) == "train" for key in item.seen)


def ask_by_voice(item: Item, voice: str, rate: float) -> Item:
    """The same item with its first question spoken."""
    first = item.turns[0]
    spoken = Turn("", first.answer, (*first.media, Spoken(first.question, voice, rate)))
    return Item(f"{item.task}-voice", item.key, (spoken, *item.turns[1:]), item.seen)
