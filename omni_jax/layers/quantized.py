"""Kernels of linear maps in 8 or 4 bits, and keys and values of a cache in 8, for serving.

Values are whole numbers and have scales: a kernel in 8 bits one for each output, in 4 bits one for each output and each
group of inputs; a cache one for each position and head. They are widened where they are multiplied, so that only the
small numbers are read from memory.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from omni_jax.batch import Array

Bits = Literal[8, 4]
GROUP = 128  # inputs of a group, in 4 bits

_LANES = 128  # numbers that a TPU takes side by side
_FEW_ROWS = 64  # that are multiplied group by group; more are worth a kernel that is widened first

_LARGEST = {8: 127, 4: 7}
_DTYPES = {8: jnp.int8, 4: jnp.int4}


@struct.dataclass
class QuantizedKernel:
    """A kernel of shape inputs + outputs. As a parameter it stands where the kernel would.

    Attributes:
      values: whole numbers, in the kernel's shape. The first field: Flax compares its shape with the kernel's.
      scale: float32; groups + outputs where ``num_inputs`` is the number of a kernel's axes that are inputs.
    """

    values: Int[Array, "..."]
    scale: Float[Array, "groups ..."]


def quantize_kernel(kernel: Float[Array, "..."], num_inputs: int, bits: Bits) -> QuantizedKernel:
    """The nearest values to a kernel, by the largest of each output's weights.

    Args:
      kernel: inputs + outputs.
      num_inputs: of its axes that are inputs.
      bits: 8, or 4 where the number of inputs is a multiple of ``GROUP``; else 8 are used.
    """
    shape = kernel.shape
    rows = math.prod(shape[:num_inputs])
    if bits == 4 and rows % GROUP:
        bits = 8
    num_groups = rows // GROUP if bits == 4 else 1
    grouped = jnp.asarray(kernel, jnp.float32).reshape(num_groups, -1, *shape[num_inputs:])  # [G, rows, *outputs]
    largest = jnp.max(jnp.abs(grouped), axis=1)  # [G, *outputs]
    # an output without any weight keeps its zeros
    scale = jnp.where(largest > 0, largest, 1) / _LARGEST[bits]
    values = jnp.round(grouped / scale[:, None]).astype(_DTYPES[bits])
    return QuantizedKernel(values.reshape(shape), scale)


@struct.dataclass
class QuantizedRows:
    """Rows of numbers in 8 bits, such as the keys of a cache.

    Both arrays have as many axes, so that what moves rows about treats them alike.

    Attributes:
      values: int8, the rows' shape.
      scale: float32, one for each row.
    """

    values: Int[Array, "*batch H"]
    scale: Float[Array, "*batch 1"]


def quantize_rows(rows: Float[Array, "*batch H"]) -> QuantizedRows:
    """The nearest values to rows, by the largest number of each."""
    rows = jnp.asarray(rows, jnp.float32)
    largest = jnp.max(jnp.abs(rows), axis=-1, keepdims=True)  # [*batch, 1]
    # a row of zeros keeps them
    scale = jnp.where(largest > 0, largest, 1) / _LARGEST[8]
    return QuantizedRows(jnp.round(rows / scale).astype(jnp.int8), scale)


def multiply_quantized(
    x: Float[jax.Array, "*batch_and_inputs"], kernel: QuantizedKernel, num_inputs: int, dtype: DTypeLike
) -> Float[jax.Array, "*batch_and_outputs"]:
    """Contracts the last ``num_inputs`` axes of ``x`` with the kernel, in ``dtype``."""
    values = jnp.asarray(kernel.values)
    scale = jnp.asarray(kernel.scale)
    batch = x.shape[: x.ndim - num_inputs]
    outputs = scale.shape[1:]
    x = x.astype(dtype)
    if len(scale) == 1:
        scale = scale[0]
        if len(outputs) > 1 and outputs[-1] % _LANES:
            # libtpu 0.0.42.1 crashes on such a product where the heads are 64 wide; as one axis outputs are no trouble
            values = values.reshape(*values.shape[:num_inputs], -1)  # [*inputs, outputs]
            scale = scale.ravel()
        # one scale for each output, so that it can wait until the sum is there
        contracted = (tuple(range(len(batch), x.ndim)), tuple(range(num_inputs)))
        y = jax.lax.dot_general(x, values.astype(dtype), (contracted, ((), ())), preferred_element_type=jnp.float32)
        return (y * scale).astype(dtype).reshape(*batch, *outputs)
    num_groups = len(scale)
    rows = x.reshape(math.prod(batch), num_groups, -1)  # [M, G, rows of a group]
    grouped = values.reshape(num_groups, -1, math.prod(outputs))  # [G, rows, outputs]
    scale = scale.reshape(num_groups, -1)  # [G, outputs]
    if len(rows) <= _FEW_ROWS:
        # a sum for each group, so that the scales can wait: widened kernels would go through memory
        sums = jnp.einsum("mgr,gro->gmo", rows, grouped.astype(dtype), preferred_element_type=jnp.float32)
        y = jnp.sum(sums * scale[:, None], axis=0)  # [M, outputs]
    else:
        widened = grouped.astype(dtype) * scale[:, None].astype(dtype)
        y = jnp.einsum("mgr,gro->mo", rows, widened)
    return y.reshape(*batch, *outputs).astype(dtype)
