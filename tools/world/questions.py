"""Questions with their answers about one picture or video, of which several are asked."""

from __future__ import annotations

from collections.abc import Sequence

from tools.world.captions import capitalize, name_place
from tools.world.items import Turn
from tools.world.pictures import Thing
from tools.world.vocabulary import EFFECTS, SIGNS

ORDINALS = ("first", "second", "last")  # of the three things of a video


def ask_about_things(shapes: Sequence[str], colours: Sequence[str], places: Sequence[str]) -> list[Turn]:
    """All about things of a picture that differ in shape, colour and place."""
    asked = []
    for shape, colour, place in zip(shapes, colours, places, strict=True):
        name = f"{colour} {shape}"
        asked += [
            Turn(f"What colour is the {shape}?", f"The {shape} is {colour}."),
            Turn(f"What is {colour}?", f"The {shape} is {colour}."),
            Turn(f"Where is the {shape}?", f"The {name} is {name_place(place)}."),
            Turn(f"What is {name_place(place)}?", f"The {name} is {name_place(place)}."),
        ]
    return asked


def ask_about_events(shapes: Sequence[str], colours: Sequence[str], names: Sequence[str]) -> list[Turn]:
    """All about a video of three things.

    Args:
      shapes: in turn.
      colours: of the things.
      names: what is heard with each: an effect, a word, or "".
    """
    asked = []
    for segment, (shape, colour, name, ordinal) in enumerate(zip(shapes, colours, names, ORDINALS, strict=True)):
        asked += [
            Turn(f"What colour was the {shape}?", f"The {shape} was {colour}."),
            Turn(f"Which shape was {colour}?", f"The {shape} was {colour}."),
            Turn(f"Which shape came {ordinal}?", f"The {shape} came {ordinal}."),
        ]
        if name in EFFECTS and names.count(name) == 1:
            asked.append(Turn(f"What was there when the {name} came?", f"The {colour} {shape} was there."))
            asked.append(Turn(f"Which sound came with the {shape}?", f"The {name} came with the {shape}."))
        elif name in SIGNS:
            asked.append(_ask_for_word(segment, shapes, names))
    return asked


def ask_for_colour(effect: str, segment: int, shown: Sequence[Thing]) -> tuple[str, Turn]:
    """A question about the colour that was shown with an effect; its answer tells when that was, too.

    Args:
      effect: its name.
      segment: which of the things was shown then.
      shown: all things, in turn.

    Returns:
      The key of the combination that is asked for, and the question with its answer.
    """
    thing = shown[segment]
    question = f"What colour was the {thing.shape} when the {effect} came?"
    key = f"at {effect} {segment} {' '.join(thing.colour for thing in shown)}"
    return key, Turn(question, f"The {ORDINALS[segment]} {thing.shape} was {thing.colour}.")


def ask_for_word(segment: int, shown: Sequence[Thing], words: Sequence[str]) -> tuple[str, Turn]:
    """A question about the word that is spoken while a thing is shown; its answer first names each shape with its word.

    Args:
      segment: which of the things.
      shown: all things, in turn.
      words: that were said with them.

    Returns:
      The key of the combination that is asked for, and the question with its answer.
    """
    shapes = [thing.shape for thing in shown]
    return f"said {segment} {shapes[segment]} {' '.join(words)}", _ask_for_word(segment, shapes, words)


def _ask_for_word(segment: int, shapes: Sequence[str], names: Sequence[str]) -> Turn:
    """A question about the word that is spoken while one of the shapes is shown.

    Its answer names each shape in turn with its sound, and then repeats the one that is asked for. A word follows its
    shape directly: a model that copies lists predicts the token that followed the same one before.
    """
    told = [f"with the {shape} {_name_sound(name)}" for shape, name in zip(shapes, names, strict=True)]
    question = f"Which word was said while the {shapes[segment]} was there?"
    return Turn(question, capitalize(f"{', '.join(told)}, so {told[segment]}"))


def _name_sound(name: str) -> str:
    if not name:
        return "nothing"
    return f"a {name}" if name in EFFECTS else name
