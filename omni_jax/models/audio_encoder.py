"""The audio encoder: blocks of two seconds, each on its own (paper section 2.2; reference ``Qwen2_5OmniAudioEncoder``).

A block never sees its neighbours, so blocks are a batch axis and a new block can be encoded while the sound goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Bool, Float

from omni_jax.batch import Array, AudioBlocks
from omni_jax.config import AudioEncoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention
from omni_jax.layers.conv import Conv1D
from omni_jax.layers.linear import Embedding, Linear
from omni_jax.layers.mlp import GeluMLP
from omni_jax.layers.norm import LayerNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.layers.streaming import Block, Streaming
from omni_jax.sharding import constrain

TOKEN_SECONDS = 0.04


class AudioLayer(nn.Module):
    """One pre-norm transformer layer over a block."""

    config: AudioEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, index: int | jax.Array, mask: Mask) -> tuple[jax.Array, None]:
        c, kw = self.config, dtypes(self)
        heads = c.encoder_attention_heads
        project = SelfAttention(c.d_model, heads, heads, c.d_model // heads, key_bias=False, name="attention", **kw)
        y = LayerNorm(c.d_model, param_dtype=self.param_dtype, name="attention_norm")(x)
        x = x + project(y, lambda q, k, v: (attention(q, k, v, mask), None))[0]
        y = LayerNorm(c.d_model, param_dtype=self.param_dtype, name="mlp_norm")(x)
        x = x + GeluMLP(c.d_model, c.encoder_ffn_dim, name="mlp", **kw)(y)
        return constrain(x, "batch", None, None), None


class AudioEncoder(nn.Module):
    """Log-mel blocks to tokens of 40 ms in the Thinker's width."""

    config: AudioEncoderConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        self.conv1 = Conv1D(c.num_mel_bins, c.d_model, 3, **kw)
        self.conv2 = Conv1D(c.d_model, c.d_model, 3, stride=2, **kw)
        self.layers = layer_stack(
            AudioLayer, dict(config=c, **kw), c.encoder_layers, self.scan_layers, shared=1, remat=self.remat
        )
        self.norm = LayerNorm(c.d_model, param_dtype=self.param_dtype)
        # in every checkpoint and read by no release: the marks around sound are ordinary words
        self.bos_eos = Embedding(2, c.output_dim, ("norm", "embed"), param_dtype=self.param_dtype)
        self.proj = Linear((c.d_model,), (c.output_dim,), ("mlp", "embed"), **kw)

    def __call__(self, audio: AudioBlocks) -> Float[jax.Array, "A tokens D"]:
        """Of each block's tokens the first ``((length - 1) // 2 + 1) // 2`` are sound, the rest is padding."""
        c = self.config
        x = constrain(jnp.asarray(audio.mel, self.dtype), "batch", None, None)
        # a block's end is an edge: zeros after conv1, as if the sound had been cut here
        inside = jnp.arange(x.shape[1])[None, :] < jnp.asarray(audio.length)[:, None]
        x = jnp.where(inside[..., None], jax.nn.gelu(self.conv1(x), approximate=False), 0)
        x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = x + jnp.asarray(sinusoids(x.shape[1], c.d_model), self.dtype)
        x = call_layers(self.layers, c.encoder_layers, x, Mask(inside[:, ::2].astype(jnp.int32)))
        # pairs first, then the norm: the other way round than in Whisper
        x = self.norm(x.reshape(x.shape[0], c.block_tokens, 2, c.d_model).mean(axis=2))
        if self.is_initializing():
            self.bos_eos(jnp.zeros((), jnp.int32))
        return constrain(self.proj(x), "batch", None, None)


@dataclass(frozen=True)
class AudioStream:
    """The encoder as a part that streams. An input unit is the log-mel of one token, float32 [4, mel bins].

    A block is all that its tokens depend on, so there is no state; a row begins with a block.
    """

    model: AudioEncoder

    @property
    def streaming(self) -> Streaming:
        return Streaming(TOKEN_SECONDS, self.model.config.block_tokens, look_ahead=0, look_back=0)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        units = x.valid.shape[1]
        spare = -units % self.streaming.block
        mel = jnp.pad(jnp.asarray(x.values), ((0, 0), (0, spare), (0, 0), (0, 0)))
        made, _ = self.step(params, (), Block(mel, jnp.pad(jnp.asarray(x.valid), ((0, 0), (0, spare)))))
        return Block(made.values[:, :units], x.valid)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def step(
        self, params: Any, state: tuple[()], block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, tuple[()]]:
        valid = jnp.asarray(block.valid) if active is None else block.valid & jnp.asarray(active)[:, None]
        mel, size = jnp.where(valid[..., None, None], block.values, 0), self.streaming.block
        frames = mel.shape[2] * valid.reshape(-1, size).sum(axis=1)
        blocks = AudioBlocks(mel.reshape(len(frames), size * mel.shape[2], -1), frames)
        tokens: Any = self.model.apply({"params": params}, blocks)
        return Block(jnp.reshape(tokens, (*valid.shape, -1)), valid), state


def sinusoids(length: int, width: int) -> np.ndarray:
    """The fixed position table, restarted in every block: sines of each frequency, then cosines. [length, width]"""
    step = np.log(10_000.0) / (width // 2 - 1)
    frequencies = np.exp(-step * np.arange(width // 2, dtype=np.float32)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
