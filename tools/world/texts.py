"""The tasks of the small world that are of text alone.

To say which thing has which colour, a language model must find a word that was there before and take the word beside
it. ``word_list`` asks for nothing else, and half of its tokens are answers: from it a model learns to copy soonest.
"""

from __future__ import annotations

import numpy as np

from omni_jax.processing.read_aloud import QUESTION
from tools.world.captions import add_article
from tools.world.draws import draw, sample
from tools.world.items import Item, Turn
from tools.world.vocabulary import COLOURS, DAYS, NAMES, OPPOSITES, SHAPES, SIGNS, WORDS

_LISTED = (8, 40)  # the fewest and the most words of a list


def opposite(rng: np.random.Generator) -> Item:
    """The opposite of a word."""
    pair = draw(rng, OPPOSITES)
    word, answer = pair if rng.random() < 0.5 else pair[::-1]
    animal = draw(rng, SIGNS)
    turn = Turn(f"The {animal} is not {word}. What is it?", f"The {animal} is {answer}.")
    return Item("opposite", f"not {word} {animal}", (turn,))


def day(rng: np.random.Generator) -> Item:
    """The day after or before another."""
    place = int(rng.integers(len(DAYS)))
    name = draw(rng, NAMES)
    step, word = draw(rng, ((1, "after"), (-1, "before")))
    answer = DAYS[(place + step) % len(DAYS)]
    turn = Turn(f"{name} comes the day {word} {DAYS[place]}. When?", f"{name} comes on {answer}.")
    return Item("day", f"day {word} {DAYS[place]} {name}", (turn,))


def owner(rng: np.random.Generator) -> Item:
    """Who has what, of two to four that were named."""
    count = int(rng.integers(2, 5))
    names = sample(rng, NAMES, count)
    shapes = sample(rng, SHAPES, count)
    colours = sample(rng, tuple(COLOURS), count)
    has = [
        f"{name} has {add_article(f'{colour} {shape}')}."
        for name, colour, shape in zip(names, colours, shapes, strict=True)
    ]
    which = int(rng.integers(count))
    turn = Turn(f"{' '.join(has)} What does {names[which]} have?", has[which])
    seen = tuple(f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=True))
    return Item("owner", f"has {names[which]} {colours[which]} {shapes[which]}", (turn,), seen)


def word_list(rng: np.random.Generator) -> Item:
    """Many words in any order that are to be read aloud."""
    fewest, most = _LISTED
    text = " ".join(sample(rng, WORDS, int(rng.integers(fewest, most + 1))))
    return Item("list", text, (Turn(QUESTION.replace("{text}", text), text),))
