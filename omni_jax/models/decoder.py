"""The decoder that the Thinker and the Talker share: Qwen2 layers with grouped queries, TMRoPE and a cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DecoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention, cached_attention
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GatedMLP
from omni_jax.layers.norm import RMSNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.rotary import Tables, rotate, tmrope_tables
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.layers.streaming import Block, Streaming
from omni_jax.sharding import constrain, replicate


@struct.dataclass
class KVCache:
    """Keys and values of every layer, in slots; slot i holds the i-th position of the row.

    ``k`` and ``v`` are [L, B, K, slots, H] for scanned layers, or a tuple of L arrays [B, K, slots, H].
    """

    k: Any
    v: Any
    end: Int[Array, " B"]  # positions that each row holds; its next one goes to this slot

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, stacked: bool, dtype: Dtype) -> KVCache:
        """A cache with room for ``slots`` positions of ``batch`` rows."""
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        layers = config.num_hidden_layers

        def one() -> Any:
            if stacked:
                return jnp.zeros((layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

        return cls(one(), one(), replicate(jnp.zeros(batch, jnp.int32))).spread()

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-2]

    def grown(self, slots: int) -> KVCache:
        """The same with room for ``slots`` positions."""

        def more(cache: Array) -> jax.Array:
            return jnp.pad(cache, [*[(0, 0)] * (cache.ndim - 2), (0, slots - cache.shape[-2]), (0, 0)])

        return dataclasses.replace(self, k=jax.tree.map(more, self.k), v=jax.tree.map(more, self.v)).spread()

    def put(self, row: Int[Array, ""], other: KVCache) -> KVCache:
        """The first row of ``other``, which has as many slots, in place of a row of this one."""

        def one(mine: Array, theirs: Array) -> jax.Array:
            axis = jnp.ndim(mine) - 4
            first = jax.lax.slice_in_dim(theirs, 0, 1, axis=axis)
            return jax.lax.dynamic_update_slice_in_dim(jnp.asarray(mine), first, row, axis)

        end = jnp.asarray(self.end).at[row].set(jnp.asarray(other.end)[0])
        return KVCache(jax.tree.map(one, self.k, other.k), jax.tree.map(one, self.v, other.v), replicate(end)).spread()

    def spread(self) -> KVCache:
        """The same, laid over the mesh as the layers' own keys and values are."""

        def one(cache: Array) -> jax.Array:
            return constrain(jnp.asarray(cache), *[None] * (cache.ndim - 4), "batch", "kv_heads", None, None)

        return dataclasses.replace(self, k=jax.tree.map(one, self.k), v=jax.tree.map(one, self.v))

    def write(self, layer: int | jax.Array, k: Array, v: Array, slot: Int[Array, "B C"]) -> KVCache:
        """Writes positions of a layer to their slots; k and v are [B, C, K, H]. What has no such slot is not written.

        It is a scatter a row: the form that XLA does in place whatever the layout of the cache (docs/architecture.md).
        """
        rows = jnp.arange(k.shape[0])[:, None]

        def put(cache: Any, new: Array) -> Any:
            if isinstance(cache, tuple):
                return _replaced(cache, layer, cache[layer].at[rows, :, slot].set(new, mode="drop"))
            return cache.at[layer, rows, :, slot].set(new, mode="drop")

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))


def _replaced(items: tuple, index: Any, value: Any) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


@struct.dataclass
class Places:
    """Where positions that follow a cache go, and what they see of it."""

    slot: Int[Array, "B C"]  # beyond the cache's slots for a position that holds nothing
    last: Int[Array, "B C"]  # the last slot that each sees


@struct.dataclass
class _Carry:
    x: jax.Array
    cache: KVCache | None


class DecoderLayer(nn.Module):
    """One pre-norm layer. With a mask it reads a whole sequence, with places what follows a cache."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, carry: _Carry, index: int | jax.Array, rope: Tables, where: Mask | Places
    ) -> tuple[_Carry, None]:
        c, kw = self.config, dtypes(self)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache | None]:
            q, k, cache = rotate(q, rope), rotate(k, rope), carry.cache
            if isinstance(where, Mask):
                return attention(q, k, v, where), cache
            assert cache is not None
            cache = cache.write(index, k, v, where.slot)
            visible = jnp.arange(cache.slots) <= where.last[..., None]
            return cached_attention(q, cache.k[index], cache.v[index], visible), cache

        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        y = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype, name="attention_norm")(carry.x)
        y, cache = SelfAttention(c.hidden_size, *heads, out_bias=False, name="attention", **kw)(y, attend)
        x = constrain(carry.x + y, "batch", "sequence", "width")
        y = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype, name="mlp_norm")(x)
        x = x + GatedMLP(c.hidden_size, c.intermediate_size, False, name="mlp", **kw)(y)
        return _Carry(constrain(x, "batch", "sequence", "width"), cache), None


class Decoder(nn.Module):
    """Word embeddings, layers, last norm and head; each is a method, so that a caller may put media between them."""

    config: DecoderConfig
    input_width: int | None = None  # of the embeddings, where it is not hidden_size
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        self.embed = Embedding(c.vocab_size, self.input_width or c.hidden_size, **kw)
        self.layers = layer_stack(
            DecoderLayer, dict(config=c, **kw), c.num_hidden_layers, self.scan_layers, shared=2, remat=self.remat
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype)
        self.head = Linear((c.hidden_size,), (c.vocab_size,), ("embed", "vocab"), use_bias=False, **kw)

    def __call__(self, x: Float[Array, "B S D"], ids: Int[Array, "3 B S"], mask: Mask) -> Float[jax.Array, "B S D"]:
        """Embeddings of whole sequences to hidden states after the last norm."""
        return self._run(x, ids, mask, None).x

    def extend(
        self, x: Float[Array, "B C D"], ids: Int[Array, "3 B C"], valid: Bool[Array, "B C"], cache: KVCache
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Reads more positions of every row behind those that the cache holds.

        Args:
          x: their embeddings.
          ids: their position ids.
          valid: which are real; those of a row come first. A row with none stands still.
          cache: with room for them.

        Returns:
          Their hidden states after the last norm, those of padding without meaning, and the cache with them in it.
        """
        valid = jnp.asarray(valid)
        last = jnp.asarray(cache.end)[:, None] + jnp.arange(x.shape[1])
        places = Places(jnp.where(valid, last, cache.slots), last)
        carry = self._run(jnp.where(valid[..., None], x, 0), ids, places, cache)
        assert carry.cache is not None
        end = cache.end + jnp.sum(valid, axis=1, dtype=jnp.int32)
        return carry.x, dataclasses.replace(carry.cache.spread(), end=replicate(end))

    def _run(self, x: Array, ids: Array, where: Mask | Places, cache: KVCache | None) -> _Carry:
        c = self.config
        rope = tmrope_tables(ids, c.rope_scaling.mrope_section, c.rope_theta)
        carry = _Carry(constrain(jnp.asarray(x, self.dtype), "batch", "sequence", "width"), cache)
        carry = call_layers(self.layers, c.num_hidden_layers, carry, rope, where)
        return _Carry(self.norm(carry.x), carry.cache)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[jax.Array, "*rows V"]:
        """Scores of the next word, in float32."""
        return self.head(hidden).astype(jnp.float32)


@struct.dataclass
class Positions:
    """The input units of a decoder: embeddings and their position ids."""

    x: Float[Array, "B T D"]
    ids: Int[Array, "B T 3"]


@dataclass(frozen=True)
class DecoderStream:
    """A decoder as a part that streams: from ``Positions`` to hidden states after the last norm.

    Its state is the cache. A row's positions come first in each block.

    Attributes:
      model: the decoder.
      seconds: that a position stands for.
      slots: positions of a row that there is room for.
    """

    model: Decoder
    seconds: float
    slots: int

    @property
    def streaming(self) -> Streaming:
        return Streaming(self.seconds, block=1, look_ahead=0, look_back=None)

    def whole(self, params: Any, x: Block) -> Block:
        valid = jnp.asarray(x.valid)
        mask = Mask(valid.astype(jnp.int32), causal=True)
        embeddings = jnp.where(valid[..., None], x.values.x, 0)
        return Block(self.model.apply({"params": params}, embeddings, _axes_first(x.values.ids), mask), valid)

    def init_state(self, batch: int) -> KVCache:
        return KVCache.empty(self.model.config, batch, self.slots, self.model.scan_layers, self.model.dtype)

    def step(
        self, params: Any, state: KVCache, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, KVCache]:
        valid = jnp.asarray(block.valid) if active is None else block.valid & jnp.asarray(active)[:, None]
        operands = (block.values.x, _axes_first(block.values.ids), valid, state)
        made: Any = self.model.apply({"params": params}, *operands, method="extend")
        hidden, cache = made
        return Block(hidden, valid), cache


def _axes_first(ids: Int[Array, "B T 3"]) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(ids), 2, 0)
