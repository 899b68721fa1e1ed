"""Attention by the Pallas kernel "splash", which works block by block: logits never leave the chip.

Letters: B batch, T positions, N query heads, K key heads, H width of a head. Under a mesh every device works on its own
rows, heads and queries; where causal queries are spread over ``sequence``, each device gets the keys of the full row.
"""

from __future__ import annotations

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


def kernel_fits(q: Array, causal: bool) -> bool:
    """Whether the kernel can compute it: the queries of a device must be whole blocks."""
    return _largest_block(q.shape[1] // _num_parts(_query_axes(q.shape[1], causal))) > 0


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *,
    causal: bool,
    interpret: bool = False,
) -> Float[jax.Array, "B T N H"]:
    """As ``attention``.

    Args:
      q, k, v, segments, causal: as there.
      interpret: whether to compute the kernel step by step, which any device can, for tests.
    """
    length, heads = q.shape[1:3]
    rows = axes_of("batch", q.shape[0])
    queries = _query_axes(length, causal)
    shared_heads = axes_of("kv_heads", k.shape[2])  # a key's queries stay with it
    kernel = _make_kernel(length, heads, causal, _num_parts(shared_heads), _num_parts(queries), interpret)

    def attend_local(
        kernel: Any, q: jax.Array, k: jax.Array, v: jax.Array, query_segments: jax.Array, key_segments: jax.Array
    ) -> jax.Array:
        # the kernel does not scale, and puts the heads before the positions
        by_head = [jnp.swapaxes(a, 1, 2) for a in (q * q.shape[-1] ** -0.5, k, v)]  # [B, N or K, T, H]
        # it takes one row at a time
        out = jax.vmap(kernel)(*by_head, kernels.SegmentIds(query_segments, key_segments))
        return jnp.swapaxes(out, 1, 2)

    # segments twice: those of the queries may be spread, those of the keys are not
    arrays = tuple(jnp.asarray(a) for a in (q, k, v, segments, segments))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend_local(kernel, *arrays)
    query_spec = PartitionSpec(rows, queries, shared_heads, None)
    key_spec = PartitionSpec(rows, None, shared_heads, None)
    specs = (
        # the kernel is a tree of arrays too: which blocks each head and piece of queries has to compute
        kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(shared_heads, queries))),
        *(query_spec, key_spec, key_spec, PartitionSpec(rows, queries), PartitionSpec(rows, None)),
    )
    mapped = jax.shard_map(attend_local, mesh=mesh, in_specs=specs, out_specs=query_spec, check_vma=False)
    return mapped(kernel, *arrays)


def _make_kernel(length: int, heads: int, causal: bool, head_parts: int, query_parts: int, interpret: bool) -> Any:
    shape = (length, length)
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    block_q = _largest_block(length // query_parts)
    block_kv = _largest_block(length)
    # the backward pass in one kernel would write a partial result for each block of keys, 64 of them at 32,768
    blocks = kernels.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=head_parts,
        q_seq_shards=query_parts,
        interpret=interpret,
    )


def _largest_block(length: int) -> int:
    """The largest block that divides a length; 0 if none does."""
    for block in _BLOCKS:
        if length and length % block == 0:
            return block
    return 0


def _query_axes(length: int, causal: bool) -> tuple[str, ...] | None:
    """Mesh axes that queries are spread over; the kernel cannot spread them without a causal mask (jax 0.10.2)."""
    return axes_of("sequence", length) if causal else None


def _num_parts(axes: tuple[str, ...] | None) -> int:
    """Into how many parts these mesh axes cut an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    num_parts = 1
    for axis in axes or ():
        num_parts *= mesh.shape[axis]
    return num_parts
