"""The vocoder: log-mel at 100 frames a second to samples (section 8.9; ``Qwen2_5OmniToken2WavBigVGANModel``).

Arrays are [B, T, C]. Rows may have different lengths, and several spectrograms may lie in a row, ``gap`` frames apart:
beyond the ends of each its convolutions see zeros and its filters its first or last sample, as they would if it were
alone.

Every wave function is applied at twice the rate, between two fixed 12-tap low-pass filters. Both filters are written
as shifted sums over the two phases (even and odd samples) and never as convolutions of single channels, which
compilers for CPUs and TPUs alike turn into slow loops.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import Conv1D, UpsamplingConv1D, conv, same_sides
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import full_precision

Weights: TypeAlias = tuple[jax.Array, jax.Array]

EDGE_KERNEL = 7  # of the first and the last convolution; in no file
_AXES = ("kernel", "channels", "channels")
NOWHERE = 1 << 20  # frames: where a spectrogram begins that is not there
_FLOOR_DB, _REFERENCE_DB = -115.0, 20.0

_TAPS = 12
_REACH = _TAPS // 4  # samples on either side that a filter's phase reads
ACTIVATION_REACH = 2 * _REACH - 1  # and that a wave between two filters depends on


@struct.dataclass
class PackedSpectrograms:
    """Where spectrograms lie in rows, counted at one of the rates."""

    begin: Int[Array, "B S"]
    length: Int[Array, "B S"]
    inside: Bool[Array, "B T"]

    def faster(self, rate: int) -> PackedSpectrograms:
        """The same at a higher rate."""
        return PackedSpectrograms(self.begin * rate, self.length * rate, jnp.repeat(self.inside, rate, axis=1))


def make_packed(frames: int, length: Array, begin: Array | None = None) -> PackedSpectrograms:
    """``length`` and ``begin`` as ``BigVGAN`` takes them, in rows of so many frames."""
    length = jnp.asarray(length)
    if begin is None:
        length = length[:, None]
        begin = jnp.zeros_like(length)
    begin = jnp.asarray(begin)
    frame = jnp.arange(frames)[None, :, None]
    inside = (frame >= begin[:, None]) & (frame < (begin + length)[:, None])
    return PackedSpectrograms(begin, length, jnp.any(inside, axis=2))


def gap(config: BigVGANConfig) -> int:
    """Frames between two spectrograms in a row, so that neither reads what the other writes."""
    widest = max(
        side
        for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
        for dilation in dilations
        for side in same_sides(kernel, dilation)
    )
    frames, rate = max(same_sides(EDGE_KERNEL, 1)), 1
    for faster, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        frames = max(frames, -(-kernel // (faster * rate)))  # no frame is read from further away
        rate *= faster
        frames = max(frames, -(-max(widest, 2 * _REACH) // rate))
    return frames


class BigVGAN(nn.Module):
    """Six stages that each make frames shorter and channels fewer."""

    config: BigVGANConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        channels = c.upsample_initial_channel
        self.conv_in = Conv1D(c.mel_dim, channels, EDGE_KERNEL, axes=_AXES, **kw)
        self.stage = [VocoderStage(c, i, **kw) for i in range(len(c.upsample_rates))]
        last = channels >> len(c.upsample_rates)
        self.activation = Wave(last, **kw)
        self.conv_out = Conv1D(last, 1, EDGE_KERNEL, use_bias=False, axes=_AXES, **kw)

    def __call__(
        self,
        mel: Float[Array, "B T M"],
        length: Int[Array, " B"] | Int[Array, "B S"],
        begin: Int[Array, "B S"] | None = None,
    ) -> Float[jax.Array, "B samples"]:
        """Samples from -1 to 1, ``samples_per_frame`` for each frame; zeros where no spectrogram is.

        Args:
          mel: log-mel, natural logarithm.
          length: frames of each row that are real; or of each of the S spectrograms in it.
          begin: the first frame of each, at least ``gap`` frames behind the end of the one before it; ``NOWHERE`` for
            one that is not there.
        """
        segments = make_packed(mel.shape[1], length, begin)
        x = self.begin(mel, segments)
        for i, rate in enumerate(self.config.upsample_rates):
            x = self.advance(x, segments, i)
            segments = segments.faster(rate)
        return self.end(x, segments)

    @full_precision
    def begin(self, mel: Float[Array, "B T M"], segments: PackedSpectrograms) -> jax.Array:
        """The first convolution. [B, T, channels]"""
        return self.conv_in(_cut(condition_mel(jnp.asarray(mel, self.dtype)), segments))

    @full_precision
    def advance(self, x: jax.Array, segments: PackedSpectrograms, stage: int) -> jax.Array:
        """One stage; ``segments`` are those before it. [B, T * rate, channels / 2]"""
        return self.stage[stage](x, segments)

    @full_precision
    def end(self, x: jax.Array, segments: PackedSpectrograms) -> jax.Array:
        """What follows the stages. [B, samples]"""
        y = self.conv_out(activation(x, segments, self.activation()))
        return _cut(jnp.clip(y, -1.0, 1.0), segments)[..., 0]


class VocoderStage(nn.Module):
    """Stretches time, then takes the mean of blocks that each look differently far."""

    config: BigVGANConfig
    index: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, segments: PackedSpectrograms) -> jax.Array:
        c, kw = self.config, dtypes(self)
        channels, rate = c.upsample_initial_channel >> self.index, c.upsample_rates[self.index]
        kernel = c.upsample_kernel_sizes[self.index]
        up = UpsamplingConv1D(channels, channels // 2, kernel, rate, axes=_AXES, name="upsample", **kw)
        x, segments = up(_cut(x, segments)), segments.faster(rate)
        shapes = zip(c.resblock_kernel_sizes, c.resblock_dilation_sizes, strict=True)
        blocks = [VocoderBlock(channels // 2, k, d, name=f"block_{i}", **kw)() for i, (k, d) in enumerate(shapes)]
        return mean_of_blocks(x, segments, blocks)


class VocoderBlock(nn.Module):
    """The weights of the rounds of a block."""

    channels: int
    kernel: int
    dilations: tuple[int, ...]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> list[Round]:
        shape, kw = (self.channels, self.kernel), dtypes(self)
        return [VocoderRound(*shape, d, name=f"round_{i}", **kw)() for i, d in enumerate(self.dilations)]


class VocoderRound(nn.Module):
    """The weights of two waves and two convolutions, the first of them dilated."""

    channels: int
    kernel: int
    dilation: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Round:
        c, kw = self.channels, dtypes(self)
        waves = [Wave(c, name=f"activation{i}", **kw)() for i in (1, 2)]
        convs = [ConvWeights(c, self.kernel, name=f"conv{i}", **kw)() for i in (1, 2)]
        return Round((waves[0], waves[1]), (convs[0], convs[1]), self.dilation)


class Wave(nn.Module):
    """The logarithms of a wave's frequency and of its inverse height, each channel's. Two of [C]"""

    channels: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Weights:
        names = ("alpha", "beta")
        alpha, beta = (param(self, n, nn.initializers.zeros, (self.channels,), ("channels",)) for n in names)
        return alpha.astype(self.dtype), beta.astype(self.dtype)


class ConvWeights(nn.Module):
    """Kernel [k, C, C] and bias [C] of a convolution that is called inside a loop, where a module cannot be."""

    channels: int
    kernel: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Weights:
        shape = (self.kernel, self.channels, self.channels)
        kernel = param(self, "kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), shape, _AXES)
        bias = param(self, "bias", nn.initializers.zeros, (self.channels,), _AXES[2:])
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Round(NamedTuple):
    """Wave, dilated convolution, wave, convolution; around them a sum."""

    waves: tuple[Weights, Weights]
    convs: tuple[Weights, Weights]
    dilation: int


def mean_of_blocks(x: Float[Array, "B T C"], segments: PackedSpectrograms, blocks: list[list[Round]]) -> jax.Array:
    """The mean of what the blocks make of ``x``, each passing it through its rounds.

    One loop over the rounds of all blocks: a wave is compiled twice in a stage and not once a round, which takes a
    sixth of the time, and one block's arrays exist at a time.
    """
    rounds = [r for block in blocks for r in block]
    ends = jnp.array([i + 1 == len(block) for block in blocks for i in range(len(block))])
    waves = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[r.waves for r in rounds])

    def convolved(i: jax.Array, y: jax.Array, which: int) -> jax.Array:
        branches = [functools.partial(_same_conv, *r.convs[which], r.dilation if which == 0 else 1) for r in rounds]
        return jax.lax.switch(i, branches, y)

    def one(i: jax.Array, loop: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        started, total = loop
        first, second = jax.tree.map(lambda a: a[i], waves)
        y = convolved(i, activation(started, segments, first), 0)
        done = started + convolved(i, activation(y, segments, second), 1)
        return jnp.where(ends[i], x, done), jnp.where(ends[i], total + done, total)

    _, total = jax.lax.fori_loop(0, len(rounds), one, (x, jnp.zeros_like(x)))
    return total / len(blocks)


def _same_conv(kernel: jax.Array, bias: jax.Array, dilation: int, x: jax.Array) -> jax.Array:
    return conv(x, kernel, same_sides(kernel.shape[0], dilation), dilation=dilation) + bias


def activation(x: Float[Array, "B T C"], segments: PackedSpectrograms, wave: Weights) -> jax.Array:
    """SnakeBeta at twice the rate, between the two filters; zeros where no spectrogram is."""
    even, odd = upsample_phases(_prolonged(x, x, x, segments))
    even, odd = (snake_beta(phase, *wave) for phase in (even, odd))
    # or the compiler computes waves again where it only needs their ends
    even, odd = jax.lax.optimization_barrier((even, odd))
    # at twice the rate a spectrogram begins with an even sample and ends with an odd one
    y = downsample_phases(*(_prolonged(phase, even, odd, segments) for phase in (even, odd)))
    return _cut(y, segments)


def condition_mel(mel: jax.Array) -> jax.Array:
    """Natural log-mel to decibels, scaled so that -115 to 0 dB, 20 dB down, becomes -1 to 1, and clipped there."""
    decibels = 20 * jnp.log10(jnp.maximum(jnp.exp(mel), 10 ** (_FLOOR_DB / 20))) - _REFERENCE_DB
    return jnp.clip(2 * ((decibels - _FLOOR_DB) / -_FLOOR_DB) - 1, -1.0, 1.0)


def snake_beta(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """x + sin(x e^alpha)^2 / e^beta."""
    return x + (1 / (jnp.exp(beta) + 1e-9)) * sine_squared(x * jnp.exp(alpha))


def sine_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2, within a few float32 roundings of the argument.

    The square repeats every pi, so the rest of a division by pi and a polynomial of degree 11 are enough, and every
    instruction is one that vector units have; XLA's sine on a CPU is a call for each number.
    """
    turns = jnp.round(x * np.float32(1 / np.pi))
    # pi as two numbers, the first short enough that its products are exact
    r = (x - turns * np.float32(3.140625)) - turns * np.float32(np.pi - 3.140625)
    q = r * r
    tail = np.float32(0)
    for coefficient in (-1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6):
        tail = tail * q + np.float32(coefficient)
    s = r + r * (q * tail)
    return s * s


def low_pass() -> np.ndarray:
    """The filter around every wave: a sinc cut off at half the band, under a Kaiser window. float32 [12]"""
    cutoff, half_width = 0.25, 0.3
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    window = np.kaiser(_TAPS, 0.1102 * (attenuation - 8.7))
    taps = window * np.sinc(2 * cutoff * (np.arange(_TAPS) - (_TAPS - 1) / 2))
    return (taps / taps.sum()).astype(np.float32)


def upsample_phases(x: Float[Array, "B T+6 C"]) -> tuple[jax.Array, jax.Array]:
    """The even and the odd samples of twice the rate, of prolonged rows. Two of [B, T, C]"""
    taps = 2 * low_pass()
    even = _shifted_sum(x, {o: taps[5 - 2 * o] for o in range(-_REACH, _REACH)})
    odd = _shifted_sum(x, {o: taps[6 - 2 * o] for o in range(1 - _REACH, _REACH + 1)})
    return even, odd


def downsample_phases(even: Float[Array, "B T+6 C"], odd: Float[Array, "B T+6 C"]) -> jax.Array:
    """Every other sample after the filter, of prolonged phases. [B, T, C]"""
    taps = low_pass()
    from_even = {o: taps[2 * o + 5] for o in range(1 - _REACH, _REACH + 1)}
    return _shifted_sum(even, from_even) + _shifted_sum(odd, {o: taps[2 * o + 6] for o in range(-_REACH, _REACH)})


def _prolonged(x: Array, first: Array, last: Array, segments: PackedSpectrograms) -> jax.Array:
    """Rows with what filters read beyond the ends: 3 times the first frame, in ``first``, and the last, in ``last``.

    Only those frames are written; what stands further beyond the ends is read by nothing that is kept.
    """
    rows, begin, end = jnp.arange(x.shape[0])[:, None], segments.begin, segments.begin + segments.length
    edges = jnp.stack([first[rows, begin], last[rows, jnp.maximum(end - 1, 0)]], axis=2)
    places = jnp.stack([begin, end + _REACH], axis=2)[..., None] + jnp.arange(_REACH)  # of what is padded below
    y = jnp.pad(x, ((0, 0), (_REACH, _REACH), (0, 0)))
    return y.at[rows[..., None, None], places].set(edges[:, :, :, None], mode="drop")


def _shifted_sum(x: Array, taps: dict[int, np.float32]) -> jax.Array:
    """The sum of ``tap * x[t + offset]`` for a prolonged ``x``, at its own places."""
    length = x.shape[1] - 2 * _REACH
    x = jnp.asarray(x)
    parts = [tap * x[:, _REACH + o : _REACH + o + length] for o, tap in taps.items()]
    return sum(parts[1:], start=parts[0])


def _cut(x: Array, segments: PackedSpectrograms) -> jax.Array:
    """Zeros where no spectrogram is."""
    return jnp.where(segments.inside[..., None], x, 0)
