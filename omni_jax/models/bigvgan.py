"""The vocoder: log-mel at 100 frames a second to samples (docs/reference.md, 8.9).

Rows may have different lengths, and several spectrograms may lie in a row, ``gap`` frames apart: beyond the ends of
each its convolutions see zeros and its filters its first or last sample, as they would if it were alone.

Every SnakeBeta is applied at twice the rate, between two fixed 12-tap low-pass filters. Both filters are written as
shifted sums over the two phases (even and odd samples) and never as convolutions of single channels, which compilers
for CPUs and TPUs alike turn into slow loops.

Letters: B rows, P spectrograms in a row, T frames or samples at the rate of a stage, C channels, M mel bins, k taps.
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
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import Conv1D, UpsamplingConv1D, conv, same_padding
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import full_precision

EDGE_KERNEL = 7  # of the first and the last convolution; in no file
NOWHERE = 1 << 20  # frames: where a spectrogram begins that is not there

_AXES = ("kernel", "channels", "channels")
# in decibels: the floor of the amplitude, and what is subtracted from each level
_FLOOR_DB = -115.0
_REFERENCE_DB = 20.0
# of the low-pass filter before and after each activation
_TAPS = 12
_REACH = _TAPS // 4  # samples on either side that a filter's phase reads
ACTIVATION_REACH = 2 * _REACH - 1  # samples on either side that an activation between two filters depends on


@struct.dataclass
class PackedSpectrograms:
    """Where spectrograms lie in rows, counted at one of the rates."""

    begin: Int[Array, "B P"]
    length: Int[Array, "B P"]
    inside: Bool[Array, "B T"]

    def upsample(self, rate: int) -> PackedSpectrograms:
        """The same at ``rate`` times the rate."""
        return PackedSpectrograms(self.begin * rate, self.length * rate, jnp.repeat(self.inside, rate, axis=1))


def make_packed(frames: int, length: Array, begin: Array | None = None) -> PackedSpectrograms:
    """``length`` and ``begin`` as ``BigVGAN`` takes them, in rows of ``frames`` frames."""
    length = jnp.asarray(length)
    if begin is None:
        length = length[:, None]  # [B, 1]
        begin = jnp.zeros_like(length)
    begin = jnp.asarray(begin)
    # a frame is inside if any of the row's spectrograms has it
    frame = jnp.arange(frames)[None, :, None]  # [1, T, 1]
    inside = (frame >= begin[:, None]) & (frame < (begin + length)[:, None])  # [B, T, P]
    return PackedSpectrograms(begin, length, jnp.any(inside, axis=2))


def gap(config: BigVGANConfig) -> int:
    """Frames between two spectrograms in a row, so that neither reads what the other writes."""
    # what an operation writes beyond the ends is replaced before the next one reads there
    # so the gap is what the widest operation reads, not the sum over all of them
    # in samples of a stage; 6 at least, since 3 are written beyond either end (``pad_edges``)
    widest = 2 * _REACH
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        for dilation in dilations:
            widest = max(widest, *same_padding(kernel, dilation))
    frames = max(same_padding(EDGE_KERNEL, 1))
    rate = 1  # samples a frame before a stage
    for upsample_rate, kernel in zip(config.upsample_rates, config.upsample_kernel_sizes, strict=True):
        frames = max(frames, -(-kernel // (upsample_rate * rate)))  # no frame is read from further away
        rate *= upsample_rate
        # rounded up to frames of the mel, which the gap is counted in
        frames = max(frames, -(-widest // rate))
    return frames


class BigVGAN(nn.Module):
    """Six stages, each of more samples and fewer channels (reference ``Qwen2_5OmniToken2WavBigVGANModel``)."""

    config: BigVGANConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        channels = c.upsample_initial_channel
        last = channels >> len(c.upsample_rates)
        self.conv_in = Conv1D(c.mel_dim, channels, EDGE_KERNEL, axes=_AXES, **kw)
        self.stage = [VocoderStage(c, i, **kw) for i in range(len(c.upsample_rates))]
        self.activation = SnakeBeta(last, **kw)
        self.conv_out = Conv1D(last, 1, EDGE_KERNEL, use_bias=False, axes=_AXES, **kw)

    def __call__(
        self,
        mel: Float[Array, "B T M"],
        length: Int[Array, " B"] | Int[Array, "B P"],
        begin: Int[Array, "B P"] | None = None,
    ) -> Float[jax.Array, "B samples"]:
        """Samples from -1 to 1, ``samples_per_frame`` for each frame; zeros where no spectrogram is.

        Args:
          mel: log-mel, natural logarithm.
          length: frames of each row that are real; or of each of the P spectrograms in it.
          begin: the first frame of each, at least ``gap`` frames behind the end of the one before it; ``NOWHERE`` for
            one that is not there.
        """
        packed = make_packed(mel.shape[1], length, begin)
        x = self.apply_input(mel, packed)
        for i, rate in enumerate(self.config.upsample_rates):
            x = self.apply_stage(x, packed, i)
            packed = packed.upsample(rate)
        return self.apply_output(x, packed)

    @full_precision
    def apply_input(self, mel: Float[Array, "B T M"], packed: PackedSpectrograms) -> Float[jax.Array, "B T C"]:
        """The scaling of the mel and the first convolution."""
        with jax.named_scope("vocoder_input"):
            scaled = scale_mel(jnp.asarray(mel, self.dtype))
            return self.conv_in(_zero_outside(scaled, packed))

    @full_precision
    def apply_stage(self, x: Float[Array, "B T C"], packed: PackedSpectrograms, stage: int) -> jax.Array:
        """One stage; ``packed`` is at the rate before it. [B, T * rate, C / 2]"""
        with jax.named_scope(f"vocoder_stage_{stage}"):
            return self.stage[stage](x, packed)

    @full_precision
    def apply_output(self, x: Float[Array, "B T C"], packed: PackedSpectrograms) -> Float[jax.Array, "B T"]:
        """The last activation and convolution."""
        with jax.named_scope("vocoder_output"):
            y = self.conv_out(filtered_snake_beta(x, packed, self.activation()))  # [B, T, 1]
            return _zero_outside(jnp.clip(y, -1.0, 1.0), packed)[..., 0]


class VocoderStage(nn.Module):
    """A transposed convolution, then the mean of residual blocks of different reach."""

    config: BigVGANConfig
    index: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T C"], packed: PackedSpectrograms) -> jax.Array:
        c = self.config
        kw = dtypes(self)
        channels = c.upsample_initial_channel >> self.index
        kernel = c.upsample_kernel_sizes[self.index]
        rate = c.upsample_rates[self.index]
        # half as many channels, ``rate`` times as many samples
        upsample = UpsamplingConv1D(channels, channels // 2, kernel, rate, axes=_AXES, name="upsample", **kw)
        x = upsample(_zero_outside(x, packed))  # [B, T * rate, C / 2]
        blocks = []
        for i, kernel in enumerate(c.resblock_kernel_sizes):
            block = VocoderBlock(channels // 2, kernel, c.resblock_dilation_sizes[i], name=f"block_{i}", **kw)
            blocks.append(block())
        return mean_of_blocks(x, packed.upsample(rate), blocks)


class SnakeBetaWeights(NamedTuple):
    """The logarithms of each channel's frequency, and of the inverse of its height."""

    alpha: Float[jax.Array, " C"]
    beta: Float[jax.Array, " C"]


class ConvWeights(NamedTuple):
    """Of a convolution from as many channels to as many."""

    kernel: Float[jax.Array, "k C C"]
    bias: Float[jax.Array, " C"]


class Round(NamedTuple):
    """SnakeBeta, dilated convolution, SnakeBeta, convolution; around them a residual connection."""

    activations: tuple[SnakeBetaWeights, SnakeBetaWeights]
    convs: tuple[ConvWeights, ConvWeights]
    dilation: int


class VocoderBlock(nn.Module):
    """The weights of a block's rounds (reference ``AMPBlock``)."""

    channels: int
    kernel: int
    dilations: tuple[int, ...]
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> list[Round]:
        kw = dtypes(self)
        rounds = []
        for i, dilation in enumerate(self.dilations):
            rounds.append(VocoderRound(self.channels, self.kernel, dilation, name=f"round_{i}", **kw)())
        return rounds


class VocoderRound(nn.Module):
    """The weights of two activations and two convolutions, the first of them dilated."""

    channels: int
    kernel: int
    dilation: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> Round:
        kw = dtypes(self)
        return Round(
            activations=(
                SnakeBeta(self.channels, name="activation1", **kw)(),
                SnakeBeta(self.channels, name="activation2", **kw)(),
            ),
            convs=(
                ConvParams(self.channels, self.kernel, name="conv1", **kw)(),
                ConvParams(self.channels, self.kernel, name="conv2", **kw)(),
            ),
            dilation=self.dilation,
        )


class SnakeBeta(nn.Module):
    """The weights of one SnakeBeta (reference ``SnakeBeta``)."""

    channels: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> SnakeBetaWeights:
        alpha = param(self, "alpha", nn.initializers.zeros, (self.channels,), ("channels",))
        beta = param(self, "beta", nn.initializers.zeros, (self.channels,), ("channels",))
        return SnakeBetaWeights(alpha.astype(self.dtype), beta.astype(self.dtype))


class ConvParams(nn.Module):
    """The weights of a convolution that is called inside a loop, where a module cannot be."""

    channels: int
    kernel: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> ConvWeights:
        shape = (self.kernel, self.channels, self.channels)
        kernel = param(self, "kernel", nn.initializers.lecun_normal(in_axis=(0, 1)), shape, _AXES)
        bias = param(self, "bias", nn.initializers.zeros, (self.channels,), _AXES[2:])
        return ConvWeights(kernel.astype(self.dtype), bias.astype(self.dtype))


def mean_of_blocks(x: Float[Array, "B T C"], packed: PackedSpectrograms, blocks: list[list[Round]]) -> jax.Array:
    """The mean of the outputs of the blocks, each of which takes ``x`` through its rounds.

    One loop over the rounds of all blocks: an activation is compiled twice in a stage and not once a round, which takes
    a sixth of the time, and one block's arrays exist at a time.
    """
    # flat lists over the rounds of all blocks, to be indexed in the loop
    rounds = [r for block in blocks for r in block]
    is_last = jnp.array([i + 1 == len(block) for block in blocks for i in range(len(block))])
    activations = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[r.activations for r in rounds])

    # kernels of different lengths cannot be stacked, so each convolution is a branch
    first_convs = [functools.partial(_same_conv, r.convs[0], r.dilation) for r in rounds]
    second_convs = [functools.partial(_same_conv, r.convs[1], 1) for r in rounds]

    def apply_round(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y, total = carry  # [B, T, C]
        first, second = jax.tree.map(lambda a: a[i], activations)
        z = jax.lax.switch(i, first_convs, filtered_snake_beta(y, packed, first))
        z = jax.lax.switch(i, second_convs, filtered_snake_beta(z, packed, second))
        # at its end a block's output is added to the total, and the next block begins with x again
        y = y + z  # [B, T, C]
        return jnp.where(is_last[i], x, y), jnp.where(is_last[i], total + y, total)

    _, total = jax.lax.fori_loop(0, len(rounds), apply_round, (x, jnp.zeros_like(x)))
    return total / len(blocks)


def _same_conv(weights: ConvWeights, dilation: int, x: jax.Array) -> jax.Array:
    kernel, bias = weights
    return conv(x, kernel, same_padding(kernel.shape[0], dilation), dilation=dilation) + bias


def filtered_snake_beta(x: Float[Array, "B T C"], packed: PackedSpectrograms, weights: SnakeBetaWeights) -> jax.Array:
    """SnakeBeta at twice the rate, between the two filters; zeros where no spectrogram is. [B, T, C]"""
    with jax.named_scope("snake_beta"):
        # a spectrogram's first and last sample are repeated, as if it were alone in the row
        even, odd = upsample_phases(pad_edges(x, x, x, packed))  # two of [B, T, C]
        even = snake_beta(even, *weights)
        odd = snake_beta(odd, *weights)
        # or the compiler computes the activations again where it only needs their ends
        even, odd = jax.lax.optimization_barrier((even, odd))
        # at twice the rate a spectrogram begins with an even sample and ends with an odd one
        y = downsample_phases(pad_edges(even, even, odd, packed), pad_edges(odd, even, odd, packed))
        return _zero_outside(y, packed)


def scale_mel(mel: jax.Array) -> jax.Array:
    """Natural log-mel to decibels, scaled so that -115 to 0 dB, 20 dB down, becomes -1 to 1, and clipped there."""
    amplitude = jnp.maximum(jnp.exp(mel), 10 ** (_FLOOR_DB / 20))
    decibels = 20 * jnp.log10(amplitude) - _REFERENCE_DB
    return jnp.clip(2 * ((decibels - _FLOOR_DB) / -_FLOOR_DB) - 1, -1.0, 1.0)


def snake_beta(x: jax.Array, alpha: jax.Array, beta: jax.Array) -> jax.Array:
    """x + sin(x e^alpha)^2 / e^beta."""
    # 1e-9 as in the reference, where it keeps the quotient finite
    return x + (1 / (jnp.exp(beta) + 1e-9)) * sine_squared(x * jnp.exp(alpha))


def sine_squared(x: jax.Array) -> jax.Array:
    """sin(x)^2, within a few float32 roundings of the argument.

    The square repeats every pi, so the rest of a division by pi and a polynomial of degree 11 are enough, and every
    instruction is one that vector units have; XLA's sine on a CPU is a call for each element.
    """
    periods = jnp.round(x * np.float32(1 / np.pi))
    # pi as two numbers, the first short enough that its products are exact
    r = (x - periods * np.float32(3.140625)) - periods * np.float32(np.pi - 3.140625)
    q = r * r  # r lies between -pi / 2 and pi / 2
    tail = np.float32(0)
    # -1/11!, 1/9!, -1/7!, 1/5!, -1/3!: the Taylor series of the sine, by Horner's rule
    for coefficient in (-1 / 39916800, 1 / 362880, -1 / 5040, 1 / 120, -1 / 6):
        tail = tail * q + np.float32(coefficient)
    s = r + r * (q * tail)
    return s * s


def low_pass() -> np.ndarray:
    """The filter around every activation: a sinc cut off at half the band, under a Kaiser window. float32 [12]"""
    cutoff = 0.25
    half_width = 0.3
    # Kaiser's design formulas: from the width of the transition to the attenuation, then to beta
    attenuation = 2.285 * (_TAPS // 2 - 1) * math.pi * 4 * half_width + 7.95
    window = np.kaiser(_TAPS, 0.1102 * (attenuation - 8.7))
    # an even number of taps: the centre lies between the two middle ones
    taps = window * np.sinc(2 * cutoff * (np.arange(_TAPS) - (_TAPS - 1) / 2))
    # unit gain for a constant
    return (taps / taps.sum()).astype(np.float32)


def upsample_phases(x: Float[Array, "B T+6 C"]) -> tuple[jax.Array, jax.Array]:
    """The even and the odd samples at twice the rate, of padded rows. Two of [B, T, C]"""
    # the filter reads a sequence in which every other sample is zero, hence the gain of 2
    # each phase meets half of the taps
    taps = 2 * low_pass()
    even_taps = {offset: taps[5 - 2 * offset] for offset in range(-_REACH, _REACH)}
    odd_taps = {offset: taps[6 - 2 * offset] for offset in range(1 - _REACH, _REACH + 1)}
    return _shifted_sum(x, even_taps), _shifted_sum(x, odd_taps)


def downsample_phases(even: Float[Array, "B T+6 C"], odd: Float[Array, "B T+6 C"]) -> jax.Array:
    """Every other sample after the filter, of padded phases. [B, T, C]"""
    # the filter at sample 2 t of the higher rate; what lies between would be dropped, so it is not computed
    taps = low_pass()
    even_taps = {offset: taps[5 + 2 * offset] for offset in range(1 - _REACH, _REACH + 1)}
    odd_taps = {offset: taps[6 + 2 * offset] for offset in range(-_REACH, _REACH)}
    return _shifted_sum(even, even_taps) + _shifted_sum(odd, odd_taps)


def pad_edges(x: Array, first: Array, last: Array, packed: PackedSpectrograms) -> jax.Array:
    """Rows with what filters read beyond the ends of each spectrogram. [B, T + 6, C]

    Args:
      x: the rows, [B, T, C].
      first: a spectrogram's first frame in it is written 3 times in front.
      last: a spectrogram's last frame in it is written 3 times behind.
      packed: where the spectrograms lie.
    """
    rows = jnp.arange(x.shape[0])[:, None]  # [B, 1]
    end = packed.begin + packed.length
    edges = jnp.stack([first[rows, packed.begin], last[rows, jnp.maximum(end - 1, 0)]], axis=2)  # [B, P, 2, C]
    # only these frames are written: what stands further beyond the ends is read by nothing that is kept
    places = jnp.stack([packed.begin, end + _REACH], axis=2)[..., None] + jnp.arange(_REACH)  # [B, P, 2, 3]
    padded = jnp.pad(x, ((0, 0), (_REACH, _REACH), (0, 0)))
    # a spectrogram that is not there begins far beyond the row, and is dropped here
    return padded.at[rows[..., None, None], places].set(edges[:, :, :, None], mode="drop")


def _shifted_sum(x: Array, taps: dict[int, np.float32]) -> jax.Array:
    """The sum of ``tap * x[t + offset]`` over ``taps``, offset to tap, for a padded ``x``. [B, T, C]"""
    x = jnp.asarray(x)
    length = x.shape[1] - 2 * _REACH
    parts = []
    for offset, tap in taps.items():
        # sample 0 stands at index ``_REACH`` of the padded row
        begin = _REACH + offset
        parts.append(tap * x[:, begin : begin + length])
    return sum(parts[1:], start=parts[0])


def _zero_outside(x: Array, packed: PackedSpectrograms) -> jax.Array:
    """Zeros where no spectrogram is."""
    return jnp.where(packed.inside[..., None], x, 0)
