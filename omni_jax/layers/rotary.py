"""Rotary position embedding: the tables of TMRoPE and of pictures, and the rotation, in float32.

Letters: B batch, S positions, N heads, H width of a head. Tables hold H / 2 angles a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from omni_jax.batch import Array

Tables: TypeAlias = tuple[Float[jax.Array, "*positions half"], Float[jax.Array, "*positions half"]]  # cos, sin


def _inverse_frequencies(count: int, theta: float) -> np.ndarray:
    """theta^(-i / count) for i below ``count``. [count]"""
    # float32 in every step, as the reference computes them
    return (1.0 / theta ** (np.arange(count, dtype=np.float32) / np.float32(count))).astype(np.float32)


def tmrope_tables(ids: Int[Array, "3 B S"], sections: Sequence[int], theta: float) -> Tables:
    """cos and sin of every position, [B, S, H / 2] (docs/reference.md, 5.5; ``apply_multimodal_rotary_pos_emb``).

    Args:
      ids: time, height and width of each position.
      sections: how many frequencies each axis takes; they add up to half the head.
      theta: base of the frequencies.
    """
    # of each frequency the axis that it follows: 0 time, 1 height, 2 width
    axis_of = np.repeat(np.arange(len(sections)) % 3, sections)
    by_frequency = jnp.stack([ids[axis] for axis in axis_of], axis=-1).astype(jnp.float32)  # [B, S, H / 2]
    angles = by_frequency * _inverse_frequencies(len(axis_of), theta)
    return jnp.cos(angles), jnp.sin(angles)


def picture_tables(row: Int[Array, "*patches"], column: Int[Array, "*patches"], head_dim: int) -> Tables:
    """cos and sin of every patch, [*patches, H / 2]: half of the angles by row, half by column."""
    # the base is that of the reference's code; a config.json cannot choose another
    frequencies = _inverse_frequencies(head_dim // 4, 10_000.0)
    by_row = jnp.asarray(row)[..., None].astype(jnp.float32) * frequencies  # [*patches, H / 4]
    by_column = jnp.asarray(column)[..., None].astype(jnp.float32) * frequencies
    angles = jnp.concatenate([by_row, by_column], axis=-1)  # [*patches, H / 2]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "*positions N H"], tables: Tables) -> Float[jax.Array, "*positions N H"]:
    """Rotates the pairs (i, i + H / 2) of every head by the position's angles."""
    cos, sin = (table[..., None, :] for table in tables)  # [*positions, 1, H / 2]
    # halves, not interleaved pairs as in the DiT (``rotate_first_head``)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # two of [*positions, N, H / 2]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
