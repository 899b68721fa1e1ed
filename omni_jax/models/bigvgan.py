"""The vocoder: log-mel at 100 frames a second to samples (docs/reference.md, 8.9).

Rows may have different lengths: beyond the ends of each its convolutions see zeros and its filters its first or last
sample, as they would if it were alone.

Compilers decide its form. A convolution is a loop over its taps, each one matrix product, and the 18 convolutions of
the residual blocks of a stage are one loop over kernels that lie one behind the other: compiled for a TPU one by one,
the 108 convolutions of different shapes take minutes, and some never end. On a CPU each is one of its own, which takes
three fifths of the time there.

Every SnakeBeta is applied at twice the rate, between two fixed 12-tap low-pass filters, which are shifted sums over the
two phases (even and odd samples) and never convolutions of single channels, for those become slow loops on CPUs and
TPUs alike.

Letters: B rows, T frames or samples at the rate of a stage, C channels, M mel bins, k taps, H convolutions of a stage's
blocks, K taps of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
from omni_jax.layers.conv import Conv1D, UpsamplingConv1D, conv, conv_taps, same_padding, upsampling_padding
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import Precision
from omni_jax.models.conv_table import make_conv_table

EDGE_KERNEL = 7  # of the first and the last convolution; in no file

_AXES = ("kernel", "channels", "channels")
# in decibels: the floor of the amplitude, and what is subtracted from each level
_FLOOR_DB = -115.0
_REFERENCE_DB = 20.0
# of the low-pass filter before and after each activation
_TAPS = 12
_REACH = _TAPS // 4  # samples on either side that a filter's phase reads
ACTIVATION_REACH = 2 * _REACH - 1  # samples on either side that an activation between two filters depends on


class ConvWeights(NamedTuple):
    """Of one convolution; a transposed one's are those of an ordinary one, all phases of whose output are channels."""

    kernel: Float[jax.Array, "k inputs outputs"]
    bias: Float[jax.Array, " outputs"]


class SnakeBetaWeights(NamedTuple):
    """The logarithms of each channel's frequency, and of the inverse of its height."""

    alpha: Float[jax.Array, "... C"]
    beta: Float[jax.Array, "... C"]


@struct.dataclass
class StageWeights:
    """A stage's weights. Its residual blocks lie one behind the other, each as its convolutions in their order.

    Attributes:
      upsample: the transposed convolution.
      activations: before each convolution, [H, C].
      kernels: of all convolutions, the taps of one behind those of the other; or, for a CPU, an array for each.
      biases: of each.
    """

    upsample: ConvWeights
    activations: SnakeBetaWeights
    kernels: Float[jax.Array, "K C C"] | tuple[Float[jax.Array, "k C C"], ...]
    biases: Float[jax.Array, "H C"]


@struct.dataclass
class VocoderWeights:
    """The parameters as the programs read them; ``BigVGAN.weights`` makes them of those of a checkpoint."""

    conv_in: ConvWeights
    stages: tuple[StageWeights, ...]
    activation: SnakeBetaWeights
    conv_out: Float[jax.Array, "k C"]
    precision: Precision = struct.field(pytree_node=False, default="highest")  # of the products with them

    @property
    def convolve(self) -> Callable[..., jax.Array]:
        """How convolutions of stride 1 are computed: as such where each has its own kernel, else tap by tap."""
        return conv if isinstance(self.stages[0].kernels, tuple) else conv_taps


@struct.dataclass
class RowEnds:
    """Which samples of rows are real, at one of the rates.

    Attributes:
      length: of each row.
      inside: whether a sample is one of them.
    """

    length: Int[Array, " B"]
    inside: Bool[Array, "B T"]

    def upsample(self, rate: int) -> RowEnds:
        """The same at ``rate`` times the rate."""
        return make_row_ends(self.inside.shape[1] * rate, jnp.asarray(self.length) * rate)


def make_row_ends(num_frames: int, length: Int[Array, " B"]) -> RowEnds:
    """Of rows of ``num_frames`` frames, whose first ``length`` are real."""
    length = jnp.asarray(length)
    return RowEnds(length, jnp.arange(num_frames) < length[:, None])


class BigVGAN(nn.Module):
    """The parameters of six stages, each of more samples and fewer channels, and their use.

    Reference: ``Qwen2_5OmniToken2WavBigVGANModel``.
    """

    config: BigVGANConfig
    precision: Precision = "highest"
    # whether every convolution is one of its own. A CPU takes three fifths of the time that it takes for loops over
    # taps; a TPU's compiler takes minutes
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        channels = c.upsample_initial_channel
        last = channels >> len(c.upsample_rates)
        self.conv_in = Conv1D(c.mel_dim, channels, EDGE_KERNEL, axes=_AXES, **kw)
        stages = range(len(c.upsample_rates))
        self.stage = [VocoderStage(c, i, single_convs=self.single_convs, **kw) for i in stages]
        self.activation = SnakeBeta(last, **kw)
        self.conv_out = Conv1D(last, 1, EDGE_KERNEL, use_bias=False, axes=_AXES, **kw)

    def __call__(self, mel: Float[Array, "B T M"], length: Int[Array, " B"]) -> Float[jax.Array, "B samples"]:
        """``synthesize`` with the module's parameters."""
        return synthesize(self.config, self.weights(), mel, length)

    def weights(self) -> VocoderWeights:
        """The parameters as the programs read them: kernels side by side, which is a copy of all of them."""
        kernel, bias = self.conv_in.weights()
        conv_out, _ = self.conv_out.weights()
        stages = tuple(stage() for stage in self.stage)
        return VocoderWeights(ConvWeights(kernel, bias), stages, self.activation(), conv_out[..., 0], self.precision)


class VocoderStage(nn.Module):
    """The weights of a transposed convolution, and of residual blocks of different reach."""

    config: BigVGANConfig
    index: int
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> StageWeights:
        c = self.config
        kw = dtypes(self)
        inputs = c.upsample_initial_channel >> self.index
        channels = inputs // 2  # half as many, and ``rate`` times as many samples
        kernel = c.upsample_kernel_sizes[self.index]
        rate = c.upsample_rates[self.index]
        upsample = UpsamplingConv1D(inputs, channels, kernel, rate, axes=_AXES, name="upsample", **kw)
        halves: list[HalfRound] = []
        for i, kernel in enumerate(c.resblock_kernel_sizes):
            halves += VocoderBlock(channels, kernel, len(c.resblock_dilation_sizes[i]), name=f"block_{i}", **kw)()
        kernels = [half.conv.kernel for half in halves]
        return StageWeights(
            upsample=ConvWeights(*upsample.weights()),
            activations=SnakeBetaWeights(
                jnp.stack([half.activation.alpha for half in halves]),
                jnp.stack([half.activation.beta for half in halves]),
            ),
            kernels=tuple(kernels) if self.single_convs else jnp.concatenate(kernels),
            biases=jnp.stack([half.conv.bias for half in halves]),
        )


class HalfRound(NamedTuple):
    """SnakeBeta and a convolution. Two of them, with a residual connection around both, are a round."""

    activation: SnakeBetaWeights
    conv: ConvWeights


class VocoderBlock(nn.Module):
    """The weights of a block's rounds, two halves each (reference ``AMPBlock``)."""

    channels: int
    kernel: int
    num_rounds: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> list[HalfRound]:
        halves: list[HalfRound] = []
        for i in range(self.num_rounds):
            halves += VocoderRound(self.channels, self.kernel, name=f"round_{i}", **dtypes(self))()
        return halves


class VocoderRound(nn.Module):
    """The weights of two activations and two convolutions."""

    channels: int
    kernel: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self) -> list[HalfRound]:
        kw = dtypes(self)
        halves = []
        for number in (1, 2):
            activation = SnakeBeta(self.channels, name=f"activation{number}", **kw)()
            conv = Conv1D(self.channels, self.channels, self.kernel, axes=_AXES, name=f"conv{number}", **kw)
            halves.append(HalfRound(activation, ConvWeights(*conv.weights())))
        return halves


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


def synthesize(
    config: BigVGANConfig, weights: VocoderWeights, mel: Float[Array, "B T M"], length: Int[Array, " B"]
) -> Float[jax.Array, "B samples"]:
    """Samples from -1 to 1, as many for each frame as the rates multiply to; zeros after a row's end.

    Args:
      config: of the vocoder.
      weights: its parameters.
      mel: log-mel, natural logarithm.
      length: frames of each row that are real.
    """
    ends = make_row_ends(mel.shape[1], length)
    x = apply_input(weights, mel, ends)  # [B, T, C]
    for stage, rate in enumerate(config.upsample_rates):
        x = apply_stage(config, weights, x, ends, stage)  # [B, T * rate, C / 2]
        ends = ends.upsample(rate)
    return apply_output(weights, x, ends)


def apply_input(weights: VocoderWeights, mel: Float[Array, "B T M"], ends: RowEnds) -> Float[jax.Array, "B T C"]:
    """The scaling of the mel and the first convolution."""
    with jax.named_scope("vocoder_input"), jax.default_matmul_precision(weights.precision):
        kernel, bias = weights.conv_in
        scaled = _zero_outside(scale_mel(jnp.asarray(mel, kernel.dtype)), ends)
        return weights.convolve(scaled, kernel, same_padding(EDGE_KERNEL, 1)) + bias


def apply_stage(
    config: BigVGANConfig, weights: VocoderWeights, x: Float[Array, "B T C"], ends: RowEnds, stage: int
) -> Float[jax.Array, "B T_up C/2"]:
    """A transposed convolution, then the mean of the residual blocks; ``ends`` are at the rate before it."""
    with jax.named_scope(f"vocoder_stage_{stage}"), jax.default_matmul_precision(weights.precision):
        rate = config.upsample_rates[stage]
        kernel, bias = weights.stages[stage].upsample
        padding = upsampling_padding(config.upsample_kernel_sizes[stage], rate)
        # each frame becomes ``rate`` frames, which lie side by side in its channels
        phases = weights.convolve(_zero_outside(x, ends), kernel, padding)  # [B, T, rate * C / 2]
        upsampled = phases.reshape(x.shape[0], x.shape[1] * rate, -1) + bias  # [B, T * rate, C / 2]
        return mean_of_blocks(config, weights.stages[stage], upsampled, ends.upsample(rate))


def apply_output(weights: VocoderWeights, x: Float[Array, "B T C"], ends: RowEnds) -> Float[jax.Array, "B T"]:
    """The last activation and convolution."""
    with jax.named_scope("vocoder_output"):
        x = filtered_snake_beta(x, ends, weights.activation)  # [B, T, C]
        padded = jnp.pad(x, ((0, 0), same_padding(EDGE_KERNEL, 1), (0, 0)))
        y = jnp.zeros(x.shape[:2], x.dtype)
        # one channel comes out, which is no work for matrix units
        for tap in range(EDGE_KERNEL):
            y += jnp.sum(padded[:, tap : tap + x.shape[1]] * weights.conv_out[tap], axis=2)  # [B, T]
        return jnp.where(ends.inside, jnp.clip(y, -1.0, 1.0), 0)


def mean_of_blocks(
    config: BigVGANConfig, weights: StageWeights, x: Float[Array, "B T C"], ends: RowEnds
) -> Float[jax.Array, "B T C"]:
    """The mean of the outputs of the blocks, each of which takes ``x`` through its rounds."""
    kernels = weights.kernels
    if isinstance(kernels, tuple):
        return _mean_of_single_convs(config, weights, kernels, x, ends)
    table = make_conv_table(config)
    num_taps, dilation, first_tap, before, ends_round, ends_block = map(jnp.asarray, table)
    num_rows, num_samples, channels = x.shape
    # room for the convolution that reads furthest, rounded to where rows of a TPU's memory begin
    side = int(np.max((table.num_taps - 1) * table.dilation - table.before))
    side = -(-side // 8) * 8

    def apply_conv(h: jax.Array, y: jax.Array) -> jax.Array:
        padded = jnp.pad(y, ((0, 0), (side, side), (0, 0)))

        def add_tap(tap: jax.Array, total: jax.Array) -> jax.Array:
            begin = side - before[h] + tap * dilation[h]
            shifted = jax.lax.dynamic_slice_in_dim(padded, begin, num_samples, axis=1)  # [B, T, C]
            kernel = jax.lax.dynamic_index_in_dim(kernels, first_tap[h] + tap, keepdims=False)  # [C, C]
            product = shifted.reshape(num_rows * num_samples, channels) @ kernel
            return total + product.reshape(y.shape)

        bias = jnp.broadcast_to(weights.biases[h], y.shape)
        return jax.lax.fori_loop(0, num_taps[h], add_tap, bias)

    def apply_half_round(h: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        round_input, y, total = carry  # [B, T, C]
        activation = jax.tree.map(lambda a: a[h], weights.activations)
        z = apply_conv(h, filtered_snake_beta(y, ends, activation))
        # at the end of a round its input is added; at that of a block the next one begins with x again
        output = round_input + z
        total = jnp.where(ends_block[h], total + output, total)
        next_input = jnp.where(ends_block[h], x, output)
        y = jnp.where(ends_round[h], next_input, z)
        return jnp.where(ends_round[h], next_input, round_input), y, total

    x = jnp.asarray(x)
    _, _, total = jax.lax.fori_loop(0, len(table.num_taps), apply_half_round, (x, x, jnp.zeros_like(x)))
    return total / len(config.resblock_kernel_sizes)


def _mean_of_single_convs(
    config: BigVGANConfig,
    weights: StageWeights,
    kernels: Sequence[Float[jax.Array, "k C C"]],
    x: Float[Array, "B T C"],
    ends: RowEnds,
) -> Float[jax.Array, "B T C"]:
    """``mean_of_blocks`` with each convolution written out."""
    total = jnp.zeros_like(x)
    h = 0
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        y = jnp.asarray(x)
        for of_round in dilations:
            z = y
            for dilation in (of_round, 1):
                activation = jax.tree.map(lambda a, h=h: a[h], weights.activations)
                z = filtered_snake_beta(z, ends, activation)
                z = conv(z, kernels[h], same_padding(kernel, dilation), dilation=dilation) + weights.biases[h]
                h += 1
            y = y + z
        total = total + y
    return total / len(config.resblock_kernel_sizes)


def filtered_snake_beta(x: Float[Array, "B T C"], ends: RowEnds, weights: SnakeBetaWeights) -> jax.Array:
    """SnakeBeta at twice the rate, between the two filters; zeros after a row's end. [B, T, C]"""
    with jax.named_scope("snake_beta"):
        # a row's first and last sample are repeated
        even, odd = upsample_phases(pad_edges(x, x, x, ends))  # two of [B, T, C]
        even = snake_beta(even, *weights)
        odd = snake_beta(odd, *weights)
        # or the compiler computes the activations again where it only needs their ends
        even, odd = jax.lax.optimization_barrier((even, odd))
        # at twice the rate a row begins with an even sample and ends with an odd one
        y = downsample_phases(pad_edges(even, even, odd, ends), pad_edges(odd, even, odd, ends))
        return _zero_outside(y, ends)


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


def pad_edges(x: Array, first: Array, last: Array, ends: RowEnds) -> jax.Array:
    """Rows with what filters read beyond their ends. [B, T + 6, C]

    Args:
      x: the rows, [B, T, C].
      first: its first frame stands 3 times in front.
      last: a row's last frame in it stands after the row's end.
      ends: of the rows.
    """
    # three equal places and not one: of one place of a single row a compiler for CPUs makes a slice, which it computes
    # again for every sample that reads it, and that takes ten times as long
    last_place = jnp.maximum(ends.length - 1, 0)[:, None, None]  # [B, 1, 1]
    last_place = jnp.broadcast_to(last_place, (x.shape[0], _REACH, 1))  # [B, 3, 1]
    behind = jnp.take_along_axis(jnp.asarray(last), last_place, axis=1)  # [B, 3, C]
    front = jnp.repeat(jnp.asarray(first)[:, :1], _REACH, axis=1)  # [B, 3, C]
    x = jnp.where(ends.inside[..., None], x, behind[:, :1])  # [B, T, C]
    return jnp.concatenate([front, x, behind], axis=1)


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


def _zero_outside(x: Array, ends: RowEnds) -> jax.Array:
    """Zeros after a row's end."""
    return jnp.where(ends.inside[..., None], x, 0)
