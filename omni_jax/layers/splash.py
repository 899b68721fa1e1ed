"""Attention by the Pallas kernel "splash", which a TPU does block by block: no score ever leaves the chip.

Letters as in ``attention``. Under a mesh every device works on its own rows, heads and queries; where causal queries
are spread over ``sequence``, each device gets the keys of the whole row.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.sharding import axes_of

_BLOCKS = (512, 256, 128)  # queries or keys at a time; 2048 do not fit the memory that a kernel is given by default


def fits(q: Array, causal: bool) -> bool:
    """Whether the kernel can do it: the queries of a device must come in whole blocks."""
    return _block(q.shape[1] // _size(_queries(q.shape[1], causal))) > 0


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """As ``attention``; ``interpret`` computes the kernel step by step on any device, for tests."""
    length, heads = q.shape[1:3]
    rows, queries = axes_of("batch", q.shape[0]), _queries(length, causal)
    shared = axes_of("kv_heads", k.shape[2])  # a key's queries stay with it
    kernel = _kernel(length, heads, causal, _size(shared), _size(queries), interpret)

    def local(kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, mine: jax.Array, theirs: jax.Array) -> jax.Array:
        by_head = (jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v))
        out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(mine, theirs))
        return jnp.swapaxes(out, 1, 2)

    arrays = tuple(jnp.asarray(a) for a in (q, k, v, segments, segments))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(kernel, *arrays)
    whole = PartitionSpec(rows, None, shared, None)
    mine = PartitionSpec(rows, queries, shared, None)
    specs = (
        kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(shared, queries))),
        *(mine, whole, whole, PartitionSpec(rows, queries), PartitionSpec(rows, None)),
    )
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=mine, check_vma=False)(kernel, *arrays)


def _kernel(length: int, heads: int, causal: bool, head_parts: int, parts: int, interpret: bool) -> Any:
    shape = (length, length)
    mask = masks.MultiHeadMask([masks.CausalMask(shape) if causal else masks.FullMask(shape)] * heads)
    mine, theirs = _block(length // parts), _block(length)
    # the backward pass in one kernel would write a partial result for each block of keys, 64 of them at 32,768
    blocks = kernels.BlockSizes(
        block_q=mine, block_kv=theirs, block_kv_compute=theirs,
        block_q_dkv=mine, block_kv_dkv=theirs, block_kv_dkv_compute=theirs,
        block_q_dq=mine, block_kv_dq=theirs,
    )  # fmt: skip
    return kernels.make_splash_mha(
        mask, block_sizes=blocks, head_shards=head_parts, q_seq_shards=parts, interpret=interpret
    )


def _block(length: int) -> int:
    """The largest block that divides a length; 0 if none does."""
    return next((block for block in _BLOCKS if length and length % block == 0), 0)


def _queries(length: int, causal: bool) -> tuple[str, ...] | None:
    """What queries are spread over; the kernel cannot do it without a mask (jax 0.10.2)."""
    return axes_of("sequence", length) if causal else None


def _size(axes: tuple[str, ...] | None) -> int:
    """Into how many parts an axis is cut."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes or ())
