"""Float32 that stays float32: a TPU multiplies in bfloat16 passes unless it is told otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Every matrix product and convolution that ``function`` traces is computed with float32 products.

    Token2Wav needs it: 36 evaluations add up, and what is left of bfloat16 products is heard. Goes under
    ``nn.compact`` where both stand on a method.
    """

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        # the setting is read while operations are traced; the program that comes of it carries it along
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced
