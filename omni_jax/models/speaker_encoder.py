"""The speaker encoder: a log-mel clip of any length to one row (section 8.3; reference ``ECAPA_TimeDelayNet``).

Its statistics run over the whole clip and its convolutions mirror the clip's ends, so a clip is encoded at its own
length, without padding. A clip is encoded once a voice, not once an evaluation.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.layers.conv import Conv1D
from omni_jax.layers.params import dtypes
from omni_jax.layers.precision import full_precision

_LEAST_VARIANCE = 1e-12


class SpeakerEncoder(nn.Module):
    """Convolution, three blocks that see ever wider, and a pooling that weighs the frames."""

    config: DiTConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    @full_precision
    def __call__(self, mel: Float[Array, "B T mel"]) -> Float[jax.Array, "B enc_dim"]:
        c, kw = self.config, dtypes(self)
        channels, kernels, dilations = c.enc_channels, c.enc_kernel_sizes, c.enc_dilations
        first = _conv(c.mel_dim, channels[0], kernels[0], dilations[0], name="block_0", **kw)
        x = jax.nn.relu(first(jnp.asarray(mel, self.dtype)))
        seen = []
        for i in range(1, len(channels) - 1):
            x = SpeakerBlock(c, i, name=f"block_{i}", **kw)(x)
            seen.append(x)
        pooled = channels[-1]
        x = jnp.concatenate(seen, axis=-1)
        x = jax.nn.relu(_conv(pooled, pooled, kernels[-1], dilations[-1], name="aggregate", **kw)(x))
        x = AttentivePooling(pooled, c.enc_attention_channels, name="pool", **kw)(x)
        return _conv(2 * pooled, c.enc_dim, name="proj", **kw)(x[:, None])[:, 0]


class SpeakerBlock(nn.Module):
    """Groups of channels that each hear the one before (Res2Net), then weights for all channels, and around it a sum.

    The first group passes unchanged; each later one convolves itself plus what the group before it became.
    """

    config: DiTConfig
    index: int  # in ``enc_channels``
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, kw = self.config, dtypes(self)
        inputs, width = c.enc_channels[self.index - 1 : self.index + 1]
        y = jax.nn.relu(_conv(inputs, width, name="in", **kw)(x))
        groups = jnp.split(y, c.enc_res2net_scale, axis=-1)
        size, made = groups[0].shape[-1], groups[:1]
        for g, group in enumerate(groups[1:], start=1):
            kernel, dilation = c.enc_kernel_sizes[self.index], c.enc_dilations[self.index]
            heard = group + made[-1] if g > 1 else group
            made.append(jax.nn.relu(_conv(size, size, kernel, dilation, name=f"group_{g}", **kw)(heard)))
        y = jax.nn.relu(_conv(width, width, name="out", **kw)(jnp.concatenate(made, axis=-1)))
        return x + y * Squeeze(width, c.enc_se_channels, name="squeeze", **kw)(y)


class Squeeze(nn.Module):
    """A weight between 0 and 1 for each channel, from the channels' means over time. [B, 1, width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(x, axis=1, keepdims=True)
        y = jax.nn.relu(_conv(self.width, self.hidden, name="down", **dtypes(self))(y))
        return jax.nn.sigmoid(_conv(self.hidden, self.width, name="up", **dtypes(self))(y))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, with weights for each frame and channel. [B, 2 * width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        context = jnp.broadcast_to(_statistics(x, 1 / x.shape[1])[:, None], (*x.shape[:2], 2 * self.width))
        y = jnp.concatenate([x, context], axis=-1)
        # both, one after the other, as trained
        y = jnp.tanh(jax.nn.relu(_conv(3 * self.width, self.hidden, name="up", **dtypes(self))(y)))
        scores = _conv(self.hidden, self.width, name="down", **dtypes(self))(y)
        return _statistics(x, jax.nn.softmax(scores, axis=1))


def shortest_clip(config: DiTConfig) -> int:
    """The fewest frames that the widest convolution can mirror at both ends."""
    return 1 + max((k - 1) * d // 2 for k, d in zip(config.enc_kernel_sizes, config.enc_dilations, strict=True))


def _statistics(x: jax.Array, weights: jax.Array | float) -> jax.Array:
    """Weighted mean and standard deviation over time, side by side. [B, 2 * width]"""
    mean = jnp.sum(weights * x, axis=1)
    variance = jnp.sum(weights * jnp.square(x - mean[:, None]), axis=1)
    return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, _LEAST_VARIANCE))], axis=-1)


def _conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, **fields: object) -> Conv1D:
    axes = ("kernel", "channels", "channels")
    return Conv1D(inputs, outputs, kernel, dilation=dilation, edges="reflect", axes=axes, **fields)  # type: ignore[arg-type]
