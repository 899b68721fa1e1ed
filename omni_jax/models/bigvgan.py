"""The vocoder: log-mel at 100 frames a second to samples (docs/reference.md, 8.9).

Rows may have different lengths: beyond the ends of each its convolutions see zeros and its filters its first or last
sample, as they would if it were alone.

Compilers decide its form. A convolution is a loop over its taps, each one matrix product, and the 18 convolutions of
the residual blocks of a stage are one loop over kernels that lie one behind the other: compiled for a TPU one by one,
the 108 convolutions of different shapes take minutes, and some never end. On a CPU each is one of its own, which takes
three fifths of the time there.

In training all frames of all rows are real, and the loop over convolutions keeps the input of each and computes the
rest again (``models.conv_table``).

Letters: B rows, T frames or samples at the rate of a stage, C channels, M mel bins, k taps, H convolutions of a stage's
blocks, K taps of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import Conv1D, UpsamplingConv1D, conv, conv_taps, same_padding, upsampling_padding
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.precision import Precision
from omni_jax.models.conv_table import make_conv_table, table_conv
from omni_jax.models.row_ends import RowEnds, make_row_ends, zero_outside
from omni_jax.models.snake_beta import SnakeBetaWeights, filtered_snake_beta

EDGE_KERNEL = 7  # of the first and the last convolution; in no file

_AXES = ("kernel", "channels", "channels")
# in decibels: the floor of the amplitude, and what is subtracted from each level
_FLOOR_DB = -115.0
_REFERENCE_DB = 20.0


class ConvWeights(NamedTuple):
    """Of one convolution; a transposed one's are those of an ordinary one, all phases of whose output are channels."""

    kernel: Float[jax.Array, "k inputs outputs"]
    bias: Float[jax.Array, " outputs"]


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

    def __call__(self, mel: Float[Array, "B T M"], length: Int[Array, " B"] | None) -> Float[jax.Array, "B samples"]:
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
    config: BigVGANConfig, weights: VocoderWeights, mel: Float[Array, "B T M"], length: Int[Array, " B"] | None
) -> Float[jax.Array, "B samples"]:
    """Samples from -1 to 1, as many for each frame as the rates multiply to; zeros after a row's end.

    Args:
      config: of the vocoder.
      weights: its parameters.
      mel: log-mel, natural logarithm.
      length: frames of each row that are real; None: all, as in training, which has a cheaper gradient, and where
        samples may be larger.
    """
    ends = None if length is None else make_row_ends(mel.shape[1], length)
    x = apply_input(weights, mel, ends)  # [B, T, C]
    for stage, rate in enumerate(config.upsample_rates):
        x = apply_stage(config, weights, x, ends, stage)  # [B, T * rate, C / 2]
        ends = _upsample_ends(ends, rate)
    return apply_output(weights, x, ends)


def apply_input(weights: VocoderWeights, mel: Float[Array, "B T M"], ends: RowEnds | None) -> Float[jax.Array, "B T C"]:
    """The scaling of the mel and the first convolution."""
    with jax.named_scope("vocoder_input"), jax.default_matmul_precision(weights.precision):
        kernel, bias = weights.conv_in
        scaled = zero_outside(scale_mel(jnp.asarray(mel, kernel.dtype)), ends)
        return weights.convolve(scaled, kernel, same_padding(EDGE_KERNEL, 1)) + bias


def apply_stage(
    config: BigVGANConfig, weights: VocoderWeights, x: Float[Array, "B T C"], ends: RowEnds | None, stage: int
) -> Float[jax.Array, "B T_up C/2"]:
    """A transposed convolution, then the mean of the residual blocks; ``ends`` are at the rate before it."""
    with jax.named_scope(f"vocoder_stage_{stage}"), jax.default_matmul_precision(weights.precision):
        rate = config.upsample_rates[stage]
        kernel, bias = weights.stages[stage].upsample
        padding = upsampling_padding(config.upsample_kernel_sizes[stage], rate)
        # each frame becomes ``rate`` frames, which lie side by side in its channels
        phases = weights.convolve(zero_outside(x, ends), kernel, padding)  # [B, T, rate * C / 2]
        upsampled = phases.reshape(x.shape[0], x.shape[1] * rate, -1) + bias  # [B, T * rate, C / 2]
        return mean_of_blocks(config, weights.stages[stage], upsampled, _upsample_ends(ends, rate))


def apply_output(weights: VocoderWeights, x: Float[Array, "B T C"], ends: RowEnds | None) -> Float[jax.Array, "B T"]:
    """The last activation and convolution."""
    with jax.named_scope("vocoder_output"):
        x = filtered_snake_beta(x, ends, weights.activation)  # [B, T, C]
        padded = jnp.pad(x, ((0, 0), same_padding(EDGE_KERNEL, 1), (0, 0)))
        y = jnp.zeros(x.shape[:2], x.dtype)
        # one channel comes out, which is no work for matrix units
        for tap in range(EDGE_KERNEL):
            y += jnp.sum(padded[:, tap : tap + x.shape[1]] * weights.conv_out[tap], axis=2)  # [B, T]
        # a sample that is cut off has no gradient, with which a young vocoder could find back
        if ends is None:
            return y
        return jnp.where(ends.inside, jnp.clip(y, -1.0, 1.0), 0)


def mean_of_blocks(
    config: BigVGANConfig, weights: StageWeights, x: Float[Array, "B T C"], ends: RowEnds | None
) -> Float[jax.Array, "B T C"]:
    """The mean of the outputs of the blocks, each of which takes ``x`` through its rounds."""
    kernels = weights.kernels
    if isinstance(kernels, tuple):
        return _mean_of_single_convs(config, weights, kernels, x, ends)
    table = make_conv_table(config)
    on_device = jax.tree.map(jnp.asarray, table)

    def apply_half_round(h: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        round_input, y, total = carry  # [B, T, C]
        activation, of_conv = jax.tree.map(lambda a: a[h], (weights.activations, on_device))
        activated = filtered_snake_beta(y, ends, activation)
        z = table_conv(table.max_reach, of_conv, kernels, weights.biases[h], activated)
        # at the end of a round its input is added; at that of a block the next one begins with x again
        output = round_input + z
        total = jnp.where(of_conv.ends_block, total + output, total)
        next_input = jnp.where(of_conv.ends_block, x, output)
        y = jnp.where(of_conv.ends_round, next_input, z)
        return jnp.where(of_conv.ends_round, next_input, round_input), y, total

    x = jnp.asarray(x)
    # in training
    body = jax.checkpoint(apply_half_round) if ends is None else apply_half_round
    _, _, total = jax.lax.fori_loop(0, len(table.num_taps), body, (x, x, jnp.zeros_like(x)))
    return total / len(config.resblock_kernel_sizes)


def _mean_of_single_convs(
    config: BigVGANConfig,
    weights: StageWeights,
    kernels: Sequence[Float[jax.Array, "k C C"]],
    x: Float[Array, "B T C"],
    ends: RowEnds | None,
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


def scale_mel(mel: jax.Array) -> jax.Array:
    """Natural log-mel to decibels, scaled so that -115 to 0 dB, 20 dB down, becomes -1 to 1, and clipped there."""
    amplitude = jnp.maximum(jnp.exp(mel), 10 ** (_FLOOR_DB / 20))
    decibels = 20 * jnp.log10(amplitude) - _REFERENCE_DB
    return jnp.clip(2 * ((decibels - _FLOOR_DB) / -_FLOOR_DB) - 1, -1.0, 1.0)


def _upsample_ends(ends: RowEnds | None, rate: int) -> RowEnds | None:
    """The same at ``rate`` times the rate."""
    return None if ends is None else ends.upsample(rate)
