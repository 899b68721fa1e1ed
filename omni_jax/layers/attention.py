"""Attention: one function with a description of who sees whom, and the projections around it.

Letters: B batch, T queries, S keys, N query heads, K key heads, G = N / K, H numbers a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.layers.linear import Linear
from omni_jax.layers.params import dtypes
from omni_jax.layers.splash import fits, splash_attention
from omni_jax.sharding import axes_of

_HIDDEN = -1e30  # finite, so that a query that sees nothing gives a number and not NaN
_LOGITS_AT_ONCE = 2**26  # float32 scores held at a time, 256 MiB; more are worked off piece by piece
_CAUSAL_PIECE = 256  # queries a piece where half of the scores would be masked away
_TILE = 512  # keys at a time where all scores would be too many
_ONE_BY_ONE = 2**16  # queries x keys, from where on a CPU does better with one head at a time


@struct.dataclass
class Mask:
    """Who sees whom. Positions see each other only within a segment, and if ``causal`` only what came before."""

    segments: Int[Array, "B S"]  # 0: padding
    causal: bool = struct.field(pytree_node=False, default=False)


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], mask: Mask
) -> Float[jax.Array, "B T N H"]:
    """Attention of a sequence to itself, scaled by 1 / sqrt(H), softmax in float32.

    On a TPU a kernel does it where the sizes are such that it can; which of the two it is is decided when the program
    is compiled. Elsewhere long sequences are worked off in pieces of queries, so that no more than 256 MiB of scores
    exist at a time; causal pieces read only the keys up to their own end.
    """
    arrays = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask.segments)
    plain = functools.partial(_by_device, causal=mask.causal)
    if not fits(q, mask.causal):
        return plain(*arrays)
    kernel = functools.partial(splash_attention, causal=mask.causal)
    return jax.lax.platform_dependent(*arrays, tpu=kernel, default=plain)


def _by_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool) -> jax.Array:
    """``_plain`` of the rows and heads of each device: pieces of all rows together would be pieces of no device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _plain(q, k, v, Mask(segments, causal))
    rows, heads = axes_of("batch", q.shape[0]), axes_of("kv_heads", k.shape[2])
    spec = PartitionSpec(rows, None, heads, None)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return _plain(q, k, v, Mask(segments, causal))

    specs = (spec, spec, spec, PartitionSpec(rows, None))
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segments)


def _plain(q: Array, k: Array, v: Array, mask: Mask) -> jax.Array:
    batch, length, heads, _ = q.shape
    scores = heads * length * length
    if batch > 1 and batch * scores > _LOGITS_AT_ONCE:
        return _map_rows(q, k, v, mask, at_once=max(1, _LOGITS_AT_ONCE // scores))
    if mask.causal and _CAUSAL_PIECE < length <= 8 * _CAUSAL_PIECE:
        pieces = [_piece(q, k, v, mask, begin, _CAUSAL_PIECE) for begin in range(0, length, _CAUSAL_PIECE)]
        return jnp.concatenate(pieces, axis=1)
    if scores > _LOGITS_AT_ONCE:
        return _map_pieces(q, k, v, mask)
    return _scores_and_sum(q, k, v, _visible(mask, jnp.arange(length), length))


def _map_rows(q: Array, k: Array, v: Array, mask: Mask, at_once: int) -> jax.Array:
    def one(row: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, segments = (a[None] for a in row)
        return _plain(q, k, v, Mask(segments, mask.causal))[0]

    return jax.lax.map(one, (q, k, v, mask.segments), batch_size=at_once)


def _visible(mask: Mask, queries: jax.Array, keys: int) -> jax.Array:
    """[B, T, S]: whether the query at each of the positions ``queries`` sees each of the first ``keys`` keys."""
    mine, theirs = jnp.take(mask.segments, queries, axis=1), mask.segments[:, :keys]
    visible = mine[:, :, None] == theirs[:, None, :]
    return visible & (jnp.arange(keys) <= queries[:, None]) if mask.causal else visible


def _piece(q: Array, k: Array, v: Array, mask: Mask, begin: int, size: int) -> jax.Array:
    end = min(begin + size, q.shape[1])
    return _scores_and_sum(q[:, begin:end], k[:, :end], v[:, :end], _visible(mask, jnp.arange(begin, end), end))


def _map_pieces(q: Array, k: Array, v: Array, mask: Mask) -> jax.Array:
    batch, length, heads, width = q.shape
    pieces = next(n for n in range(1, length + 1) if length % n == 0 and heads * length**2 <= n * _LOGITS_AT_ONCE)

    def one(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, positions = piece
        return _scores_and_sum(queries, k, v, _visible(mask, positions, length))

    split = jnp.moveaxis(q.reshape(batch, pieces, length // pieces, heads, width), 1, 0)
    out = jax.lax.map(one, (split, jnp.arange(length).reshape(pieces, -1)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _scores_and_sum(q: Array, k: Array, v: Array, visible: jax.Array) -> jax.Array:
    return cached_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), visible)


def cached_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], visible: Bool[Array, "B T S"]
) -> Float[jax.Array, "B T N H"]:
    """Attention of some positions to keys in the layout of a cache; ``visible`` says which of them each query sees."""
    batch, length, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    grouped = jnp.swapaxes(
        jnp.asarray(q).reshape(batch, length, kv_heads, heads // kv_heads, width), 1, 2
    )  # [B, K, T, G, H]
    grouped = grouped.reshape(batch, kv_heads, -1, width)
    seen = jnp.repeat(visible, heads // kv_heads, axis=1)  # [B, T * G, S]
    operands = (grouped, jnp.asarray(k), jnp.asarray(v), seen)
    if length * keys < _ONE_BY_ONE or length == 1:
        out = _all_heads(*operands)
    elif batch * heads * length * keys > _LOGITS_AT_ONCE and not keys % _TILE:
        out = jax.lax.platform_dependent(*operands, cpu=_head_by_head, default=_tile_by_tile)
    else:
        out = jax.lax.platform_dependent(*operands, cpu=_head_by_head, default=_all_heads)
    return jnp.swapaxes(out.reshape(batch, kv_heads, length, heads // kv_heads, width), 1, 2).reshape(q.shape)


def _all_heads(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """q [B, K, T * G, H], k and v [B, K, S, H], seen [B, T * G, S]."""
    scores = jnp.einsum("bkth,bksh->bkts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = _softmax(jnp.where(seen[:, None], scores, _HIDDEN))
    return jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), v)


def _head_by_head(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """The same. XLA's products of large batched matrices reach a third of a CPU's speed, single ones most of it."""

    def row(operands: tuple[jax.Array, ...]) -> jax.Array:
        *heads, seen = operands

        def head(operands: tuple[jax.Array, ...]) -> jax.Array:
            q, k, v = (a[None, None] for a in operands)
            return _all_heads(q, k, v, seen[None])[0, 0]

        return jax.lax.map(head, tuple(heads))

    return jax.lax.map(row, (q, k, v, seen))


def _tile_by_tile(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """The same, some keys at a time and none behind the last that is seen; the softmax is put together as they come."""
    last = jnp.max(jnp.where(seen, jnp.arange(k.shape[2]), -1))

    def one(i: jax.Array, so_far: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        out, largest, total = so_far
        keys, values = (jax.lax.dynamic_slice_in_dim(a, i * _TILE, _TILE, axis=2) for a in (k, v))
        own = jax.lax.dynamic_slice_in_dim(seen, i * _TILE, _TILE, axis=2)
        scores = jnp.einsum("bkth,bksh->bkts", q, keys, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        scores = jnp.where(own[:, None], scores, _HIDDEN)
        larger = jnp.maximum(largest, jnp.max(scores, axis=-1))
        weights, kept = jnp.exp(scores - larger[..., None]), jnp.exp(largest - larger)
        more = jnp.einsum("bkts,bksh->bkth", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
        return out * kept[..., None] + more, larger, total * kept + jnp.sum(weights, axis=-1)

    begin = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:-1], _HIDDEN), jnp.zeros(q.shape[:-1])
    out, _, total = jax.lax.fori_loop(0, last // _TILE + 1, one, begin)
    return (out / jnp.maximum(total, 1e-30)[..., None]).astype(v.dtype)


def _softmax(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1)


class SelfAttention(nn.Module):
    """The four projections around attention; what lies between them is the caller's ``attend``."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    key_bias: bool = True
    out_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Any]:
        """Returns the result and whatever else ``attend(q, k, v)`` returned, such as a cache."""
        kw = dtypes(self)
        many, few = (self.heads, self.head_dim), (self.kv_heads, self.head_dim)
        q = Linear((self.width,), many, ("embed", "heads", "head_dim"), name="query", **kw)(x)
        k = Linear((self.width,), few, ("embed", "kv_heads", "head_dim"), use_bias=self.key_bias, name="key", **kw)(x)
        v = Linear((self.width,), few, ("embed", "kv_heads", "head_dim"), name="value", **kw)(x)
        y, state = attend(q, k, v)
        axes = ("heads", "head_dim", "embed")
        return Linear(many, (self.width,), axes, use_bias=self.out_bias, name="out", **kw)(y), state
