"""The DiT's rotary embedding: one head of all, by a frame's place in its request (docs/reference.md, 8.7).

Letters: N blocks, F frames of one, H width of a head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.layers.rotary import Tables
from omni_jax.sharding import axes_of


def rotary_tables(index: Int[Array, " N"], block_size: int, head_dim: int, theta: float) -> Tables:
    """cos and sin of every frame's angles, by its place in its request. [N, F, head_dim / 2]

    Args:
      index: of each block in its request.
      block_size: F.
      head_dim: H.
      theta: base of the frequencies.
    """
    place = jnp.asarray(index)[:, None] * block_size + jnp.arange(block_size)  # [N, F]
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    angles = place[..., None].astype(jnp.float32) * frequencies  # [N, F, H / 2]
    return jnp.cos(angles), jnp.sin(angles)


def rotate_first_head(x: Float[Array, "*halves N F heads H"], tables: Tables) -> jax.Array:
    """Rotates the pairs (0, 1), (2, 3), ... of head 0.

    The other heads have no positions: the model was trained with an embedding as wide as one head on all of them laid
    side by side, and so it has to be used (docs/reference.md, 8.7).
    """
    x = jnp.asarray(x)
    axes = axes_of("heads", x.shape[-2])
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None or math.prod(mesh.shape[axis] for axis in axes) == 1:
        return _rotate_head(x, *tables, True)
    # each device has heads of its own, and the first device has head 0: left to itself, XLA would gather all heads
    heads = PartitionSpec(*[None] * (x.ndim - 2), axes, None)

    def rotate_local(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return _rotate_head(x, cos, sin, jax.lax.axis_index(axes) == 0)

    specs = (heads, PartitionSpec(), PartitionSpec())
    # other axes of the mesh stay the compiler's
    mapped = jax.shard_map(rotate_local, in_specs=specs, out_specs=heads, axis_names=set(axes), check_vma=False)
    return mapped(x, *tables)


def _rotate_head(
    x: Float[jax.Array, "*halves N F heads H"], cos: jax.Array, sin: jax.Array, is_here: bool | jax.Array
) -> jax.Array:
    """``rotate_first_head`` of the heads on one device. ``is_here``: whether head 0 is among them."""
    # interleaved pairs; with halves the sound is wrong, and nothing fails
    first = x[..., 0, 0::2]  # [*halves, N, F, H / 2]
    second = x[..., 0, 1::2]
    rotated = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)  # [..., H / 2, 2]
    rotated = rotated.reshape(*x.shape[:-2], x.shape[-1])
    return x.at[..., 0, :].set(jnp.where(is_here, rotated, x[..., 0, :]))
