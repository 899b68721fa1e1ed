"""What media of the small world hold, in words, so that a question about them can be asked in text alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from tools.world.items import Effect, Item, Medium, Picture, Spoken, Turn, Video
from tools.world.pictures import FRAME_RATE, Thing
from tools.world.vocabulary import COLOURS, NUMBERS, PLACES, SHAPES, plural

_NEAR = 0.1  # widths of the picture: a thing so near to a place is at it


def capitalize(text: str) -> str:
    """A text as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def add_article(name: str) -> str:
    """The name of a thing with its article."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def name_place(place: str) -> str:
    """Where a thing is that is at a place."""
    if place == "middle":
        return "in the middle"
    return f"on the {place}" if place in ("left", "right") else f"at the {place}"


def describe_medium(medium: Medium) -> str:
    """What is said, shown or both, in sentences."""
    if isinstance(medium, Spoken):
        return medium.text
    if isinstance(medium, Picture):
        return capitalize(_describe_picture(medium))
    return capitalize(", then ".join(_describe_times(medium)))


def ask_in_text(item: Item) -> Item:
    """The same item with what its media hold in their place."""
    turns = []
    for turn in item.turns:
        words = [describe_medium(medium) for medium in turn.media]
        if turn.question:
            words.append(turn.question)
        turns.append(Turn(" ".join(words), turn.answer))
    return Item(f"{item.task}-text", item.key, tuple(turns), item.seen)


def _describe_picture(picture: Picture) -> str:
    things = _name_things(picture.things)
    return f"{things} and the word {picture.sign}" if picture.sign else things


def _name_things(things: Sequence[Thing]) -> str:
    if not things:
        return "nothing"
    if len(things) == 1:
        return add_article(_name_kind(things[0]))
    placed = {_find_place(thing): thing for thing in things}
    kinds = {_name_kind(thing) for thing in things}
    if len(things) == len(placed) == max(len(kinds), 2) and None not in placed:
        names = []
        for place in PLACES:
            if place in placed:
                thing = placed[place]
                names.append(f"{add_article(_name_kind(thing))} {name_place(place)}")
        return f"{', '.join(names[:-1])} and {names[-1]}"
    counts = Counter(_name_kind(thing) for thing in sorted(things, key=_rank))
    return " and ".join(f"{NUMBERS[count - 1]} {plural(name, count)}" for name, count in counts.items())


def _name_kind(thing: Thing) -> str:
    """Colour and shape; the shape alone of a thing whose colour has no name."""
    return f"{thing.colour} {thing.shape}" if thing.colour in COLOURS else thing.shape


def _rank(thing: Thing) -> tuple[int, int]:
    """The order of kinds of things in a description: by colour, those without a name last, and then by shape."""
    colour = list(COLOURS).index(thing.colour) if thing.colour in COLOURS else len(COLOURS)
    return colour, SHAPES.index(thing.shape)


def _find_place(thing: Thing) -> str | None:
    for place, (x, y) in PLACES.items():
        if math.hypot(thing.x - x, thing.y - y) < _NEAR:
            return place
    return None


def _describe_times(video: Video) -> list[str]:
    """What is shown in turn, each with what is heard meanwhile."""
    described = []
    start = 0
    for (things, sign), frames in itertools.groupby(video.frames, key=lambda frame: (_kinds(frame), frame.sign)):
        shown = list(frames)
        end = start + len(shown)
        text = _describe_picture(Picture(shown[0].things, shown[0].ground, sign))
        move = _name_move(shown[0].things, shown[-1].things)
        if move and things:
            text += f" that moves {move}"
        for time, sound in video.sounds or ():
            if start <= time * FRAME_RATE < end:
                text += f" with a {sound.name}" if isinstance(sound, Effect) else f" and the word {sound.text}"
        described.append(text)
        start = end
    return described


def _kinds(frame: Picture) -> tuple[tuple[str, str], ...]:
    return tuple((thing.colour, thing.shape) for thing in frame.things)


def _name_move(first: Sequence[Thing], last: Sequence[Thing]) -> str:
    """Which way a thing has moved; "" if it has not."""
    if not first:
        return ""
    right = last[0].x - first[0].x
    down = last[0].y - first[0].y
    if math.hypot(right, down) < _NEAR:
        return ""
    if abs(right) > abs(down):
        return "to the right" if right > 0 else "to the left"
    return "down" if down > 0 else "up"
