"""Random draws from lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

_Choice = TypeVar("_Choice")


def draw(rng: np.random.Generator, choices: Sequence[_Choice]) -> _Choice:
    """One of them, each as likely as the others."""
    return choices[int(rng.integers(len(choices)))]


def sample(rng: np.random.Generator, choices: Sequence[_Choice], count: int) -> list[_Choice]:
    """So many different ones, in any order; all of them if there are no more."""
    return [choices[int(place)] for place in rng.permutation(len(choices))[:count]]
