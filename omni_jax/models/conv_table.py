"""The convolutions of the vocoder's residual blocks as a table, for a loop over them.

Letters: B rows, T samples, C channels, K taps of all convolutions.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import same_padding


class ConvTable(NamedTuple):
    """The convolutions of a stage's blocks, one entry for each, block by block; or the entry of one of them.

    Attributes:
      num_taps, dilation: of each.
      first_tap: where its kernel begins among all.
      before: frames of padding in front.
      ends_round: whether it is the second of its round.
      ends_block: whether it is the last of its block.
    """

    num_taps: Any
    dilation: Any
    first_tap: Any
    before: Any
    ends_round: Any
    ends_block: Any

    @property
    def max_reach(self) -> int:
        """Samples that any of them reads on one side, rounded to where rows of a TPU's memory begin."""
        behind = int(np.max((self.num_taps - 1) * self.dilation - self.before))
        return -(-behind // 8) * 8


def make_conv_table(config: BigVGANConfig) -> ConvTable:
    """The table of the blocks of any stage; all stages have the same."""
    num_taps = []
    dilation = []
    before = []
    ends_block = []
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        for i, of_round in enumerate(dilations):
            # the first convolution of a round is dilated, the second is not
            for half, of_conv in enumerate((of_round, 1)):
                num_taps.append(kernel)
                dilation.append(of_conv)
                before.append(same_padding(kernel, of_conv)[0])
                ends_block.append(half == 1 and i + 1 == len(dilations))
    first_tap = np.cumsum([0, *num_taps[:-1]])
    ends_round = np.arange(len(num_taps)) % 2 == 1
    return ConvTable(
        np.array(num_taps), np.array(dilation), first_tap, np.array(before), ends_round, np.array(ends_block)
    )


def table_conv(
    side: int,
    entry: ConvTable,
    kernels: Float[jax.Array, "K C C"],
    bias: Float[jax.Array, " C"],
    x: Float[jax.Array, "B T C"],
) -> Float[jax.Array, "B T C"]:
    """One of the convolutions, which one is known at run time alone: a loop over its taps, each a matrix product.

    Args:
      side: ``ConvTable.max_reach`` of all of them.
      entry: of the convolution.
      kernels: of all.
      bias: of the convolution.
      x: what it reads; zeros lie on either side of it.
    """
    # that of the code around it, which is gone when the gradient is traced
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    return _table_conv(side, precision, entry, kernels, bias, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _table_conv(
    side: int, precision: str | None, entry: ConvTable, kernels: jax.Array, bias: jax.Array, x: jax.Array
) -> Float[jax.Array, "B T C"]:
    padded = _pad(x, side)

    def add_tap(tap: jax.Array, total: jax.Array) -> jax.Array:
        shifted = _shift(padded, side + _offset(entry, tap), x.shape[1])  # [B T, C]
        kernel = jax.lax.dynamic_index_in_dim(kernels, entry.first_tap + tap, keepdims=False)  # [C, C]
        return total + jnp.matmul(shifted, kernel, precision=precision).reshape(x.shape)

    return jax.lax.fori_loop(0, entry.num_taps, add_tap, jnp.broadcast_to(bias, x.shape))


def _forward(
    side: int, precision: str | None, entry: ConvTable, kernels: jax.Array, bias: jax.Array, x: jax.Array
) -> tuple[jax.Array, tuple[ConvTable, jax.Array, jax.Array]]:
    return _table_conv(side, precision, entry, kernels, bias, x), (entry, kernels, x)


def _backward(
    side: int,
    precision: str | None,
    residuals: tuple[ConvTable, jax.Array, jax.Array],
    gradient: Float[jax.Array, "B T C"],
) -> tuple[None, jax.Array, jax.Array, jax.Array]:
    # a loop of as many taps as a number of the device says has no gradient but one that is written out
    entry, kernels, x = residuals
    num_samples = x.shape[1]
    padded = _pad(x, side)
    padded_gradient = _pad(gradient, side)
    flat_gradient = gradient.reshape(-1, gradient.shape[2])  # [B T, C]

    def add_tap(tap: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        by_x, by_kernels = totals
        offset = _offset(entry, tap)
        index = entry.first_tap + tap
        kernel = jax.lax.dynamic_index_in_dim(kernels, index, keepdims=False)  # [C, C]
        # what was read ahead of a sample comes back from behind it
        behind = _shift(padded_gradient, side - offset, num_samples)  # [B T, C]
        by_x += jnp.matmul(behind, kernel.T, precision=precision).reshape(x.shape)
        ahead = _shift(padded, side + offset, num_samples)  # [B T, C]
        by_kernel = jnp.matmul(ahead.T, flat_gradient, precision=precision)  # [C, C]
        return by_x, jax.lax.dynamic_update_index_in_dim(by_kernels, by_kernel, index, axis=0)

    zeros = (jnp.zeros_like(x), jnp.zeros_like(kernels))
    by_x, by_kernels = jax.lax.fori_loop(0, entry.num_taps, add_tap, zeros)
    return None, by_kernels, jnp.sum(flat_gradient, axis=0), by_x


_table_conv.defvjp(_forward, _backward)


def _offset(entry: ConvTable, tap: jax.Array) -> jax.Array:
    """How many samples ahead of its own a tap reads."""
    return tap * entry.dilation - entry.before


def _pad(x: jax.Array, side: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (side, side), (0, 0)))


def _shift(padded: jax.Array, begin: jax.Array, num_samples: int) -> Float[jax.Array, "BT C"]:
    """The samples from ``begin`` on, rows one behind the other."""
    shifted = jax.lax.dynamic_slice_in_dim(padded, begin, num_samples, axis=1)
    return shifted.reshape(-1, padded.shape[2])
