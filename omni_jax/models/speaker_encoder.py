"""The speaker encoder: a log-mel clip of any length to one embedding (docs/reference.md, 8.3).

Its statistics run over the whole clip and its convolutions mirror the clip's ends, so a clip is encoded at its own
length, without padding. A clip is encoded once a voice, not once an evaluation.

Letters: B clips, T mel frames, M mel bins, C channels of a layer.
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

_LEAST_VARIANCE = 1e-12  # the reference's floor under the square root


class SpeakerEncoder(nn.Module):
    """A convolution, blocks of growing dilation, and a pooling that weighs the frames (``ECAPA_TimeDelayNet``)."""

    config: DiTConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    @full_precision
    def __call__(self, mel: Float[Array, "B T M"]) -> Float[jax.Array, "B enc_dim"]:
        c = self.config
        kw = dtypes(self)
        channels = c.enc_channels
        pooled = channels[-1]
        kernels = c.enc_kernel_sizes
        dilations = c.enc_dilations
        first = _reflect_conv(c.mel_dim, channels[0], kernels[0], dilations[0], name="block_0", **kw)
        x = jax.nn.relu(first(jnp.asarray(mel, self.dtype)))  # [B, T, C]
        outputs = []
        # the last number of channels is that of the outputs of all blocks side by side
        for i in range(1, len(channels) - 1):
            x = SpeakerBlock(c, i, name=f"block_{i}", **kw)(x)
            outputs.append(x)
        x = jnp.concatenate(outputs, axis=-1)  # [B, T, pooled]
        x = jax.nn.relu(_reflect_conv(pooled, pooled, kernels[-1], dilations[-1], name="aggregate", **kw)(x))
        x = AttentivePooling(pooled, c.enc_attention_channels, name="pool", **kw)(x)  # [B, 2 * pooled]
        # the pooled vector is a sequence of one frame for the last convolution
        return _reflect_conv(2 * pooled, c.enc_dim, name="proj", **kw)(x[:, None])[:, 0]


class SpeakerBlock(nn.Module):
    """Groups of channels in a cascade (Res2Net), then weights of all channels (``SqueezeExcitationRes2NetBlock``).

    The first group passes unchanged; each later one is convolved after the output of the group before was added.
    """

    config: DiTConfig
    index: int  # in ``enc_channels``
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B T C"]) -> jax.Array:
        c = self.config
        kw = dtypes(self)
        inputs, width = c.enc_channels[self.index - 1 : self.index + 1]
        kernel = c.enc_kernel_sizes[self.index]
        dilation = c.enc_dilations[self.index]
        # one frame wide, into and out of the groups
        y = jax.nn.relu(_reflect_conv(inputs, width, name="in", **kw)(x))
        # the groups are convolved one after the other, each with the result of the one before
        groups = jnp.split(y, c.enc_res2net_scale, axis=-1)  # each [B, T, C / scale]
        size = groups[0].shape[-1]
        outputs = [groups[0]]
        for g, group in enumerate(groups[1:], start=1):
            # nothing is added to the second group: the first one was not convolved
            summed = group + outputs[-1] if g > 1 else group
            outputs.append(jax.nn.relu(_reflect_conv(size, size, kernel, dilation, name=f"group_{g}", **kw)(summed)))
        y = jax.nn.relu(_reflect_conv(width, width, name="out", **kw)(jnp.concatenate(outputs, axis=-1)))  # [B, T, C]
        return x + y * SqueezeExcitation(width, c.enc_se_channels, name="squeeze", **kw)(y)


class SqueezeExcitation(nn.Module):
    """A weight between 0 and 1 for each channel, from the channels' means over time. [B, T, width] to [B, 1, width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = dtypes(self)
        # over the whole clip: padding would count, so clips come at their own length
        y = jnp.mean(x, axis=1, keepdims=True)  # [B, 1, width]
        y = jax.nn.relu(_reflect_conv(self.width, self.hidden, name="down", **kw)(y))
        return jax.nn.sigmoid(_reflect_conv(self.hidden, self.width, name="up", **kw)(y))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted by frame and channel. [B, T, width] to [B, 2 * width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = dtypes(self)
        # each frame is shown the clip's plain mean and deviation, all frames weighing the same
        context = jnp.broadcast_to(_weighted_statistics(x, 1 / x.shape[1])[:, None], (*x.shape[:2], 2 * self.width))
        y = jnp.concatenate([x, context], axis=-1)  # [B, T, 3 * width]
        # both, one after the other, as trained
        y = jnp.tanh(jax.nn.relu(_reflect_conv(3 * self.width, self.hidden, name="up", **kw)(y)))
        logits = _reflect_conv(self.hidden, self.width, name="down", **kw)(y)  # [B, T, width]
        return _weighted_statistics(x, jax.nn.softmax(logits, axis=1))


def shortest_clip(config: DiTConfig) -> int:
    """The fewest frames that the widest convolution can mirror at both ends."""
    # an edge frame is not mirrored itself, so a clip has one frame more than it mirrors
    sides = [(k - 1) * d // 2 for k, d in zip(config.enc_kernel_sizes, config.enc_dilations, strict=True)]
    return 1 + max(sides)


def _weighted_statistics(x: jax.Array, weights: jax.Array | float) -> jax.Array:
    """Weighted mean and standard deviation over time, side by side. [B, 2 * width]"""
    mean = jnp.sum(weights * x, axis=1)
    variance = jnp.sum(weights * jnp.square(x - mean[:, None]), axis=1)
    return jnp.concatenate([mean, jnp.sqrt(jnp.maximum(variance, _LEAST_VARIANCE))], axis=-1)


def _reflect_conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, **fields: object) -> Conv1D:
    axes = ("kernel", "channels", "channels")
    return Conv1D(inputs, outputs, kernel, dilation=dilation, edges="reflect", axes=axes, **fields)  # type: ignore[arg-type]
