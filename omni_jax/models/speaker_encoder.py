"""The speaker encoder: a log-mel clip of any length to one embedding (docs/reference.md, 8.3).

Its statistics run over a clip's own frames and its convolutions mirror the clip's own ends, whatever stands behind
them, so that clips of several lengths share a program. A clip is encoded once a voice, not once an evaluation.

Letters: B clips, T mel frames with those behind a clip's end, M mel bins, C channels of a layer.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.layers.conv import Conv1D, conv, same_padding
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
    def __call__(self, mel: Float[Array, "B T M"], length: Int[Array, " B"]) -> Float[jax.Array, "B enc_dim"]:
        """``length``: frames of each clip, at least ``shortest_clip``."""
        c = self.config
        length = jnp.asarray(length)
        kw = dtypes(self)
        channels = c.enc_channels
        pooled = channels[-1]
        kernels = c.enc_kernel_sizes
        dilations = c.enc_dilations
        x = jnp.asarray(mel, self.dtype)
        x = jax.nn.relu(
            _apply_conv(x, length, channels[0], kernels[0], dilations[0], name="block_0", **kw)
        )  # [B, T, C]
        outputs = []
        # the last number of channels is that of the outputs of all blocks side by side
        for i in range(1, len(channels) - 1):
            x = SpeakerBlock(c, i, name=f"block_{i}", **kw)(x, length)
            outputs.append(x)
        x = jnp.concatenate(outputs, axis=-1)  # [B, T, pooled]
        x = jax.nn.relu(_apply_conv(x, length, pooled, kernels[-1], dilations[-1], name="aggregate", **kw))
        x = AttentivePooling(pooled, c.enc_attention_channels, name="pool", **kw)(x, length)  # [B, 2 * pooled]
        # the pooled vector is a sequence of one frame for the last convolution
        return _apply_conv(x[:, None], length, c.enc_dim, name="proj", **kw)[:, 0]


class SpeakerBlock(nn.Module):
    """Groups of channels in a cascade (Res2Net), then weights of all channels (``SqueezeExcitationRes2NetBlock``).

    The first group passes unchanged; each later one is convolved after the output of the group before was added.
    """

    config: DiTConfig
    index: int  # in ``enc_channels``
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B T C"], length: Int[jax.Array, " B"]) -> Float[jax.Array, "B T C_out"]:
        c = self.config
        kw = dtypes(self)
        width = c.enc_channels[self.index]
        kernel = c.enc_kernel_sizes[self.index]
        dilation = c.enc_dilations[self.index]
        # one frame wide, into and out of the groups
        y = jax.nn.relu(_apply_conv(x, length, width, name="in", **kw))
        # the groups are convolved one after the other, each with the result of the one before
        groups = jnp.split(y, c.enc_res2net_scale, axis=-1)  # each [B, T, C / scale]
        size = groups[0].shape[-1]
        outputs = [groups[0]]
        for g, group in enumerate(groups[1:], start=1):
            # nothing is added to the second group: the first one was not convolved
            summed = group + outputs[-1] if g > 1 else group
            convolved = _apply_conv(summed, length, size, kernel, dilation, name=f"group_{g}", **kw)
            outputs.append(jax.nn.relu(convolved))
        y = jnp.concatenate(outputs, axis=-1)  # [B, T, C]
        y = jax.nn.relu(_apply_conv(y, length, width, name="out", **kw))
        return x + y * SqueezeExcitation(width, c.enc_se_channels, name="squeeze", **kw)(y, length)


class SqueezeExcitation(nn.Module):
    """A weight between 0 and 1 for each channel, from the channels' means over time. [B, T, width] to [B, 1, width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, length: Int[jax.Array, " B"]) -> jax.Array:
        kw = dtypes(self)
        y = jnp.sum(_equal_weights(x, length) * x, axis=1, keepdims=True)  # [B, 1, width]
        y = jax.nn.relu(_apply_conv(y, length, self.hidden, name="down", **kw))
        return jax.nn.sigmoid(_apply_conv(y, length, self.width, name="up", **kw))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time, weighted by frame and channel. [B, T, width] to [B, 2 * width]"""

    width: int
    hidden: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, length: Int[jax.Array, " B"]) -> jax.Array:
        kw = dtypes(self)
        # each frame is shown the clip's plain mean and deviation, all frames weighing the same
        statistics = _weighted_statistics(x, _equal_weights(x, length))  # [B, 2 * width]
        context = jnp.broadcast_to(statistics[:, None], (*x.shape[:2], 2 * self.width))
        y = jnp.concatenate([x, context], axis=-1)  # [B, T, 3 * width]
        # both, one after the other, as trained
        y = jnp.tanh(jax.nn.relu(_apply_conv(y, length, self.hidden, name="up", **kw)))
        logits = _apply_conv(y, length, self.width, name="down", **kw)  # [B, T, width]
        inside = _is_inside(x, length)
        return _weighted_statistics(x, jax.nn.softmax(logits, axis=1, where=inside))


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


def _is_inside(x: jax.Array, length: Int[jax.Array, " B"]) -> Bool[jax.Array, "B T 1"]:
    """Which frames are a clip's own."""
    return (jnp.arange(x.shape[1]) < length[:, None])[..., None]


def _equal_weights(x: jax.Array, length: Int[jax.Array, " B"]) -> Float[jax.Array, "B T 1"]:
    """The same weight for each frame of a clip, and none for those behind it."""
    return _is_inside(x, length) / length[:, None, None].astype(x.dtype)


def _apply_conv(
    x: Float[jax.Array, "B T inputs"],
    length: Int[jax.Array, " B"],
    outputs: int,
    kernel: int = 1,
    dilation: int = 1,
    **fields: Any,
) -> Float[jax.Array, "B T outputs"]:
    """A convolution, made in the module that is being called, which mirrors both ends of each clip."""
    axes = ("kernel", "channels", "channels")
    weights, bias = Conv1D(x.shape[-1], outputs, kernel, axes=axes, **fields).weights()
    before, after = same_padding(kernel, dilation)
    if before + after:
        # frame -1 is frame 1, and the frame behind the last one is the one before it
        place = jnp.abs(jnp.arange(-before, x.shape[1] + after))  # [T + before + after]
        last = length[:, None] - 1
        place = jnp.where(place > last, 2 * last - place, place)  # [B, T + before + after]
        # far behind the end a mirrored place would lie before the beginning; nothing that is kept reads there
        x = jnp.take_along_axis(x, jnp.maximum(place, 0)[..., None], axis=1)
    return conv(x, weights, (0, 0), dilation=dilation) + bias
