"""Attention: one function with a description of what sees what, and the projections around it.

Letters: B batch, T queries, S keys, N query heads, K key heads, G queries of a key head (N / K), H width of a head,
D width of the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

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
from omni_jax.layers.quantized import QuantizedRows
from omni_jax.layers.splash import kernel_fits, splash_attention
from omni_jax.sharding import axes_of

_MASKED = -1e30  # finite, so that a query that sees nothing gives a number and not NaN
_MAX_LOGITS = 2**26  # float32 logits held at a time, 256 MiB; more are computed piece by piece
_CAUSAL_PIECE = 256  # queries a piece where half of the logits would be masked away
_TILE = 512  # keys at a time where all logits would be too many
_HEAD_BY_HEAD = 2**16  # queries x keys, from where on a CPU does better with one head at a time

Rows: TypeAlias = Array | QuantizedRows  # keys or values, in the layout of a cache: [B, K, S, H]


@struct.dataclass
class Mask:
    """What sees what: positions see each other only within a segment, and if ``causal`` only those before."""

    segments: Int[Array, "B S"]  # 0: padding
    causal: bool = struct.field(pytree_node=False, default=False)


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], mask: Mask
) -> Float[jax.Array, "B T N H"]:
    """Attention of a sequence to itself, scaled by 1 / sqrt(H), softmax in float32.

    On a TPU a Pallas kernel computes it where the sizes allow; which of the two it is, is decided when the program is
    compiled. Elsewhere long sequences are computed in pieces of queries, so that no more than 256 MiB of logits exist
    at a time; causal pieces read only the keys up to their own end.
    """
    arrays = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(mask.segments)
    plain = functools.partial(_attend_by_device, causal=mask.causal)
    # known while tracing: the kernel takes whole blocks of queries on each device
    if not kernel_fits(q, mask.causal):
        return plain(*arrays)
    kernel = functools.partial(splash_attention, causal=mask.causal)
    # decided when the program is lowered, so that a CPU host can compile the TPU's program
    return jax.lax.platform_dependent(*arrays, tpu=kernel, default=plain)


def _attend_by_device(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, causal: bool) -> jax.Array:
    """``_attend_bounded`` on each device's rows and heads: pieces of all rows together would be those of no device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _attend_bounded(q, k, v, Mask(segments, causal))
    rows = axes_of("batch", q.shape[0])
    # query heads are spread as key heads are, so that a device has the keys of all its queries
    spec = PartitionSpec(rows, None, axes_of("kv_heads", k.shape[2]), None)

    def attend_local(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return _attend_bounded(q, k, v, Mask(segments, causal))

    specs = (spec, spec, spec, PartitionSpec(rows, None))
    mapped = jax.shard_map(attend_local, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return mapped(q, k, v, segments)


def _attend_bounded(q: Array, k: Array, v: Array, mask: Mask) -> jax.Array:
    """Attention in pieces of which no more than ``_MAX_LOGITS`` logits exist at a time."""
    batch, length, heads, _ = q.shape
    # rows are taken apart first, then queries; what is small enough is computed at once
    logits_per_row = heads * length * length
    if batch > 1 and batch * logits_per_row > _MAX_LOGITS:
        # all rows together are too many: some rows at a time
        return _attend_by_rows(q, k, v, mask, rows_at_once=max(1, _MAX_LOGITS // logits_per_row))
    if mask.causal and _CAUSAL_PIECE < length <= 8 * _CAUSAL_PIECE:
        # pieces of different lengths are unrolled in the program, so there are 8 of them at most
        begins = range(0, length, _CAUSAL_PIECE)
        return jnp.concatenate([_attend_causal_piece(q, k, v, mask, begin) for begin in begins], axis=1)
    if logits_per_row > _MAX_LOGITS:
        # one row alone is too many: pieces of its queries, in a loop
        return _attend_by_pieces(q, k, v, mask)
    return _attend_visible(q, k, v, _visible_keys(mask, jnp.arange(length), length))


def _attend_by_rows(q: Array, k: Array, v: Array, mask: Mask, rows_at_once: int) -> jax.Array:
    def attend_row(row: tuple[jax.Array, ...]) -> jax.Array:
        # a batch of one row again
        q, k, v, segments = (a[None] for a in row)
        return _attend_bounded(q, k, v, Mask(segments, mask.causal))[0]

    return jax.lax.map(attend_row, (q, k, v, mask.segments), batch_size=rows_at_once)


def _attend_causal_piece(q: Array, k: Array, v: Array, mask: Mask, begin: int) -> jax.Array:
    """The queries from ``begin`` on, to the keys up to the last of them."""
    end = min(begin + _CAUSAL_PIECE, q.shape[1])
    visible = _visible_keys(mask, jnp.arange(begin, end), end)
    return _attend_visible(q[:, begin:end], k[:, :end], v[:, :end], visible)


def _attend_by_pieces(q: Array, k: Array, v: Array, mask: Mask) -> jax.Array:
    """The fewest pieces of queries that divide the length and whose logits are not too many."""
    batch, length, heads, width = q.shape
    # a loop has one shape, so all pieces are equally long
    pieces = next(n for n in range(1, length + 1) if length % n == 0 and heads * length**2 <= n * _MAX_LOGITS)

    def attend_piece(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        queries, positions = piece
        return _attend_visible(queries, k, v, _visible_keys(mask, positions, length))

    split = jnp.moveaxis(q.reshape(batch, pieces, length // pieces, heads, width), 1, 0)  # [pieces, B, T, N, H]
    out = jax.lax.map(attend_piece, (split, jnp.arange(length).reshape(pieces, -1)))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape)


def _visible_keys(mask: Mask, queries: jax.Array, num_keys: int) -> Bool[jax.Array, "B T S"]:
    """Whether the query at each of the positions ``queries`` sees each of the first ``num_keys`` keys."""
    of_queries = jnp.take(mask.segments, queries, axis=1)  # [B, T]
    of_keys = mask.segments[:, :num_keys]  # [B, S]
    visible = of_queries[:, :, None] == of_keys[:, None, :]  # [B, T, S]
    if mask.causal:
        visible = visible & (jnp.arange(num_keys) <= queries[:, None])
    return visible


def _attend_visible(q: Array, k: Array, v: Array, visible: jax.Array) -> jax.Array:
    return cached_attention(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), visible)


def cached_attention(
    q: Float[Array, "B T N H"], k: Rows, v: Rows, visible: Bool[Array, "B T S"]
) -> Float[jax.Array, "B T N H"]:
    """Attention of some positions to keys in the layout of a cache; ``visible`` says which of them each query sees."""
    batch, length, heads, width = q.shape
    num_kv_heads, num_keys = _values(k).shape[1:3]
    group = heads // num_kv_heads
    # the queries of a key head become one axis, so that its keys are read once for all of them
    grouped = jnp.asarray(q).reshape(batch, length, num_kv_heads, group, width)  # [B, T, K, G, H]
    grouped = jnp.swapaxes(grouped, 1, 2).reshape(batch, num_kv_heads, -1, width)  # [B, K, T * G, H]
    k, v = jax.tree.map(jnp.asarray, (k, v))
    operands = (grouped, k, v, jnp.repeat(visible, group, axis=1))
    if length * num_keys < _HEAD_BY_HEAD or length == 1:
        # few logits, or a single decoded position: one product for all heads, on any device
        out = _attend_all_heads(*operands)
    elif batch * heads * length * num_keys > _MAX_LOGITS and not num_keys % _TILE:
        # too many logits to exist at a time, and keys that are whole tiles
        out = jax.lax.platform_dependent(*operands, cpu=_attend_head_by_head, default=_attend_tile_by_tile)
    else:
        out = jax.lax.platform_dependent(*operands, cpu=_attend_head_by_head, default=_attend_all_heads)
    out = out.reshape(batch, num_kv_heads, length, group, width)  # [B, K, T, G, H]
    return jnp.swapaxes(out, 1, 2).reshape(q.shape)


def _values(rows: Rows) -> jax.Array:
    return jnp.asarray(rows.values if isinstance(rows, QuantizedRows) else rows)


def _scales(rows: Rows) -> jax.Array | float:
    """What a product with the values of each row is multiplied by: [B, K, 1, S], or 1 if they are no whole numbers."""
    return jnp.swapaxes(rows.scale, -1, -2) if isinstance(rows, QuantizedRows) else 1.0


def _multiply_keys(
    q: Float[jax.Array, "B K TG H"], k: Rows, visible: Bool[jax.Array, "B TG S"]
) -> Float[jax.Array, "B K TG S"]:
    """Logits, in float32."""
    products = jnp.einsum("bkth,bksh->bkts", q, _values(k).astype(q.dtype), preferred_element_type=jnp.float32)
    return jnp.where(visible[:, None], products * (q.shape[-1] ** -0.5 * _scales(k)), _MASKED)


def _multiply_values(
    weights: Float[jax.Array, "B K TG S"], v: Rows, dtype: Dtype, out_dtype: Dtype
) -> Float[jax.Array, "B K TG H"]:
    """The sums of values, weighted. Only here are weights cast to the narrower dtype."""
    weights = (weights * _scales(v)).astype(dtype)
    return jnp.einsum("bkts,bksh->bkth", weights, _values(v).astype(dtype), preferred_element_type=out_dtype)


def _attend_all_heads(q: jax.Array, k: Rows, v: Rows, visible: jax.Array) -> Float[jax.Array, "B K TG H"]:
    """``q`` is [B, K, T * G, H] and ``visible`` [B, T * G, S], here and in the two functions after it."""
    weights = jax.nn.softmax(_multiply_keys(q, k, visible), axis=-1)  # [B, K, T * G, S]
    return _multiply_values(weights, v, q.dtype, q.dtype)


def _attend_head_by_head(q: jax.Array, k: Rows, v: Rows, visible: jax.Array) -> jax.Array:
    """The same. XLA's products of large batched matrices reach a third of a CPU's speed, single ones most of it."""

    def attend_row(operands: tuple[Any, ...]) -> jax.Array:
        *heads, visible = operands

        def attend_head(operands: tuple[Any, ...]) -> jax.Array:
            q, k, v = jax.tree.map(lambda a: a[None, None], operands)  # [1, 1, T * G or S, H]
            return _attend_all_heads(q, k, v, visible[None])[0, 0]

        return jax.lax.map(attend_head, tuple(heads))

    return jax.lax.map(attend_row, (q, k, v, visible))


def _attend_tile_by_tile(q: jax.Array, k: Rows, v: Rows, visible: jax.Array) -> jax.Array:
    """The same, some keys at a time and none behind the last that is visible, with a running softmax."""
    # most of a long cache may be empty: tiles behind the last visible key are skipped
    last = jnp.max(jnp.where(visible, jnp.arange(visible.shape[-1]), -1))

    def add_tile(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # the sums are relative to the largest logit so far, and are scaled anew when a larger one comes
        out, largest, total = carry
        keys, values, tile_visible = jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, i * _TILE, _TILE, axis=2), (k, v, visible)
        )  # [B, K, tile, H] and [B, T * G, tile]
        logits = _multiply_keys(q, keys, tile_visible)  # [B, K, T * G, tile]
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))  # [B, K, T * G]
        weights = jnp.exp(logits - new_largest[..., None])  # [B, K, T * G, tile]
        rescale = jnp.exp(largest - new_largest)  # of what was summed below a smaller maximum
        more = _multiply_values(weights, values, q.dtype, jnp.float32)  # [B, K, T * G, H]
        return out * rescale[..., None] + more, new_largest, total * rescale + jnp.sum(weights, axis=-1)

    initial = (
        jnp.zeros(q.shape, jnp.float32),  # [B, K, T * G, H]
        jnp.full(q.shape[:-1], _MASKED),  # [B, K, T * G]
        jnp.zeros(q.shape[:-1]),
    )
    out, _, total = jax.lax.fori_loop(0, last // _TILE + 1, add_tile, initial)
    # nothing visible, no tile: the total is 0 then
    return (out / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)


class SelfAttention(nn.Module):
    """The four projections around attention; what lies between them is the caller's ``attend``."""

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    key_bias: bool = True
    out_bias: bool = True
    bias_std: float = 0.0  # that the entries of biases of queries and keys begin with
    out_gain: float = 1.0  # how large initial results are, in terms of what heads give
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Any]:
        """Returns the result and whatever else ``attend(q, k, v)`` returned, such as a cache."""
        kw = dtypes(self)
        # heads are an axis of each kernel, so that they can be sharded by name
        heads = (self.heads, self.head_dim)
        kv_heads = (self.kv_heads, self.head_dim)
        kv_axes = ("embed", "kv_heads", "head_dim")
        biased = dict(kw, bias_std=self.bias_std)
        q = Linear((self.width,), heads, ("embed", "heads", "head_dim"), name="query", **biased)(x)  # [..., T, N, H]
        k = Linear((self.width,), kv_heads, kv_axes, use_bias=self.key_bias, name="key", **biased)(x)  # [..., T, K, H]
        v = Linear((self.width,), kv_heads, kv_axes, name="value", **kw)(x)
        y, state = attend(q, k, v)
        out_axes = ("heads", "head_dim", "embed")
        out = Linear(heads, (self.width,), out_axes, use_bias=self.out_bias, gain=self.out_gain, name="out", **kw)
        return out(y), state  # [..., T, D]
