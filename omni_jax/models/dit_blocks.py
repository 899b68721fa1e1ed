"""Blocks of frames in a list, and attention among them (docs/reference.md, 8.7).

Letters: N blocks of the list, F frames of a block, R streams with a cache, H width of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array

NO_BLOCK = -1  # in place of a neighbour

_MASKED = -1e30  # finite: a block of padding sees nothing and must still give a number


@struct.dataclass
class CachedBlocks:
    """What a list of blocks hands on to the next call: of R streams the last block, to be looked back at.

    Their keys and values are a ``DiTCache``. In ``Blocks.before`` they count as if they stood behind the list: stream r
    at N + r.
    """

    valid: Bool[Array, "R F"]
    next: Int[Array, " R"]  # the block that the next call looks back at; N + r where stream r is not active


@struct.dataclass
class Blocks:
    """Which frames the blocks of a list hold, and which of them are neighbours."""

    index: Int[Array, " N"]  # of the block in its request; 0 for a block of padding
    valid: Bool[Array, "N F"]  # False for frames after a request's end
    before: Int[Array, " N"]  # where the block before stands in the list, or in the cache; NO_BLOCK if nowhere
    after: Int[Array, " N"]
    cached: CachedBlocks | None = None


class KeyBlocks(NamedTuple):
    """Blocks that may be looked at; ``valid`` says which of their frames are real."""

    keys: Float[Array, "*halves N F heads H"]
    values: Float[Array, "*halves N F heads H"]
    valid: Bool[Array, "N F"]


def block_attention(
    q: Float[Array, "*halves N F heads H"],
    k: Float[Array, "*halves N F heads H"],
    v: Float[Array, "*halves N F heads H"],
    blocks: Blocks,
    *,
    behind: bool,
    ahead: bool,
    source: KeyBlocks | None = None,
) -> Float[jax.Array, "*halves N F heads H"]:
    """Attention of each block to itself, and to the block before or after it, where there is one.

    Args:
      q, k, v: of the list.
      blocks: which of them are neighbours.
      behind, ahead: whether the block before, and after, is seen.
      source: what ``blocks.before`` points into; the list if None.
    """
    own = KeyBlocks(k, v, jnp.asarray(blocks.valid))
    seen = [own]
    if behind:
        seen.insert(0, _take_neighbours(source or own, blocks.before))
    if ahead:
        seen.append(_take_neighbours(own, blocks.after))
    keys = jnp.concatenate([s.keys for s in seen], axis=-3)  # [*halves, N, F or 2F, heads, H]
    values = jnp.concatenate([s.values for s in seen], axis=-3)
    visible = jnp.concatenate([s.valid for s in seen], axis=1)  # [N, F or 2F]
    logits = jnp.einsum("...nqhd,...nkhd->...nhqk", q, keys) * q.shape[-1] ** -0.5  # [..., N, heads, F, F or 2F]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, _MASKED), axis=-1)
    return jnp.einsum("...nhqk,...nkhd->...nqhd", weights, values)


def _take_neighbours(source: KeyBlocks, places: Array) -> KeyBlocks:
    """The blocks in ``places``; of ``NO_BLOCK`` no frame is valid."""
    exists = jnp.asarray(places) != NO_BLOCK  # [N]
    valid = jnp.take(source.valid, places, axis=0, mode="clip") & exists[:, None]  # [N, F]
    # a masked key has no weight, but zero times NaN would still carry one request's NaN over to another
    values = jnp.where(exists[:, None, None, None], take_blocks(source.values, places), 0)
    return KeyBlocks(take_blocks(source.keys, places), values, valid)


def take_blocks(x: Array, places: Array) -> jax.Array:
    """Blocks of a list [*halves, N, F, heads, H]; any block for one that is not there."""
    return jnp.take(x, places, axis=-4, mode="clip")


def pack(lengths: list[int], block_size: int, num_blocks: int) -> tuple[Blocks, list[slice]]:
    """The blocks of several requests, one after the other.

    Args:
      lengths: frames of each request.
      block_size: frames a block.
      num_blocks: length of the list; what the requests leave is padding.

    Returns:
      The list, and each request's part of it.
    """
    parts = []
    start = 0
    index = np.zeros(num_blocks, np.int32)
    valid = np.zeros((num_blocks, block_size), bool)
    before = np.full(num_blocks, NO_BLOCK, np.int32)
    after = np.full(num_blocks, NO_BLOCK, np.int32)
    for length in lengths:
        end = start + -(-length // block_size)
        parts.append(slice(start, end))
        index[start:end] = np.arange(end - start)
        valid[start:end].reshape(-1)[:length] = True
        # the first block has none before it, and the last one none after it
        before[start + 1 : end] = np.arange(start, end - 1)
        after[start : end - 1] = np.arange(start + 1, end)
        start = end
    return Blocks(index, valid, before, after), parts
