"""The transformer of Token2Wav: one evaluation of the flow's velocity (section 8; ``Qwen2_5OmniToken2WavDiTModel``).

Letters: N blocks, F frames a block, M mel bins, D width, L layers, E times.

A frame sees its block of ``block_size`` frames, and in a few layers the block before or after it. So the blocks are a
batch axis: attention is F queries by F or 2F keys, whatever the length. The blocks of all requests stand in one list,
in any order; each says where the blocks before and after it stand. No request is padded to another's length. A block
may stand there more than once, each time with other neighbours: so ``models/dit_stream.py`` solves block by block.

What an evaluation needs and does not change from one to the next is made once: the speaker's row and the codes, taken
through the first projection (``conditions``), and every layer's scales and shifts for all times (``modulations``).
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.layers.attention import SelfAttention
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GeluMLP
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import full_precision
from omni_jax.layers.stack import call_layers, layer_stack, map_layers
from omni_jax.models.speaker_encoder import SpeakerEncoder
from omni_jax.sharding import constrain

Tables: TypeAlias = tuple[jax.Array, jax.Array]

_HIDDEN = -1e30  # finite: a block of padding sees nothing and must still give a number
_TIME_FREQUENCIES = 256  # width of the sinusoid of time, in no file
_TIME_SCALE = 1000.0
_NORM_EPS = 1e-6


NO_BLOCK = -1  # in place of a neighbour


@struct.dataclass
class Past:
    """What a list hands on from one call to the next: of R streams the last block, for the first one to look back to.

    Their keys and values are a ``KeysValues``; in ``Blocks`` they count as if they stood behind the list, at N + r.
    """

    valid: Bool[Array, "R F"]
    keep: Int[Array, " R"]  # the block that the next call looks back to; N + r where stream r stands still


@struct.dataclass
class Blocks:
    """Which frames the blocks of a list hold, and which of them are neighbours."""

    index: Int[Array, " N"]  # the how manyeth block of its request; 0 for a block of padding
    valid: Bool[Array, "N F"]  # False for frames after a request's end
    before: Int[Array, " N"]  # where the block before stands in the list, or in the past; NO_BLOCK if nowhere
    after: Int[Array, " N"]
    past: Past | None = None


@struct.dataclass
class KeysValues:
    """Keys and values of R streams in the S layers that look back, for the request and for nothing."""

    keys: Float[Array, "R S 2 F heads H"]
    values: Float[Array, "R S 2 F heads H"]


@struct.dataclass
class Conditions:
    """The part of the first projection that does not depend on the noise: for the request, and for nothing."""

    given: Float[Array, "N F D"]
    null: Float[Array, "N 1 D"]


@struct.dataclass
class Modulations:
    """What time does to each layer: shift, scale, gate of the attention, then of the MLP; last a scale and a shift."""

    layers: Float[Array, "L 6 D"]
    final: Float[Array, "2 D"]


@struct.dataclass
class _Evaluation:
    """What all layers of one evaluation share."""

    modulation: Float[Array, "L 6 D"]
    blocks: Blocks
    rotary: Tables


class DiT(nn.Module):
    """Noisy mel, codes, voice and time to velocity."""

    config: DiTConfig
    scan_layers: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        width = c.hidden_size
        self.time_embed = TimeEmbedding(width, **kw)
        self.codec_embed = Embedding(c.num_embeds + 1, c.emb_dim, ("channels", "embed"), **kw)
        self.speaker_encoder = SpeakerEncoder(c, **kw)
        self.input_proj = InputProjection(c.mel_dim, c.enc_dim + c.emb_dim + c.enc_emb_dim, width, **kw)
        methods = ("__call__", "modulate")
        self.layers = layer_stack(DiTLayer, dict(config=c, **kw), c.num_hidden_layers, self.scan_layers, 1, methods)
        self.modulation = Linear((width,), (2 * width,), ("embed", "mlp"), **kw)
        self.proj = Linear((width,), (c.mel_dim,), ("embed", "channels"), **kw)

    @full_precision
    def speakers(self, ref_mel: Float[Array, "1 T M"]) -> Float[jax.Array, "2 enc_dim"]:
        """The row of a voice's clip, and that of a silent clip as long, which stands for no voice."""
        clip = jnp.asarray(ref_mel, self.dtype)
        return self.speaker_encoder(jnp.concatenate([clip, jnp.zeros_like(clip)]))

    @full_precision
    def conditions(
        self,
        codes: Int[Array, "N F"],
        speakers: Float[Array, "N 2 enc_dim"],
        cond: Float[Array, "N enc_emb_dim"],
    ) -> Conditions:
        """What is constant over the evaluations.

        Args:
          codes: the code of each frame.
          speakers: of each block's voice, from ``speakers``.
          cond: the row that each block's voice has beside its clip.
        """
        given = self._conditions(speakers[:, :1], self.codec_embed(codes), cond[:, None])
        # code 0 is a real one, and the model was trained to take it for none as well
        nothing = self.codec_embed(jnp.zeros((len(codes), 1), jnp.int32))
        return Conditions(given, self._conditions(speakers[:, 1:], nothing, jnp.zeros_like(cond)[:, None]))

    def _conditions(self, speaker: Array, codes: Array, cond: Array) -> jax.Array:
        parts = [jnp.broadcast_to(p, (*codes.shape[:2], p.shape[-1])) for p in (speaker, codes, cond)]
        return self.input_proj.constant(jnp.concatenate(parts, axis=-1))

    @full_precision
    def modulations(self, times: Float[Array, " E"]) -> Modulations:
        """The modulation at each of ``times``, on a leading axis. A layer's projection is read once for all times."""
        c = self.config
        rows = jax.nn.silu(self.time_embed(times))
        layers = map_layers(self.layers, c.num_hidden_layers, "modulate", rows)
        final = self.modulation(rows).reshape(len(rows), 2, c.hidden_size)
        return Modulations(jnp.moveaxis(layers, 0, 1), final)

    @full_precision
    def velocity(
        self,
        mel: Float[Array, "N F M"],
        conditions: Conditions,
        modulations: Modulations,
        blocks: Blocks,
        memory: KeysValues | None = None,
    ) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"], KeysValues | None]:
        """One evaluation at one time: the velocity for the request, and for nothing. Padding gives anything finite.

        Args:
          memory: of this evaluation in the call before, if ``blocks`` has a past. Last in the result is the next one.
        """
        c = self.config
        mel = jnp.where(blocks.valid[..., None], jnp.asarray(mel, self.dtype), 0)
        x = self.input_proj.variable(mel)
        x = constrain(jnp.stack([x + conditions.given, x + conditions.null]), None, "batch", None, None)
        shared = _Evaluation(modulations.layers, blocks, rotary_tables(blocks, c.head_dim, c.rope_theta))
        x, memory = call_layers(self.layers, c.num_hidden_layers, (x, memory), shared)
        scale, shift = modulations.final
        given, null = self.proj(_norm(x, scale, shift))
        return given, null, memory

    def __call__(
        self,
        mel: Float[Array, "N F M"],
        codes: Int[Array, "N F"],
        ref_mel: Float[Array, "1 T M"],
        cond: Float[Array, "1 enc_emb_dim"],
        time: Float[Array, ""],
        blocks: Blocks,
    ) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"]]:
        """``velocity`` from the beginning, for blocks of one voice."""
        modulations = jax.tree.map(lambda a: a[0], self.modulations(jnp.asarray(time)[None]))
        speakers = jnp.broadcast_to(self.speakers(ref_mel)[None], (len(codes), 2, self.config.enc_dim))
        cond = jnp.broadcast_to(jnp.asarray(cond), (len(codes), self.config.enc_emb_dim))
        given, null, _ = self.velocity(mel, self.conditions(codes, speakers, cond), modulations, blocks)
        return given, null


class DiTLayer(nn.Module):
    """Attention among blocks and an MLP, each scaled, shifted and gated by what the time says."""

    config: DiTConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        width = c.hidden_size
        self.modulation = Linear((width,), (6 * width,), ("embed", "mlp"), **kw)
        self.attention = SelfAttention(width, c.num_attention_heads, c.num_attention_heads, c.head_dim, **kw)
        self.mlp = GeluMLP(width, c.ff_mult * width, approximate=True, **kw)

    def modulate(self, carry: tuple[()], index: int | jax.Array, rows: jax.Array) -> tuple[tuple[()], jax.Array]:
        """The six rows of this layer at each time. [E, 6, D]"""
        return carry, self.modulation(rows).reshape(len(rows), 6, self.config.hidden_size)

    def __call__(
        self, carry: tuple[jax.Array, KeysValues | None], index: int | jax.Array, shared: _Evaluation
    ) -> tuple[tuple[jax.Array, KeysValues | None], None]:
        """``carry``: frames [2, N, F, D], for the request and for nothing, and the memory."""
        x, memory = carry
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = shared.modulation[index]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, KeysValues | None]:
            q, k = (rotate_first_head(a, shared.rotary) for a in (q, k))
            return attention_of_layer(self.config, index, (q, k, v), shared.blocks, memory)

        attended, memory = self.attention(_norm(x, scale_a, shift_a), attend)
        x = x + gate_a * attended
        return (x + gate_m * self.mlp(_norm(x, scale_m, shift_m)), memory), None


class TimeEmbedding(nn.Module):
    """A time between 0 and 1 to a row: sines and cosines through two linear maps. [E] to [E, width]"""

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, times: Array) -> jax.Array:
        x = jnp.asarray(time_sinusoid(times), self.dtype)
        x = Linear((_TIME_FREQUENCIES,), (self.width,), ("channels", "mlp"), name="up", **dtypes(self))(x)
        return Linear((self.width,), (self.width,), ("mlp", "embed"), name="down", **dtypes(self))(jax.nn.silu(x))


class InputProjection(nn.Module):
    """A linear map of [noisy mel, constants] in its two parts, so that the constants' is computed once."""

    noisy: int
    constants: int
    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        rows = self.noisy + self.constants
        init = nn.initializers.normal(1 / math.sqrt(rows))
        self.kernel = param(self, "kernel", init, (rows, self.width), ("channels", "embed")).astype(self.dtype)
        self.bias = param(self, "bias", nn.initializers.zeros, (self.width,), ("embed",)).astype(self.dtype)

    def variable(self, mel: jax.Array) -> jax.Array:
        return mel @ self.kernel[: self.noisy]

    def constant(self, x: jax.Array) -> jax.Array:
        return x @ self.kernel[self.noisy :] + self.bias


def attention_of_layer(
    config: DiTConfig,
    index: int | jax.Array,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    blocks: Blocks,
    memory: KeysValues | None,
) -> tuple[jax.Array, KeysValues | None]:
    """``block_attention`` with the neighbours that layer ``index`` sees; a branch each where it is a traced number.

    A layer that looks back also looks into the memory, and leaves there what the next call will look back to.
    """
    kinds = [(i in config.look_backward_layers, i in config.look_ahead_layers) for i in range(config.num_hidden_layers)]
    slots = np.cumsum([0, *(behind for behind, _ in kinds)])[:-1]  # layers before it that look back
    past = blocks.past

    def branch(behind: bool, ahead: bool, slot: Any, qkv: Any, memory: KeysValues | None) -> Any:
        q, k, v = qkv
        if not behind or memory is None or past is None:
            return block_attention(q, k, v, blocks, behind=behind, ahead=ahead), memory
        old = (jnp.moveaxis(a[:, slot], 1, 0) for a in (memory.keys, memory.values))
        keys, values = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), old, strict=True))
        sources = (keys, values, jnp.concatenate([blocks.valid, past.valid]))
        out = block_attention(q, k, v, blocks, behind=behind, ahead=ahead, sources=sources)
        new = (jnp.moveaxis(_take(a, past.keep), 0, 1) for a in (keys, values))
        kept = (jnp.asarray(a).at[:, slot].set(b) for a, b in zip((memory.keys, memory.values), new, strict=True))
        return out, KeysValues(*kept)

    if isinstance(index, int):
        return branch(*kinds[index], slots[index], qkv, memory)
    used = sorted(set(kinds))
    branches = [functools.partial(branch, *kind) for kind in used]
    which = jnp.array([used.index(kind) for kind in kinds])[index]
    return jax.lax.switch(which, branches, jnp.asarray(slots)[index], qkv, memory)


def block_attention(
    q: Float[Array, "*halves N F heads H"],
    k: Float[Array, "*halves N F heads H"],
    v: Float[Array, "*halves N F heads H"],
    blocks: Blocks,
    *,
    behind: bool,
    ahead: bool,
    sources: tuple[Array, Array, Array] | None = None,
) -> Float[jax.Array, "*halves N F heads H"]:
    """Attention of each block to itself, and to the block before or after it, where there is one.

    ``sources``: keys, values and which of them are valid, in what ``blocks.before`` points into; the list if None.
    """
    own = k, v, jnp.asarray(blocks.valid)
    pieces = [own]
    if behind:
        pieces.insert(0, _neighbours(*(sources or own), blocks.before))
    if ahead:
        pieces.append(_neighbours(*own, blocks.after))
    keys, values, visible = zip(*pieces, strict=True)
    k, v, seen = jnp.concatenate(keys, axis=-3), jnp.concatenate(values, axis=-3), jnp.concatenate(visible, axis=1)
    scores = jnp.einsum("...nqhd,...nkhd->...nhqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _HIDDEN), axis=-1)
    return jnp.einsum("...nhqk,...nkhd->...nqhd", weights, v)


def _neighbours(k: Array, v: Array, valid: Array, places: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys, values and which are valid of the blocks in ``places``; nothing of a block that is not there."""
    there = jnp.asarray(places) != NO_BLOCK
    visible = jnp.take(valid, places, axis=0, mode="clip") & there[:, None]
    # what no one may see has no weight, but even so one row's NaN would go over to another
    return _take(k, places), jnp.where(there[:, None, None, None], _take(v, places), 0), visible


def _take(x: Array, places: Array) -> jax.Array:
    """Blocks of a list [*halves, N, F, heads, H]; any block for one that is not there."""
    return jnp.take(x, places, axis=-4, mode="clip")


def rotary_tables(blocks: Blocks, head_dim: int, theta: float) -> Tables:
    """cos and sin of every frame's angles, by its place in its request. [N, F, head_dim / 2]"""
    frames = jnp.asarray(blocks.valid).shape[1]
    place = jnp.asarray(blocks.index)[:, None] * frames + jnp.arange(frames)
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    angles = place[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate_first_head(x: Float[Array, "*halves N F heads H"], tables: Tables) -> jax.Array:
    """Turns the pairs (0, 1), (2, 3), ... of head 0.

    The other heads know no places: the model was trained with an embedding as wide as one head on all of them laid
    side by side, and so it has to be used.
    """
    cos, sin = tables
    first, second = x[..., 0, 0::2], x[..., 0, 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.asarray(x).at[..., 0, :].set(turned.reshape(*x.shape[:-2], x.shape[-1]))


def time_sinusoid(times: Float[Array, " E"]) -> Float[jax.Array, "E 256"]:
    """Sines of each frequency, then cosines, of times counted in thousandths."""
    half = _TIME_FREQUENCIES // 2
    step = np.float32(math.log(10_000.0) / (half - 1))
    frequencies = np.exp(-step * np.arange(half, dtype=np.float32)).astype(np.float32)
    angles = (np.float32(_TIME_SCALE) * jnp.asarray(times, jnp.float32))[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Centred, scaled to unit variance, then modulated."""
    y = x - jnp.mean(x, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _NORM_EPS)
    return y * (1 + scale) + shift


def pack(lengths: list[int], block_size: int, slots: int) -> tuple[Blocks, list[slice]]:
    """The blocks of requests of ``lengths`` frames, one after the other, and each one's part of the list.

    Args:
      lengths: frames of each request.
      block_size: frames a block.
      slots: length of the list; what the requests leave is padding.
    """
    counts = [-(-n // block_size) for n in lengths]
    ends = list(itertools.accumulate(counts))
    index, valid = np.zeros(slots, np.int32), np.zeros((slots, block_size), bool)
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    before, after = np.full((2, slots), NO_BLOCK, np.int32)
    for part, length in zip(parts, lengths, strict=True):
        index[part] = np.arange(part.stop - part.start)
        valid[part].reshape(-1)[:length] = True
        before[part.start + 1 : part.stop] = np.arange(part.start, part.stop - 1)
        after[part.start : part.stop - 1] = np.arange(part.start + 1, part.stop)
    return Blocks(index, valid, before, after), parts
