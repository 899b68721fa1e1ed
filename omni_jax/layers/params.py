"""How a module of this package makes a parameter and hands its dtypes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


def param(
    module: nn.Module, name: str, init: Callable[..., Any], shape: tuple[int, ...], axes: tuple[str, ...]
) -> jax.Array:
    """A parameter in the module's ``param_dtype``; ``axes`` name its dimensions for ``omni_jax.sharding.RULES``."""
    # of a parameter that is there Flax traces ``init`` for its shape alone; random numbers take long to trace
    if module.has_variable("params", name):
        init = nn.initializers.zeros
    boxed = nn.with_logical_partitioning(init, axes)
    # the tree of parameters keeps the box with the names; what is returned is the array in it
    value: Any = module.param(name, boxed, shape, module.param_dtype)  # type: ignore[attr-defined]
    return value


def dtypes(module: Any) -> dict[str, Any]:
    """What a module passes on to its parts: the dtype it computes in and the dtype its parameters are kept in."""
    return dict(dtype=module.dtype, param_dtype=module.param_dtype)
