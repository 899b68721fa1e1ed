"""The decoder that the Thinker and the Talker share: Qwen2 layers with grouped queries, TMRoPE and a cache."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.config import DecoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention, decode_attention
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GatedMLP
from omni_jax.layers.norm import RMSNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.rotary import Tables, rotate, tmrope_tables
from omni_jax.layers.stack import call_layers, layer_stack
from omni_jax.sharding import constrain


@struct.dataclass
class KVCache:
    """Keys and values of every layer, in slots; slot i holds the i-th position of the row, padding included.

    ``k`` and ``v`` are [L, B, K, slots, H] for scanned layers, or a tuple of L arrays [B, K, slots, H].
    """

    k: Any
    v: Any
    begin: Int[Array, " B"]  # first slot of each row that holds a real token
    end: Int[Array, " B"]  # the slot that each row's next token goes to

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, stacked: bool, dtype: Dtype) -> KVCache:
        """A cache with room for ``slots`` positions of ``batch`` rows."""
        shape = (batch, config.num_key_value_heads, slots, config.head_dim)
        layers = config.num_hidden_layers

        def one() -> Any:
            if stacked:
                return jnp.zeros((layers, *shape), dtype)
            return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

        return cls(one(), one(), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.k)[0].shape[-2]

    def grown(self, slots: int) -> KVCache:
        """The same with room for ``slots`` positions."""

        def more(cache: Array) -> jax.Array:
            return jnp.pad(cache, [*[(0, 0)] * (cache.ndim - 2), (0, slots - cache.shape[-2]), (0, 0)])

        return dataclasses.replace(self, k=jax.tree.map(more, self.k), v=jax.tree.map(more, self.v))

    def write_prompt(self, layer: int | jax.Array, k: Array, v: Array) -> KVCache:
        """Writes the first positions of a layer; k and v are [B, S, K, H]."""

        def put(cache: Any, new: Array) -> Any:
            new = jnp.swapaxes(new, 1, 2)
            if isinstance(cache, tuple):
                return _replaced(cache, layer, jax.lax.dynamic_update_slice(cache[layer], new, (0, 0, 0, 0)))
            return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, 0, 0, 0))

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def write_token(self, layer: int | jax.Array, k: Array, v: Array) -> KVCache:
        """Writes one position of a layer at each row's ``end``; k and v are [B, 1, K, H]."""
        rows = jnp.arange(k.shape[0])

        def put(cache: Any, new: Array) -> Any:
            if isinstance(cache, tuple):
                return _replaced(cache, layer, cache[layer].at[rows, :, self.end].set(new[:, 0]))
            # a scatter a row: the form that XLA does in place whatever the layout of the cache (docs/architecture.md)
            return cache.at[layer, rows, :, self.end].set(new[:, 0])

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))


def _replaced(items: tuple, index: Any, value: Any) -> tuple:
    return (*items[:index], value, *items[index + 1 :])


MaybeCache = TypeVar("MaybeCache", KVCache, None)


@struct.dataclass
class _Carry:
    x: jax.Array
    cache: KVCache | None


class DecoderLayer(nn.Module):
    """One pre-norm layer. With ``mask`` it reads a whole sequence, without it one new token and the cache."""

    config: DecoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, carry: _Carry, index: int | jax.Array, rope: Tables, mask: Mask | None) -> tuple[_Carry, None]:
        c, kw = self.config, dtypes(self)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache | None]:
            q, k, cache = rotate(q, rope), rotate(k, rope), carry.cache
            if mask is not None:
                return attention(q, k, v, mask), cache and cache.write_prompt(index, k, v)
            assert cache is not None
            cache = cache.write_token(index, k, v)
            return decode_attention(q, cache.k[index], cache.v[index], cache.begin, cache.end + 1), cache

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
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        self.embed = Embedding(c.vocab_size, self.input_width or c.hidden_size, **kw)
        self.layers = layer_stack(DecoderLayer, dict(config=c, **kw), c.num_hidden_layers, self.scan_layers, shared=2)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype)
        self.head = Linear((c.hidden_size,), (c.vocab_size,), ("embed", "vocab"), use_bias=False, **kw)

    def __call__(
        self, x: Float[Array, "B S D"], ids: Int[Array, "3 B S"], mask: Mask | None, cache: MaybeCache
    ) -> tuple[Float[jax.Array, "B S D"], MaybeCache]:
        """Embeddings to hidden states after the last norm; fills the cache if there is one."""
        c = self.config
        rope = tmrope_tables(ids, c.rope_scaling.mrope_section, c.rope_theta)
        carry = _Carry(constrain(jnp.asarray(x, self.dtype), "batch", "sequence", "width"), cache)
        carry = call_layers(self.layers, c.num_hidden_layers, carry, rope, mask)
        return self.norm(carry.x), carry.cache

    def prefill(
        self,
        x: Float[Array, "B S D"],
        ids: Int[Array, "3 B S"],
        delta: Int[Array, " B"],
        segment_ids: Int[Array, "B S"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "B S D"], Int[jax.Array, " B"], KVCache]:
        """Reads left-padded rows into an empty cache.

        Args:
          x: the rows' embeddings.
          ids, delta: what ``omni_jax.positions.position_ids`` gave for them.
          segment_ids: 0 where there is padding.
          cache: with at least S slots.

        Returns:
          All hidden states, the position id of each row's next token, and the cache.
        """
        mask = Mask(jnp.asarray(segment_ids), causal=True)
        hidden, cache = self(x, ids, mask, cache)
        length = jnp.sum(mask.segments != 0, axis=1)
        end = jnp.full_like(length, segment_ids.shape[1])
        return hidden, length + delta, dataclasses.replace(cache, begin=end - length, end=end)

    def decode(
        self, x: Float[Array, "B D"], position: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[jax.Array, "B D"], KVCache]:
        """Reads one token of each row; returns its hidden state and the cache with the token in it."""
        ids = jnp.broadcast_to(position[None, :, None], (3, position.shape[0], 1))
        hidden, cache = self(x[:, None], ids, None, cache)
        return hidden[:, 0], dataclasses.replace(cache, end=cache.end + 1)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[jax.Array, "*rows V"]:
        """Scores of the next word, in float32."""
        return self.head(hidden).astype(jnp.float32)
