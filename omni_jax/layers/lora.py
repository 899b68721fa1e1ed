"""Low-rank adapters of linear maps (LoRA, https://arxiv.org/abs/2106.09685): y = W x + scale * B (A x).

Letters: R rank, B rows of a batch, L layers of a stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.layers.quantized import QuantizedKernel

Path: TypeAlias = tuple[str, ...]


@struct.dataclass
class LoRAKernel:
    """A kernel of shape inputs + outputs and its adapter. As a parameter it stands where the kernel would.

    Attributes:
      kernel: of the model. The first field: Flax compares its shape with the module's.
      a: inputs + (R,).
      b: (R,) + outputs, multiplied with the scale already.
      row_factors: of each rank for each row of the inputs, where rows have adapters of their own; 1 row counts for
        all; None: every rank for every row.
    """

    kernel: Array | QuantizedKernel
    a: Float[Array, "... R"]
    b: Float[Array, "R ..."]
    row_factors: Float[Array, "B R"] | None = None


def multiply_adapter(
    x: Float[jax.Array, "*batch_and_inputs"], kernel: LoRAKernel, num_inputs: int, dtype: DTypeLike
) -> Float[jax.Array, "*batch_and_outputs"]:
    """What the adapter adds to the product of ``x`` with the kernel, in ``dtype``."""
    contracted = (tuple(range(x.ndim - num_inputs, x.ndim)), tuple(range(num_inputs)))
    a = jnp.asarray(kernel.a, dtype)
    low = jax.lax.dot_general(x.astype(dtype), a, (contracted, ((), ())))  # [*batch, R]
    if kernel.row_factors is not None:
        factors = jnp.asarray(kernel.row_factors, dtype)  # [B, R]
        # rows are the first axis of a batch; the axes behind it share a row's adapter
        low = low * factors.reshape(len(factors), *[1] * (low.ndim - 2), -1)
    return jnp.tensordot(low, jnp.asarray(kernel.b, dtype), 1)  # [*batch, *outputs]


def find_adapters(adapters: Mapping[str, Any]) -> Iterator[tuple[Path, Array, Array]]:
    """The path of each linear map in a tree of adapters, its a and its b."""
    flat: dict[Path, Any] = flatten_dict(adapters)
    for path, a in flat.items():
        if path[-1] == "a":
            yield path[:-1], a, flat[(*path[:-1], "b")]


def attach_adapters(params: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """``params`` with a ``LoRAKernel`` in place of each kernel that ``adapters`` has an ``a`` and a ``b`` for.

    Args:
      params: of a model.
      adapters: a tree like it, with ``a`` and ``b`` below the path of a linear map.
      scale: of what adapters add.
    """
    flat: dict[Path, Any] = flatten_dict(params)
    for path, a, b in find_adapters(adapters):
        flat[(*path, "kernel")] = LoRAKernel(flat[(*path, "kernel")], a, scale * b)
    return unflatten_dict(flat)


def merge_kernel(kernel: Float[Array, "..."], a: Float[Array, "... R"], b: Float[Array, "R ..."], scale: float) -> Any:
    """A kernel, inputs + outputs, with what its adapter adds; in the kernel's dtype.

    Works on arrays of NumPy and of JAX alike.
    """
    added = a.reshape(-1, a.shape[-1]) @ b.reshape(len(b), -1)  # [inputs, outputs]
    return (kernel.astype(np.float32) + scale * added.reshape(kernel.shape)).astype(kernel.dtype)
