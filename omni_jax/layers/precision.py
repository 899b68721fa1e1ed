"""Float32 that stays float32: a TPU multiplies in bfloat16 passes unless it is told otherwise.

Six passes ("highest") give float32 products; three ("high") an error of some 1e-6, in half of the time; one ("default")
that of bfloat16. ``tools/precision.py`` prints what each costs in Token2Wav. CPUs compute in float32 at any setting.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax

Precision: TypeAlias = Literal["highest", "high", "default"]


def full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every matrix product and convolution that ``function`` traces is computed with float32 products.

    Goes under ``nn.compact`` where both stand on a method.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        # the setting is read while operations are traced; the program that comes of it carries it along
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


def own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a method of a module, at the module's ``precision``."""

    @functools.wraps(method)
    def traced(self: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(self.precision):
            return method(self, *args, **kwargs)

    return traced
