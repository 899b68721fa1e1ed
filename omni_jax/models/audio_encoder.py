"""The audio encoder: blocks of two seconds, each on its own (paper section 2.2; docs/reference.md, 3).

A block never sees its neighbours, so blocks are a batch axis and a new block can be encoded while the sound goes on.

Letters: A blocks, T mel frames of a block, M mel bins, S positions after the second convolution (T / 2), D width,
N heads, H width of a head, E the Thinker's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Bool, Float

from omni_jax.batch import AudioBlocks
from omni_jax.config import AudioEncoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention
from omni_jax.layers.conv import Conv1D
from omni_jax.layers.linear import EMBEDDING_STD, Embedding, Linear
from omni_jax.layers.mlp import GeluMLP
from omni_jax.layers.norm import LayerNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.sharding import constrain


class AudioLayer(nn.Module):
    """One pre-norm transformer layer over blocks [A, S, D] (reference ``Qwen2_5OmniAudioEncoderLayer``)."""

    config: AudioEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, index: int | jax.Array, mask: Mask) -> tuple[jax.Array, None]:
        c = self.config
        kw = dtypes(self)
        heads = c.encoder_attention_heads

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            return attention(q, k, v, mask), None  # [A, S, N, H]

        with jax.named_scope("audio_attention"):
            y = LayerNorm(c.d_model, param_dtype=self.param_dtype, name="attention_norm")(x)
            # no bias on the key, here alone among the towers (docs/reference.md, 3)
            project = SelfAttention(c.d_model, heads, heads, c.d_model // heads, key_bias=False, name="attention", **kw)
            x = x + project(y, attend)[0]  # [A, S, D]
        with jax.named_scope("audio_mlp"):
            y = LayerNorm(c.d_model, param_dtype=self.param_dtype, name="mlp_norm")(x)
            x = x + GeluMLP(c.d_model, c.encoder_ffn_dim, name="mlp", **kw)(y)  # [A, S, D]
        return constrain(x, "batch", None, None), None


class AudioEncoder(nn.Module):
    """Log-mel blocks to tokens of 40 ms in the Thinker's width (reference ``Qwen2_5OmniAudioEncoder``)."""

    config: AudioEncoderConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        self.conv1, self.conv2 = make_convolutions(c, kw)
        self.layers = layer_stack(
            AudioLayer, dict(config=c, **kw), c.encoder_layers, self.scan_layers, shared=1, remat=self.remat
        )
        self.norm = LayerNorm(c.d_model, param_dtype=self.param_dtype)
        # in every checkpoint and read by no release: the tokens around sound have ordinary embeddings
        self.bos_eos = Embedding(2, c.output_dim, ("norm", "embed"), param_dtype=self.param_dtype)
        # features begin as large as the embeddings of text that they stand between
        self.proj = Linear((c.d_model,), (c.output_dim,), ("mlp", "embed"), gain=EMBEDDING_STD, **kw)

    def __call__(self, audio: AudioBlocks) -> Float[jax.Array, "A tokens E"]:
        """Of each block's tokens the first ``((length - 1) // 2 + 1) // 2`` are sound, the rest is padding."""
        c = self.config
        x = embed_mel(self.conv1, self.conv2, audio, self.dtype)  # [A, S, D]
        mask = Mask(valid_positions(audio).astype(jnp.int32))
        x = call_layers(self.layers, c.encoder_layers, x, mask)  # [A, S, D]
        with jax.named_scope("audio_output"):
            # the mean of pairs first, then the norm: the other way round than in Whisper
            x = x.reshape(x.shape[0], c.block_tokens, 2, c.d_model).mean(axis=2)  # [A, tokens, D]
            # of an odd number of positions the last pair holds padding; it is not among the block's tokens
            x = self.proj(self.norm(x))  # [A, tokens, E]
        # nothing calls it, and a parameter is only made by a call
        if self.is_initializing():
            self.bos_eos(jnp.zeros((), jnp.int32))
        return constrain(x, "batch", None, None)


def make_convolutions(config: AudioEncoderConfig, fields: Mapping[str, Any]) -> tuple[Conv1D, Conv1D]:
    """The two convolutions before the layers, the second of which halves the frames."""
    width = config.d_model
    return Conv1D(config.num_mel_bins, width, 3, **fields), Conv1D(width, width, 3, stride=2, **fields)


def embed_mel(conv1: Conv1D, conv2: Conv1D, audio: AudioBlocks, dtype: Dtype) -> Float[jax.Array, "A S D"]:
    """What the first layer reads: mel through both convolutions, with positions that count from a block's beginning."""
    x = constrain(jnp.asarray(audio.mel, dtype), "batch", None, None)  # [A, T, M]
    with jax.named_scope("audio_convolutions"):
        x = jax.nn.gelu(conv1(x), approximate=False)  # [A, T, D]
        # a block's end is an edge for conv2: zeros behind it, as if the sound had been cut here
        x = jnp.where(valid_frames(audio)[..., None], x, 0)
        x = jax.nn.gelu(conv2(x), approximate=False)  # [A, S, D]
        return x + jnp.asarray(sinusoidal_positions(x.shape[1], x.shape[2]), dtype)


def valid_frames(audio: AudioBlocks) -> Bool[jax.Array, "A T"]:
    """Which frames are sound."""
    frames = jnp.arange(audio.mel.shape[1])
    return frames[None, :] < jnp.asarray(audio.length)[:, None]


def valid_positions(audio: AudioBlocks) -> Bool[jax.Array, "A S"]:
    """Which positions are sound: stride 2 leaves every second frame, which is the centre of a position."""
    return valid_frames(audio)[:, ::2]


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """The fixed position table: sines of each frequency, then cosines (reference ``SinusoidsPositionEmbedding``).

    Returns:
      float32 [length, width].
    """
    # computed, since the table is in no checkpoint; the reference divides by the number of frequencies less one
    step = np.log(10_000.0) / (width // 2 - 1)
    frequencies = np.exp(-step * np.arange(width // 2, dtype=np.float32)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]  # [length, width / 2]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
