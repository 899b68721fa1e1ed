"""The transformer of Token2Wav: one evaluation of the flow's velocity (docs/reference.md, 8.2 to 8.7).

A frame sees its block of ``block_size`` frames, and in a few layers the block before or after it. So the blocks are a
batch axis: attention is F queries by F or 2F keys, whatever the length. The blocks of all requests stand in one list,
in any order; each says where the blocks before and after it stand. No request is padded to another's length. A block
may stand there more than once, each time with other neighbours: so ``models/dit_streaming.py`` solves block by block.

What an evaluation needs and does not change from one to the next is computed once: the voice and the codes, taken
through the first projection (``conditions``), and every layer's scales and shifts for all times (``modulations``).

Guidance needs each velocity twice: with the request's conditions (``cond``) and without (``uncond``). The two are the
halves of a leading axis of 2. A network into which guidance was distilled needs the first alone: the axis is then 1.

Letters: N blocks of the list, F frames of a block, M mel bins, D width, L layers, E times, R streams with a cache,
S layers that look back, heads, H width of a head.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.layers.attention import SelfAttention
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GeluMLP
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import Precision, own_precision
from omni_jax.layers.rotary import Tables
from omni_jax.layers.stack import Remat, call_layers, layer_stack, map_layers
from omni_jax.models.dit_blocks import Blocks, KeyBlocks, block_attention, take_blocks
from omni_jax.models.dit_rotary import rotary_tables, rotate_first_head
from omni_jax.models.speaker_encoder import SpeakerEncoder
from omni_jax.sharding import constrain, replicate

_TIME_FREQUENCIES = 256  # width of the sinusoid of time, in no file
_TIME_SCALE = 1000.0  # the network reads times in thousandths
_NORM_EPS = 1e-6
NULL_CODE = 0  # a real code, and the model was trained to take it for "no code" as well


@struct.dataclass
class DiTCache:
    """Keys and values of one block of R streams in the S layers that look back, for each half.

    Those of all evaluations of a solve have a second axis, of the evaluations.
    """

    keys: Float[Array, "R *evaluations S halves F heads H"]
    values: Float[Array, "R *evaluations S halves F heads H"]


@struct.dataclass
class Conditions:
    """The part of the first projection that does not depend on the noisy mel."""

    cond: Float[Array, "N F D"]
    uncond: Float[Array, "N 1 D"] | None  # None without guidance


@struct.dataclass
class Modulations:
    """Shift, scale and gate of each layer's attention, then of its MLP; last a scale and a shift."""

    layers: Float[Array, "*times L 6 *blocks D"]
    final: Float[Array, "*times 2 *blocks D"]


@struct.dataclass
class LayerInputs:
    """What all layers of one evaluation share."""

    modulation: Float[Array, "L 6 *blocks D"]
    blocks: Blocks
    rotary: Tables


class _Carry(NamedTuple):
    """What goes from layer to layer."""

    x: Float[jax.Array, "halves N F D"]
    cache: DiTCache | None


class DiT(nn.Module):
    """Noisy mel, codes, voice and time to velocity (reference ``Qwen2_5OmniToken2WavDiTModel``)."""

    config: DiTConfig
    scan_layers: bool = True
    precision: Precision = "highest"  # of all but the speaker encoder, which runs once for a voice
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        width = c.hidden_size
        self.time_embed = TimeEmbedding(width, **kw)
        self.codec_embed = Embedding(c.num_embeds + 1, c.emb_dim, ("channels", "embed"), **kw)
        self.speaker_encoder = SpeakerEncoder(c, **kw)
        self.input_proj = InputProjection(c.mel_dim, c.enc_dim + c.emb_dim + c.enc_emb_dim, width, **kw)
        methods = ("__call__", "modulate")
        layer = dict(config=c, **kw)
        self.layers = layer_stack(DiTLayer, layer, c.num_hidden_layers, self.scan_layers, 1, methods, self.remat)
        self.modulation = Linear((width,), (2 * width,), ("embed", "mlp"), **kw)
        self.proj = Linear((width,), (c.mel_dim,), ("embed", "channels"), **kw)

    def speakers(self, ref_mel: Float[Array, "1 T M"], length: Int[Array, " 1"]) -> Float[jax.Array, "2 enc_dim"]:
        """Speaker embeddings of a voice's clip and of a silent clip as long, which is the unconditional voice.

        Args:
          ref_mel: the clip, and behind it anything.
          length: frames of the clip.
        """
        clip = jnp.asarray(ref_mel, self.dtype)
        clips = jnp.concatenate([clip, jnp.zeros_like(clip)])  # [2, T, M]
        return self.encode_clips(clips, jnp.repeat(jnp.asarray(length), 2))

    def encode_clips(self, mel: Float[Array, "C T M"], length: Int[Array, " C"]) -> Float[jax.Array, "C enc_dim"]:
        """Speaker embeddings of clips of any voices, of which the first ``length`` frames are real."""
        with jax.named_scope("speaker_encoder"):
            return self.speaker_encoder(jnp.asarray(mel, self.dtype), length)

    @own_precision
    def conditions(
        self,
        codes: Int[Array, "N F"],
        speakers: Float[Array, "N voices enc_dim"],
        cond: Float[Array, "N enc_emb_dim"],
        guidance: bool = True,
    ) -> Conditions:
        """What is constant over the evaluations.

        Args:
          codes: the code of each frame.
          speakers: of each block's voice, from ``speakers``; without guidance the second is not needed.
          cond: the vector that each block's voice has beside its clip.
          guidance: whether velocities without conditions will be needed too.
        """
        with jax.named_scope("dit_conditions"):
            given = self.conditions_of_embeds(self.codec_embed(codes), speakers, cond)
            if not guidance:
                return given
            null_embeds = self.codec_embed(jnp.full((len(codes), 1), NULL_CODE))  # [N, 1, emb_dim]
            nothing = jnp.zeros_like(cond)[:, None]  # [N, 1, enc_emb_dim]
            return Conditions(given.cond, self._project_conditions(speakers[:, 1:], null_embeds, nothing))

    @own_precision
    def conditions_of_embeds(
        self,
        embeds: Float[Array, "N F emb_dim"],
        speakers: Float[Array, "N voices enc_dim"],
        cond: Float[Array, "N enc_emb_dim"],
    ) -> Conditions:
        """``conditions`` without guidance, of what stands for the embedding of each frame's code."""
        return Conditions(self._project_conditions(speakers[:, :1], embeds, cond[:, None]), None)  # [N, F, D]

    def _project_conditions(self, speaker: Array, codes: Array, cond: Array) -> jax.Array:
        frames = codes.shape[:2]
        # in the order of the published kernel's inputs (docs/reference.md, 8.4)
        parts = [jnp.broadcast_to(part, (*frames, part.shape[-1])) for part in (speaker, codes, cond)]
        return self.input_proj.project_constants(jnp.concatenate(parts, axis=-1))  # [N, F, D]

    @own_precision
    def modulations(self, times: Float[Array, " E"]) -> Modulations:
        """The modulation at each of ``times``, on a leading axis. A layer's projection is read once for all times."""
        c = self.config
        with jax.named_scope("dit_modulations"):
            embeds = jax.nn.silu(self.time_embed(times))  # [E, D]
            layers = map_layers(self.layers, c.num_hidden_layers, "modulate", embeds)  # [L, E, 6, D]
            final = self.modulation(embeds).reshape(len(embeds), 2, c.hidden_size)  # [E, 2, D]
            # sharded like the projection that makes them, they would have every norm reduced over devices
            return replicate(Modulations(jnp.moveaxis(layers, 0, 1), final))

    def block_modulations(self, times: Float[Array, " N"]) -> Modulations:
        """The modulation of blocks that have a time of their own each, as ``velocity`` takes it."""
        modulations = self.modulations(times)
        return Modulations(
            # where a time's vectors were, those of all blocks, to be broadcast over their frames
            jnp.moveaxis(modulations.layers, 0, 2)[..., None, :],  # [L, 6, N, 1, D]
            jnp.moveaxis(modulations.final, 0, 1)[..., None, :],  # [2, N, 1, D]
        )

    @own_precision
    def velocity(
        self,
        mel: Float[Array, "N F M"],
        conditions: Conditions,
        modulations: Modulations,
        blocks: Blocks,
        cache: DiTCache | None = None,
    ) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"] | None, DiTCache | None]:
        """One evaluation.

        Args:
          mel: noisy log-mel.
          conditions: from ``conditions``.
          modulations: at the time of the evaluation, or at that of each block (``block_modulations``).
          blocks: the list.
          cache: of this evaluation in the call before, if ``blocks`` has cached ones.

        Returns:
          The conditional velocity, the unconditional one if there is guidance, and the cache for the next call.
          Padding gives anything finite.
        """
        with jax.named_scope("dit_input"):
            projected = self._project_mel(mel, blocks)  # [N, F, D]
            halves = [projected + conditions.cond]
            if conditions.uncond is not None:
                halves.append(projected + conditions.uncond)
            x = jnp.stack(halves)  # [halves, N, F, D]
        velocities, cache = self._apply_layers(x, modulations, blocks, cache)  # [halves, N, F, M]
        return velocities[0], None if conditions.uncond is None else velocities[1], cache

    def _project_mel(self, mel: Float[Array, "N F M"], blocks: Blocks) -> Float[jax.Array, "N F D"]:
        mel = jnp.where(blocks.valid[..., None], jnp.asarray(mel, self.dtype), 0)
        return self.input_proj.project_mel(mel)

    def _apply_layers(
        self, x: Float[jax.Array, "halves N F D"], modulations: Modulations, blocks: Blocks, cache: DiTCache | None
    ) -> tuple[Float[jax.Array, "halves N F M"], DiTCache | None]:
        """From the input's projection to velocities."""
        c = self.config
        x = constrain(x, None, "batch", None, None)
        rotary = rotary_tables(blocks.index, c.block_size, c.head_dim, c.rope_theta)
        inputs = LayerInputs(modulations.layers, blocks, rotary)
        x, cache = call_layers(self.layers, c.num_hidden_layers, _Carry(x, cache), inputs)
        with jax.named_scope("dit_output"):
            # scale, then shift: the other order than in the layers, as published
            scale, shift = modulations.final
            return self.proj(_modulated_norm(x, scale, shift)), cache

    def __call__(
        self,
        mel: Float[Array, "N F M"],
        codes: Int[Array, "N F"],
        ref_mel: Float[Array, "1 T M"],
        length: Int[Array, " 1"],
        cond: Float[Array, "1 enc_emb_dim"],
        time: Float[Array, ""],
        blocks: Blocks,
    ) -> tuple[Float[jax.Array, "N F M"], Float[jax.Array, "N F M"]]:
        """Both velocities at one time, for blocks of one voice."""
        modulations = jax.tree.map(lambda a: a[0], self.modulations(jnp.asarray(time)[None]))
        speakers = jnp.broadcast_to(self.speakers(ref_mel, length)[None], (len(codes), 2, self.config.enc_dim))
        cond = jnp.broadcast_to(jnp.asarray(cond), (len(codes), self.config.enc_emb_dim))
        given, nothing, _ = self.velocity(mel, self.conditions(codes, speakers, cond), modulations, blocks)
        assert nothing is not None
        return given, nothing


class DiTLayer(nn.Module):
    """Attention among blocks and an MLP, scaled, shifted and gated by the time (reference ``DiTDecoderLayer``)."""

    config: DiTConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        width = c.hidden_size
        self.modulation = Linear((width,), (6 * width,), ("embed", "mlp"), **kw)
        self.attention = SelfAttention(width, c.num_attention_heads, c.num_attention_heads, c.head_dim, **kw)
        self.mlp = GeluMLP(width, c.ff_mult * width, approximate=True, **kw)

    def modulate(
        self, carry: tuple[()], index: int | jax.Array, embeds: Float[jax.Array, "E D"]
    ) -> tuple[tuple[()], Float[jax.Array, "E 6 D"]]:
        """The six vectors of this layer at each time."""
        return carry, replicate(self.modulation(embeds)).reshape(len(embeds), 6, self.config.hidden_size)

    def __call__(self, carry: _Carry, index: int | jax.Array, inputs: LayerInputs) -> tuple[_Carry, None]:
        x, cache = carry
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = inputs.modulation[index]  # six of [D], or of [N, 1, D]

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, DiTCache | None]:
            # before the cache: a block that is looked back at keeps the angles of its own place
            q = rotate_first_head(q, inputs.rotary)  # [halves, N, F, heads, H]
            k = rotate_first_head(k, inputs.rotary)
            return attend_by_layer(self.config, index, (q, k, v), inputs.blocks, cache)

        with jax.named_scope("dit_attention"):
            attended, new_cache = self.attention(_modulated_norm(x, scale_a, shift_a), attend)
            x = constrain(x + gate_a * attended, None, "batch", None, None)  # [halves, N, F, D]
        with jax.named_scope("dit_mlp"):
            x = x + gate_m * self.mlp(_modulated_norm(x, scale_m, shift_m))
            x = constrain(x, None, "batch", None, None)  # [halves, N, F, D]
        return _Carry(x, new_cache), None


class TimeEmbedding(nn.Module):
    """Times between 0 and 1 to vectors: sines and cosines through two linear maps. [E] to [E, width]"""

    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, times: Array) -> jax.Array:
        kw = dtypes(self)
        x = jnp.asarray(sinusoidal_times(times), self.dtype)
        x = Linear((_TIME_FREQUENCIES,), (self.width,), ("channels", "mlp"), name="up", **kw)(x)
        return Linear((self.width,), (self.width,), ("mlp", "embed"), name="down", **kw)(jax.nn.silu(x))


class InputProjection(nn.Module):
    """A linear map of [noisy mel, constants] in its two parts, so that the constants' is computed once."""

    noisy: int
    constants: int
    width: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        inputs = self.noisy + self.constants
        init = nn.initializers.normal(1 / math.sqrt(inputs))
        self.kernel = param(self, "kernel", init, (inputs, self.width), ("channels", "embed")).astype(self.dtype)
        self.bias = param(self, "bias", nn.initializers.zeros, (self.width,), ("embed",)).astype(self.dtype)

    def project_mel(self, mel: jax.Array) -> jax.Array:
        """The noisy mel's part. [N, F, M] to [N, F, width]"""
        return mel @ self.kernel[: self.noisy]

    def project_constants(self, x: jax.Array) -> jax.Array:
        """The constants' part, with the bias. [N, F, constants] to [N, F, width]"""
        return x @ self.kernel[self.noisy :] + self.bias


def attend_by_layer(
    config: DiTConfig,
    index: int | jax.Array,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    blocks: Blocks,
    cache: DiTCache | None,
) -> tuple[jax.Array, DiTCache | None]:
    """``block_attention`` with the neighbours that layer ``index`` sees; a branch each where it is a traced number.

    A layer that looks back reads the cache too, and writes what the next call will look back at.
    """
    layers = range(config.num_hidden_layers)
    kinds = [(i in config.look_backward_layers, i in config.look_ahead_layers) for i in layers]
    # of each layer its place on the cache's axis S: the number of layers below it that look back
    cache_index = np.cumsum([0, *(behind for behind, _ in kinds)])[:-1]
    # unrolled layers need no branch
    if isinstance(index, int):
        behind, ahead = kinds[index]
        return _attend_to_neighbours(behind, ahead, cache_index[index], qkv, blocks, cache)
    # one branch for each kind that occurs; the index of a layer selects its kind's
    used = sorted(set(kinds))
    branches = [functools.partial(_attend_to_neighbours, behind, ahead) for behind, ahead in used]
    branch = jnp.array([used.index(kind) for kind in kinds])[index]
    return jax.lax.switch(branch, branches, jnp.asarray(cache_index)[index], qkv, blocks, cache)


def _attend_to_neighbours(
    behind: bool,
    ahead: bool,
    cache_index: int | jax.Array,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    blocks: Blocks,
    cache: DiTCache | None,
) -> tuple[jax.Array, DiTCache | None]:
    q, k, v = qkv  # [halves, N, F, heads, H]
    if not behind or cache is None or blocks.cached is None:
        return block_attention(q, k, v, blocks, behind=behind, ahead=ahead), cache

    def append_cached(array: jax.Array, cached: Array) -> jax.Array:
        return jnp.concatenate([array, jnp.moveaxis(cached[:, cache_index], 1, 0)], axis=1)  # [halves, N + R, ...]

    def update_cached(cached: Array, array: jax.Array) -> jax.Array:
        assert blocks.cached is not None
        new = jnp.moveaxis(take_blocks(array, blocks.cached.next), 0, 1)  # [R, halves, F, heads, H]
        return jnp.asarray(cached).at[:, cache_index].set(new)

    # the cached blocks stand behind the list, where ``blocks.before`` points to them
    keys = append_cached(k, cache.keys)
    values = append_cached(v, cache.values)
    source = KeyBlocks(keys, values, jnp.concatenate([blocks.valid, blocks.cached.valid]))
    out = block_attention(q, k, v, blocks, behind=behind, ahead=ahead, source=source)
    return out, DiTCache(update_cached(cache.keys, keys), update_cached(cache.values, values))


def sinusoidal_times(times: Float[Array, " E"]) -> Float[jax.Array, "E 256"]:
    """Sines of each frequency, then cosines, of times counted in thousandths."""
    half = _TIME_FREQUENCIES // 2
    # the reference divides by the number of frequencies less one
    step = np.float32(math.log(10_000.0) / (half - 1))
    frequencies = np.exp(-step * np.arange(half, dtype=np.float32)).astype(np.float32)
    angles = (np.float32(_TIME_SCALE) * jnp.asarray(times, jnp.float32))[:, None] * frequencies  # [E, 128]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _modulated_norm(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Centred, scaled to unit variance, then modulated."""
    # the norm has no parameters: the time's scale and shift stand in for them
    y = x - jnp.mean(x, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + _NORM_EPS)
    return y * (1 + scale) + shift
