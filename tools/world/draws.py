"""Random draws from lists, and of colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Choice = TypeVar("_Choice")
# red, green and blue are at least this, and the largest of them is above that, of 255; grounds have at most 44
_DARK = 30
_BRIGHT = 140


def draw(rng: np.random.Generator, choices: Sequence[_Choice]) -> _Choice:
    """One of them, each as likely as the others."""
    return choices[int(rng.integers(len(choices)))]


def sample(rng: np.random.Generator, choices: Sequence[_Choice], count: int) -> list[_Choice]:
    """So many different ones, in any order; all of them if there are no more."""
    return [choices[int(place)] for place in rng.permutation(len(choices))[:count]]


def draw_colour(rng: np.random.Generator) -> str:
    """Any colour that is bright enough on the grounds of pictures, as #rrggbb."""
    while True:
        parts = rng.integers(_DARK, 256, 3)
        if max(parts) > _BRIGHT:
            return "#" + "".join(f"{part:02x}" for part in parts)
