"""The transformer of Token2Wav: one evaluation of the flow's velocity (section 8; ``Qwen2_5OmniToken2WavDiTModel``).

Letters: N blocks, F frames a block, M mel bins, D width, L layers, E times.

A frame sees its block of ``block_size`` frames, and in a few layers the block before or after it. So the blocks are a
batch axis: attention is F queries by F or 2F keys, whatever the length. The blocks of all requests stand in one list,
one request after the other; no request is padded to another's length.

What an evaluation needs and does not change from one to the next is made once: the speaker's row and the codes, taken
through the first projection (``conditions``), and every layer's scales and shifts for all times (``modulations``).
"""

from __future__ import annotations

import itertools
import math
from typing import TypeAlias

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


@struct.dataclass
class Blocks:
    """Which frames the blocks of a list hold."""

    index: Int[Array, " N"]  # the how manyeth block of its request; 0 for a block of padding
    valid: Bool[Array, "N F"]  # False for frames after a request's end

    def twice(self) -> Blocks:
        """The list with itself behind it."""
        return jax.tree.map(lambda a: jnp.concatenate([jnp.asarray(a)] * 2), self)


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
        self, mel: Float[Array, "N F M"], conditions: Conditions, modulations: Modulations, blocks: Blocks
    ) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"]]:
        """One evaluation at one time: the velocity for the request, and for nothing. Padding gives anything finite."""
        c = self.config
        mel = jnp.where(blocks.valid[..., None], jnp.asarray(mel, self.dtype), 0)
        x = self.input_proj.variable(mel)
        x = constrain(jnp.concatenate([x + conditions.given, x + conditions.null]), "batch", None, None)
        both = blocks.twice()
        shared = _Evaluation(modulations.layers, both, rotary_tables(both, c.head_dim, c.rope_theta))
        x = call_layers(self.layers, c.num_hidden_layers, x, shared)
        scale, shift = modulations.final
        given, null = jnp.split(self.proj(_norm(x, scale, shift)), 2)
        return given, null

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
        return self.velocity(mel, self.conditions(codes, speakers, cond), modulations, blocks)


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

    def __call__(self, x: jax.Array, index: int | jax.Array, shared: _Evaluation) -> tuple[jax.Array, None]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = shared.modulation[index]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            q, k = (rotate_first_head(a, shared.rotary) for a in (q, k))
            return attention_of_layer(self.config, index, q, k, v, shared.blocks), None

        x = x + gate_a * self.attention(_norm(x, scale_a, shift_a), attend)[0]
        return x + gate_m * self.mlp(_norm(x, scale_m, shift_m)), None


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
    config: DiTConfig, index: int | jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks
) -> jax.Array:
    """``block_attention`` with the neighbours that layer ``index`` sees; a branch each where it is a traced number."""
    kinds = [(i in config.look_backward_layers, i in config.look_ahead_layers) for i in range(config.num_hidden_layers)]
    if isinstance(index, int):
        behind, ahead = kinds[index]
        return block_attention(q, k, v, blocks, behind=behind, ahead=ahead)
    used = sorted(set(kinds))
    branches = [
        lambda q, k, v, behind=behind, ahead=ahead: block_attention(q, k, v, blocks, behind=behind, ahead=ahead)
        for behind, ahead in used
    ]
    return jax.lax.switch(jnp.array([used.index(kind) for kind in kinds])[index], branches, q, k, v)


def block_attention(
    q: Float[Array, "N F heads H"],
    k: Float[Array, "N F heads H"],
    v: Float[Array, "N F heads H"],
    blocks: Blocks,
    *,
    behind: bool,
    ahead: bool,
) -> Float[jax.Array, "N F heads H"]:
    """Attention of each block to itself, and to the block before or after it in its request, where there is one."""
    valid = jnp.asarray(blocks.valid)
    inner = jnp.asarray(blocks.index) > 0  # has a block before it
    keys, values, visible = [k], [v], [valid]
    if behind:
        keys, values = [jnp.roll(k, 1, axis=0), *keys], [jnp.roll(v, 1, axis=0), *values]
        visible = [jnp.roll(valid, 1, axis=0) & inner[:, None], *visible]
    if ahead:
        keys, values = [*keys, jnp.roll(k, -1, axis=0)], [*values, jnp.roll(v, -1, axis=0)]
        visible = [*visible, jnp.roll(valid & inner[:, None], -1, axis=0)]
    k, v, seen = (jnp.concatenate(a, axis=1) for a in (keys, values, visible))
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, _HIDDEN), axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v)


def rotary_tables(blocks: Blocks, head_dim: int, theta: float) -> Tables:
    """cos and sin of every frame's angles, by its place in its request. [N, F, head_dim / 2]"""
    frames = jnp.asarray(blocks.valid).shape[1]
    place = jnp.asarray(blocks.index)[:, None] * frames + jnp.arange(frames)
    frequencies = (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)
    angles = place[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate_first_head(x: Float[Array, "N F heads H"], tables: Tables) -> jax.Array:
    """Turns the pairs (0, 1), (2, 3), ... of head 0.

    The other heads know no places: the model was trained with an embedding as wide as one head on all of them laid
    side by side, and so it has to be used.
    """
    cos, sin = tables
    first, second = x[:, :, 0, 0::2], x[:, :, 0, 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.asarray(x).at[:, :, 0].set(turned.reshape(x.shape[0], x.shape[1], x.shape[3]))


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
    for part, length in zip(parts, lengths, strict=True):
        index[part] = np.arange(part.stop - part.start)
        valid[part].reshape(-1)[:length] = True
    return Blocks(index, valid), parts
