"""Discriminators of sound, which the vocoder is trained against: each tells recorded samples from generated ones.

Two kinds. By period (HiFi-GAN, https://arxiv.org/abs/2010.05646, section 2.3): every p-th sample is a row of its own,
so that each of them sees other periodic patterns. By resolution (UnivNet, https://arxiv.org/abs/2106.07889, section
2.3, and BigVGAN, https://arxiv.org/abs/2206.04658): the magnitudes of a spectrum as a picture. The second BigVGAN has
constant-Q transforms in place of these. Their lowest octaves look at one to two seconds of sound, which is most of a
segment of training or more than all of it, so that they would see padding; and each is a table of as many taps.

Kernels are trained as they are, without a normalization of weights.

On a TPU the convolutions are matrix products (``conv_products``). As convolutions of 32 channels they would leave most
of its matrix units idle, and its compiler takes half a minute for the gradients of some of them.

Letters: B rows, N samples, p period, T frames, F frequencies, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.layers.conv import Conv1D, conv_products
from omni_jax.layers.params import dtypes, param
from omni_jax.layers.stft import Resolution, stft_magnitude

DISCRIMINATORS = "discriminators"  # the component of a checkpoint

PERIODS = (2, 3, 5, 7, 11)
RESOLUTIONS = (Resolution(1024, 120, 600), Resolution(2048, 240, 1200), Resolution(512, 50, 240))

_SLOPE = 0.1  # of the activations, below 0
_AXES = ("kernel", "channels", "channels")
# by period: channels of each layer, in units of those of the first, and its stride
PERIOD_LAYERS = ((1, 3), (4, 3), (16, 3), (32, 3), (32, 1))
_PERIOD_KERNEL = 5
# by resolution: kernel of each layer over frequencies and frames, and its stride over frames
RESOLUTION_LAYERS = (((3, 9), 1), ((3, 9), 2), ((3, 9), 2), ((3, 9), 2), ((3, 3), 1))
_LAST_KERNEL = 3

# the outputs of all layers of each discriminator, rows first; those of the last are its logits, one channel
FeatureMaps: TypeAlias = tuple[tuple[jax.Array, ...], ...]


class Discriminators(nn.Module):
    """All of them, each with parameters of its own.

    Attributes:
      channels: of the first layer of each; 32 as published.
      single_convs: whether every convolution is one of its own, which on a CPU takes half of the time.
    """

    channels: int = 32
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        kw: dict[str, Any] = dict(single_convs=self.single_convs, **dtypes(self))
        self.period = [PeriodDiscriminator(period, self.channels, **kw) for period in PERIODS]
        self.resolution = [ResolutionDiscriminator(resolution, self.channels, **kw) for resolution in RESOLUTIONS]

    def __call__(self, samples: Float[Array, "B N"]) -> FeatureMaps:
        """What each makes of the samples."""
        maps = []
        for discriminator in (*self.period, *self.resolution):
            maps.append(discriminator(samples))
        return tuple(maps)


class PeriodDiscriminator(nn.Module):
    """Convolutions over every p-th sample (reference ``DiscriminatorP`` of HiFi-GAN)."""

    period: int
    channels: int
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, samples: Float[Array, "B N"]) -> tuple[jax.Array, ...]:
        """The outputs of all layers, [B, p, T, C]; the last are the logits, of one channel."""
        with jax.named_scope(f"period_{self.period}"):
            kw: dict[str, Any] = dict(axes=_AXES, **dtypes(self))
            rows = jnp.asarray(samples, self.dtype)
            missing = -rows.shape[1] % self.period
            rows = jnp.pad(rows, ((0, 0), (0, missing)), mode="reflect")
            num_rows = len(rows)
            x = rows.reshape(num_rows, -1, self.period).transpose(0, 2, 1)  # [B, p, T]
            x = x.reshape(num_rows * self.period, -1, 1)  # [B p, T, 1]
            maps = []
            for number, (multiple, stride) in enumerate(PERIOD_LAYERS):
                channels = multiple * self.channels
                layer = Conv1D(x.shape[2], channels, _PERIOD_KERNEL, stride, name=f"conv_{number}", **kw)
                x = nn.leaky_relu(self._apply(layer, x), _SLOPE)  # [B p, T, C]
                maps.append(x)
            maps.append(self._apply(Conv1D(x.shape[2], 1, _LAST_KERNEL, name="conv_out", **kw), x))
            return tuple(x.reshape(num_rows, self.period, *x.shape[1:]) for x in maps)

    def _apply(self, layer: Conv1D, x: Float[jax.Array, "Bp T C"]) -> Float[jax.Array, "Bp T_out C_out"]:
        if self.single_convs:
            return layer(x)
        kernel, bias = layer.weights()
        # as of one frequency
        return conv_products(x[:, None], kernel[None], layer.stride)[:, 0] + bias


class ResolutionDiscriminator(nn.Module):
    """Convolutions over the magnitudes of a spectrum (reference ``DiscriminatorR`` of BigVGAN)."""

    resolution: Resolution
    channels: int
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, samples: Float[Array, "B N"]) -> tuple[jax.Array, ...]:
        """The outputs of all layers, [B, F, T, C]; the last are the logits, of one channel."""
        with jax.named_scope(f"resolution_{self.resolution.fft}"):
            edge = (self.resolution.fft - self.resolution.hop) // 2
            padded = jnp.pad(jnp.asarray(samples, self.dtype), ((0, 0), (edge, edge)), mode="reflect")
            magnitude = stft_magnitude(padded, self.resolution)  # [B, T, F]
            x = magnitude.transpose(0, 2, 1)[..., None]  # [B, F, T, 1]
            kw: dict[str, Any] = dict(single_convs=self.single_convs, **dtypes(self))
            maps = []
            for number, (kernel, stride) in enumerate(RESOLUTION_LAYERS):
                layer = _Conv2D(x.shape[3], self.channels, kernel, stride, name=f"conv_{number}", **kw)
                x = nn.leaky_relu(layer(x), _SLOPE)  # [B, F, T, C]
                maps.append(x)
            kernel = (_LAST_KERNEL, _LAST_KERNEL)
            maps.append(_Conv2D(x.shape[3], 1, kernel, name="conv_out", **kw)(x))
            return tuple(maps)


class _Conv2D(nn.Module):
    """A convolution over frequencies and frames, with as many zeros around as keep their numbers before the stride."""

    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: int = 1  # over frames
    single_convs: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B F T inputs"]) -> Float[jax.Array, "B F T_out outputs"]:
        init = nn.initializers.lecun_normal(in_axis=(0, 1, 2))
        shape = (*self.kernel, self.inputs, self.outputs)
        kernel = param(self, "kernel", init, shape, ("kernel", *_AXES)).astype(self.dtype)
        bias = param(self, "bias", nn.initializers.zeros, (self.outputs,), _AXES[2:]).astype(self.dtype)
        if not self.single_convs:
            return conv_products(x, kernel, self.stride) + bias
        padding = tuple((size // 2, size // 2) for size in self.kernel)
        y = jax.lax.conv_general_dilated(
            x, kernel, (1, self.stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + bias


def abstract_params(model: Discriminators) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def init_params(model: Discriminators, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes."""
    # no parameter has a size that depends on the number of samples
    return model.init(key, jnp.zeros((1, RESOLUTIONS[1].fft)))["params"]


def logits(maps: FeatureMaps) -> Sequence[jax.Array]:
    """What each discriminator says of the samples: 1 where they are recorded, 0 where they are generated."""
    return [layers[-1] for layers in maps]
