"""Where the rows of a batch of sound end, at any of a vocoder's rates.

Letters: B rows, T samples, C channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Bool, Int

from omni_jax.batch import Array


@struct.dataclass
class RowEnds:
    """Which samples of rows are real, at one of the rates.

    Attributes:
      length: of each row.
      inside: whether a sample is one of them.
    """

    length: Int[Array, " B"]
    inside: Bool[Array, "B T"]

    def upsample(self, rate: int) -> RowEnds:
        """The same at ``rate`` times the rate."""
        return make_row_ends(self.inside.shape[1] * rate, jnp.asarray(self.length) * rate)


def make_row_ends(num_frames: int, length: Int[Array, " B"]) -> RowEnds:
    """Of rows of ``num_frames`` frames, whose first ``length`` are real."""
    length = jnp.asarray(length)
    return RowEnds(length, jnp.arange(num_frames) < length[:, None])


def zero_outside(x: Array, ends: RowEnds | None) -> jax.Array:
    """Zeros after a row's end; without ``ends`` all samples are real. [B, T, C]"""
    if ends is None:
        return jnp.asarray(x)
    return jnp.where(ends.inside[..., None], x, 0)


def pad_edges(x: Array, first: Array, last: Array, ends: RowEnds | None, size: int) -> jax.Array:
    """Rows with what filters read beyond their ends. [B, T + 2 size, C]

    Args:
      x: the rows, [B, T, C].
      first: its first frame stands ``size`` times in front.
      last: a row's last frame in it stands after the row's end.
      ends: of the rows; None: all frames are real.
      size: frames on either side.
    """
    front = jnp.repeat(jnp.asarray(first)[:, :1], size, axis=1)  # [B, size, C]
    if ends is None:
        behind = jnp.repeat(jnp.asarray(last)[:, -1:], size, axis=1)  # [B, size, C]
        return jnp.concatenate([front, x, behind], axis=1)
    # equal places and not one: of one place of a single row a compiler for CPUs makes a slice, which it computes again
    # for every sample that reads it, and that takes ten times as long
    last_place = jnp.maximum(ends.length - 1, 0)[:, None, None]  # [B, 1, 1]
    last_place = jnp.broadcast_to(last_place, (x.shape[0], size, 1))  # [B, size, 1]
    behind = jnp.take_along_axis(jnp.asarray(last), last_place, axis=1)  # [B, size, C]
    x = jnp.where(ends.inside[..., None], x, behind[:, :1])  # [B, T, C]
    return jnp.concatenate([front, x, behind], axis=1)
