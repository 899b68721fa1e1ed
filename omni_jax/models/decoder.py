"""The decoder that the Thinker and the Talker share: Qwen2 layers with grouped queries, TMRoPE and a cache.

Letters: B rows of a batch or slots of a cache, S positions of a sequence, C positions of a chunk, D width, L layers,
N query heads, K key heads, H width of a head, V size of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DecoderConfig
from omni_jax.layers.attention import Mask, Rows, SelfAttention, attention, cached_attention
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GatedMLP
from omni_jax.layers.norm import RMSNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.quantized import QuantizedRows, quantize_rows
from omni_jax.layers.rotary import Tables, rotate, tmrope_tables
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.sharding import constrain, replicate

# [L, B, K, capacity, H] where layers are scanned; else L arrays [B, K, capacity, H]; arrays may be quantised
LayerArrays: TypeAlias = jax.Array | QuantizedRows | tuple[jax.Array | QuantizedRows, ...]


@struct.dataclass
class KVCache:
    """Keys and values of every layer for some slots; index i of a slot holds its i-th position."""

    # heads before positions: the products of attention need no transposition then
    k: LayerArrays
    v: LayerArrays
    lengths: Int[Array, " B"]  # positions that each slot holds; its next one is written at this index

    @classmethod
    def init(cls, config: DecoderConfig, num_slots: int, capacity: int, stacked: bool, dtype: Dtype) -> KVCache:
        """An empty cache.

        Args:
          config: sizes of the decoder.
          num_slots: B.
          capacity: positions that a slot has room for.
          stacked: whether the decoder's layers are scanned.
          dtype: of keys and values; int8: they are quantised, with a scale for each position and head.
        """
        shape = (num_slots, config.num_key_value_heads, capacity, config.head_dim)

        def init_rows(*shape: int) -> jax.Array | QuantizedRows:
            values = jnp.zeros(shape, dtype)
            if dtype == jnp.int8:
                return QuantizedRows(values, jnp.zeros((*shape[:-1], 1), jnp.float32))
            return values

        def init_arrays() -> LayerArrays:
            if stacked:
                return init_rows(config.num_hidden_layers, *shape)
            return tuple(init_rows(*shape) for _ in range(config.num_hidden_layers))

        lengths = replicate(jnp.zeros(num_slots, jnp.int32))
        return cls(init_arrays(), init_arrays(), lengths).constrain()

    @property
    def capacity(self) -> int:
        """Positions that a slot has room for."""
        return jax.tree.leaves(self.k)[0].shape[-2]

    def resize(self, capacity: int) -> KVCache:
        """The same with room for ``capacity`` positions a slot, which are not fewer than before."""

        def pad_capacity(array: jax.Array) -> jax.Array:
            # the positions, in either layout
            widths = [(0, 0)] * array.ndim
            widths[-2] = (0, capacity - array.shape[-2])
            return jnp.pad(array, widths)

        k = jax.tree.map(pad_capacity, self.k)
        v = jax.tree.map(pad_capacity, self.v)
        return dataclasses.replace(self, k=k, v=v).constrain()

    def insert(self, slot: Int[Array, ""], other: KVCache) -> KVCache:
        """Slot 0 of ``other``, which has the same capacity, in place of slot ``slot`` of this one."""

        def update_slot(target: jax.Array, source: jax.Array) -> jax.Array:
            # the axis of slots, behind that of layers if there is one
            axis = target.ndim - 4
            first = jax.lax.slice_in_dim(source, 0, 1, axis=axis)
            return jax.lax.dynamic_update_slice_in_dim(jnp.asarray(target), first, slot, axis)

        k = jax.tree.map(update_slot, self.k, other.k)
        v = jax.tree.map(update_slot, self.v, other.v)
        lengths = jnp.asarray(self.lengths).at[slot].set(jnp.asarray(other.lengths)[0])
        return KVCache(k, v, replicate(lengths)).constrain()

    def constrain(self) -> KVCache:
        """The same, laid over the mesh as the layers' own keys and values are."""

        def constrain_array(array: jax.Array) -> jax.Array:
            leading = [None] * (array.ndim - 4)
            return constrain(jnp.asarray(array), *leading, "batch", "kv_heads", None, None)

        k = jax.tree.map(constrain_array, self.k)
        v = jax.tree.map(constrain_array, self.v)
        return dataclasses.replace(self, k=k, v=v)

    def copy_slot(self, source: Int[Array, ""], target: Int[Array, ""]) -> KVCache:
        """Keys and values of slot ``source`` in slot ``target`` too; lengths stay."""

        def copy_array(array: jax.Array) -> jax.Array:
            # the axis of slots, behind that of layers if there is one
            axis = array.ndim - 4
            slot = jax.lax.dynamic_slice_in_dim(jnp.asarray(array), source, 1, axis)
            return jax.lax.dynamic_update_slice_in_dim(jnp.asarray(array), slot, target, axis)

        k = jax.tree.map(copy_array, self.k)
        v = jax.tree.map(copy_array, self.v)
        return dataclasses.replace(self, k=k, v=v).constrain()

    def read(self, layer: int | jax.Array, slot: Int[Array, " R"] | None) -> tuple[Rows, Rows]:
        """Keys and values of a layer, [R, K, capacity, H], of these slots; of every slot if None."""

        def read_stacked(array: jax.Array) -> jax.Array:
            if slot is None:
                return array[layer]
            # a slice for each: for a gather, compilers for TPUs bring the cache of all slots into another layout
            slices = []
            for i in range(len(slot)):
                place = (layer, slot[i], 0, 0, 0)
                slices.append(jax.lax.dynamic_slice(array, place, (1, 1, *array.shape[2:]))[0])
            return jnp.concatenate(slices)

        def read_arrays(arrays: LayerArrays) -> Rows:
            if not isinstance(arrays, tuple):
                return jax.tree.map(read_stacked, arrays)
            assert isinstance(layer, int)
            return arrays[layer] if slot is None else jax.tree.map(lambda array: array[slot], arrays[layer])

        return read_arrays(self.k), read_arrays(self.v)

    def write(self, layer: int | jax.Array, k: Array, v: Array, positions: CachePositions) -> KVCache:
        """Writes the keys and values of some positions of one layer.

        Args:
          layer: a Python int where the layers are not stacked.
          k, v: [B, C, K, H].
          positions: where each belongs; one beyond the capacity is not written.
        """
        slots = jnp.arange(k.shape[0]) if positions.slot is None else jnp.asarray(positions.slot)
        slots = slots[:, None]  # [B, 1]
        index = positions.index  # [B, C]

        # a scatter a slot is the form that XLA does in place whatever the layout of the cache (docs/architecture.md)
        def scatter_positions(array: jax.Array, new: jax.Array) -> jax.Array:
            return array.at[slots, :, index].set(new, mode="drop")

        def scatter_stacked(array: jax.Array, new: jax.Array) -> jax.Array:
            return array.at[layer, slots, :, index].set(new, mode="drop")

        def write_arrays(arrays: LayerArrays, new: Array) -> LayerArrays:
            is_quantized = isinstance(arrays[0] if isinstance(arrays, tuple) else arrays, QuantizedRows)
            rows = quantize_rows(new) if is_quantized else new
            if not isinstance(arrays, tuple):
                return jax.tree.map(scatter_stacked, arrays, rows)
            assert isinstance(layer, int)
            # a layer's arrays are its own here, and the others pass unchanged
            updated = jax.tree.map(scatter_positions, arrays[layer], rows)
            return (*arrays[:layer], updated, *arrays[layer + 1 :])

        return dataclasses.replace(self, k=write_arrays(self.k, k), v=write_arrays(self.v, v))


@struct.dataclass
class CachePositions:
    """Where the positions of a chunk go in a cache, and what they see of it."""

    index: Int[Array, "B C"]  # the capacity, which is beyond every slot, for padding
    last_visible: Int[Array, "B C"]  # a position sees the indices up to this one, its own
    slot: Int[Array, " B"] | None = None  # of each row of the chunk; None: row i is of slot i, for every slot


@struct.dataclass
class _Carry:
    """What goes from layer to layer."""

    x: Float[jax.Array, "B S D"]
    cache: KVCache | None


# that the entries of biases of queries and keys begin with. Rotated, they make each head prefer some distances from the
# first step. From biases of 0 it takes many steps until one looks at the previous token: their product begins at 0
_BIAS_STD = 2.0


class DecoderLayer(nn.Module):
    """One pre-norm layer (reference ``Qwen2_5OmniDecoderLayer``; docs/reference.md, 6).

    With a ``Mask`` it takes whole sequences, with ``CachePositions`` a chunk that follows the cache of its carry.
    """

    config: DecoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, carry: _Carry, index: int | jax.Array, rope: Tables, visible: Mask | CachePositions
    ) -> tuple[_Carry, None]:
        c = self.config
        kw = dtypes(self)
        # both parts of all layers together then begin by adding about as much as one (GPT-2, section 2.3)
        gain = (2 * c.num_hidden_layers) ** -0.5

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KVCache | None]:
            # keys are cached after the rotation, so a position is rotated once
            q = rotate(q, rope)  # [B, S, N, H]
            k = rotate(k, rope)  # [B, S, K, H]
            # whole sequences use no cache
            if isinstance(visible, Mask):
                return attention(q, k, v, visible), carry.cache
            assert carry.cache is not None
            return _attend_to_cache(q, k, v, index, visible, carry.cache)

        with jax.named_scope("decoder_attention"):
            y = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype, name="attention_norm")(carry.x)
            heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
            initial = dict(bias_std=_BIAS_STD, out_gain=gain)
            project = SelfAttention(c.hidden_size, *heads, out_bias=False, name="attention", **initial, **kw)
            y, cache = project(y, attend)
            x = constrain(carry.x + y, "batch", "sequence", "width")  # [B, S, D]
        with jax.named_scope("decoder_mlp"):
            y = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype, name="mlp_norm")(x)
            x = x + GatedMLP(c.hidden_size, c.intermediate_size, False, out_gain=gain, name="mlp", **kw)(y)
            x = constrain(x, "batch", "sequence", "width")  # [B, S, D]
        return _Carry(x, cache), None


def _attend_to_cache(
    q: Float[Array, "B C N H"],
    k: Float[Array, "B C K H"],
    v: Float[Array, "B C K H"],
    layer: int | jax.Array,
    positions: CachePositions,
    cache: KVCache,
) -> tuple[Float[jax.Array, "B C N H"], KVCache]:
    """Writes a chunk's keys and values, then attends to all that the cache holds of the layer."""
    # written before it is read: positions of a chunk see each other and themselves
    cache = cache.write(layer, k, v, positions)
    # a slot's positions lie in order, so one index bounds what a query sees
    visible = jnp.arange(cache.capacity) <= positions.last_visible[..., None]  # [B, C, capacity]
    return cached_attention(q, *cache.read(layer, positions.slot), visible), cache


class Decoder(nn.Module):
    """Token embeddings, layers, last norm and head; each is a method, so that media may come between them."""

    config: DecoderConfig
    input_width: int | None = None  # of the embeddings, where it is not hidden_size
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        self.embed = Embedding(c.vocab_size, self.input_width or c.hidden_size, **kw)
        self.layers = layer_stack(
            DecoderLayer, dict(config=c, **kw), c.num_hidden_layers, self.scan_layers, shared=2, remat=self.remat
        )
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, self.param_dtype)
        self.head = Linear((c.hidden_size,), (c.vocab_size,), ("embed", "vocab"), use_bias=False, **kw)

    def __call__(self, x: Float[Array, "B S D"], ids: Int[Array, "3 B S"], mask: Mask) -> Float[jax.Array, "B S D"]:
        """Hidden states after the last norm, of whole sequences.

        Args:
          x: embeddings.
          ids: position ids: time, height and width.
          mask: which positions see each other.
        """
        return self._apply_layers(x, ids, mask, None).x

    def extend(
        self, x: Float[Array, "B C D"], ids: Int[Array, "3 B C"], valid: Bool[Array, "B C"], cache: KVCache
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Appends a chunk of positions to what each slot of the cache holds.

        Args:
          x: embeddings.
          ids: position ids: time, height and width.
          valid: which positions are real; those of a slot come first. A slot with none is left as it is.
          cache: with room for them.

        Returns:
          Hidden states after the last norm, those of padding without meaning, and the cache with the chunk in it.
        """
        valid = jnp.asarray(valid)
        index = jnp.asarray(cache.lengths)[:, None] + jnp.arange(x.shape[1])  # [B, C]
        # the index of padding lies beyond every slot, and ``KVCache.write`` drops it
        positions = CachePositions(jnp.where(valid, index, cache.capacity), index)
        # padding may hold anything, NaN included
        x = jnp.where(valid[..., None], x, 0)  # [B, C, D]
        carry = self._apply_layers(x, ids, positions, cache)
        assert carry.cache is not None
        # only now: all layers write at the lengths from before the chunk
        lengths = cache.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)  # [B]
        return carry.x, dataclasses.replace(carry.cache.constrain(), lengths=replicate(lengths))

    def extend_slots(
        self,
        x: Float[Array, "R C D"],
        ids: Int[Array, "3 R C"],
        valid: Bool[Array, "R C"],
        slot: Int[Array, " R"],
        start: Int[Array, " R"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "R C D"], KVCache]:
        """Appends blocks of positions to some slots of the cache, several of them maybe to one slot.

        Args:
          x: embeddings.
          ids: position ids: time, height and width.
          valid: which positions are real; those of a block come first. A block may have none.
          slot: of each block.
          start: index of a block's first position in its slot. The blocks of a slot follow what it holds, and each
            other, without gaps.
          cache: with room for them.

        Returns:
          As ``extend``, a row for each block.
        """
        valid = jnp.asarray(valid)
        slot = jnp.asarray(slot)
        index = jnp.asarray(start)[:, None] + jnp.arange(x.shape[1])  # [R, C]
        positions = CachePositions(jnp.where(valid, index, cache.capacity), index, slot)
        # padding may hold anything, NaN included
        x = jnp.where(valid[..., None], x, 0)  # [R, C, D]
        carry = self._apply_layers(x, ids, positions, cache)
        assert carry.cache is not None
        end = start + jnp.sum(valid, axis=1, dtype=jnp.int32)  # [R]
        # a block without positions says nothing of its slot
        end = jnp.where(jnp.any(valid, axis=1), end, 0)
        lengths = jnp.asarray(cache.lengths).at[slot].max(end)  # [B]
        return carry.x, dataclasses.replace(carry.cache.constrain(), lengths=replicate(lengths))

    def _apply_layers(self, x: Array, ids: Array, visible: Mask | CachePositions, cache: KVCache | None) -> _Carry:
        c = self.config
        with jax.named_scope("tmrope"):
            # one table for all layers
            rope = tmrope_tables(ids, c.rope_scaling.mrope_section, c.rope_theta)  # two of [B, S, H / 2]
        x = constrain(jnp.asarray(x, self.dtype), "batch", "sequence", "width")  # [B, S, D]
        carry = call_layers(self.layers, c.num_hidden_layers, _Carry(x, cache), rope, visible)
        return _Carry(self.norm(carry.x), carry.cache)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[jax.Array, "*batch V"]:
        """Logits of the next token, in float32."""
        with jax.named_scope("decoder_head"):
            return self.head(hidden).astype(jnp.float32)
