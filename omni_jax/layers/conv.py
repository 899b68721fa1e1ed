"""Convolutions over time.

Letters: B batch, T frames, inputs and outputs: channels, taps of a kernel.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.layers.params import param

Axes3 = tuple[str, str, str]


class Conv1D(nn.Module):
    """A convolution whose ends are padded with ``(kernel - 1) * dilation`` frames in all.

    With stride 1 there are as many frames after it as before.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    edges: Literal["constant", "reflect"] = "constant"  # zeros, or the mirrored neighbours
    use_bias: bool = True
    axes: Axes3 = ("kernel", "patch", "embed")
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B T inputs"]) -> Float[jax.Array, "B T_out outputs"]:
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = param(self, "kernel", init, (self.kernel, self.inputs, self.outputs), self.axes)
        padding = same_padding(self.kernel, self.dilation)
        # XLA's convolution pads with zeros alone, so mirrored edges are written out before it
        if self.edges == "reflect":
            x = jnp.pad(x, ((0, 0), padding, (0, 0)), mode="reflect")
            padding = (0, 0)
        y = conv(x.astype(self.dtype), kernel.astype(self.dtype), padding, stride=self.stride, dilation=self.dilation)
        if self.use_bias:
            y += param(self, "bias", nn.initializers.zeros, (self.outputs,), self.axes[2:]).astype(self.dtype)
        return y


class UpsamplingConv1D(nn.Module):
    """A transposed convolution that makes exactly ``stride`` frames of each (reference ``ConvTranspose1d``).

    All ``stride`` phases of the output are channels of one ordinary convolution over the input, so nothing is
    multiplied with the zeros that a stretched input would have.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    axes: Axes3 = ("kernel", "patch", "embed")
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B T inputs"]) -> Float[jax.Array, "B T_out outputs"]:
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        shape = (self.kernel, self.inputs, self.outputs)
        kernel = param(self, "kernel", init, shape, self.axes).astype(self.dtype)
        bias = param(self, "bias", nn.initializers.zeros, (self.outputs,), self.axes[2:]).astype(self.dtype)
        # each frame becomes ``stride`` frames, which lie side by side in its channels
        phases, padding = _phase_kernel(kernel, self.stride)
        y = conv(x.astype(self.dtype), phases, padding)  # [B, T, stride * outputs]
        return y.reshape(x.shape[0], x.shape[1] * self.stride, self.outputs) + bias


def _phase_kernel(kernel: Float[jax.Array, "k inputs outputs"], stride: int) -> tuple[jax.Array, tuple[int, int]]:
    """A transposed convolution's kernel as that of an ordinary one, all phases of whose output are channels.

    Output frame ``stride * n + p`` is the sum over taps o of ``x[n + o] * kernel[p + cut - stride * o]``.

    Returns:
      [taps, inputs, stride * outputs], and the frames of padding before and after that its taps need.
    """
    size, inputs, outputs = kernel.shape
    last = size - 1
    # frames that the reference cuts from either end of its output
    cut = (size - stride) // 2
    # the furthest input frames, before and after frame n, that one of its phases reads
    behind = (last - cut) // stride
    ahead = (stride - 1 + cut) // stride
    # row i of the padded kernel is tap i - before of the kernel
    before = stride * ahead - cut
    after = stride * behind + stride - 1 + cut - last
    padded = jnp.pad(kernel, ((before, after), (0, 0), (0, 0)))  # [taps * stride, inputs, outputs]
    # a transposed convolution reads its kernel in the other direction, hence the reversal
    taps = padded.reshape(behind + ahead + 1, stride, inputs, outputs)[::-1]  # [taps, stride, inputs, outputs]
    return taps.transpose(0, 2, 1, 3).reshape(behind + ahead + 1, inputs, -1), (behind, ahead)


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Frames to put before and after, so that a convolution of stride 1 gives as many as it takes."""
    # of an odd number the larger half goes behind
    total = (kernel - 1) * dilation
    return total // 2, total - total // 2


def conv(
    x: Float[Array, "B T inputs"],
    kernel: Float[Array, "taps inputs outputs"],
    padding: tuple[int, int],
    *,
    stride: int = 1,
    dilation: int = 1,
) -> jax.Array:
    """A convolution over time, with zeros on either side. [B, T_out, outputs]"""
    return jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        window_strides=(stride,),
        padding=(padding,),
        rhs_dilation=(dilation,),
        dimension_numbers=("NTC", "TIO", "NTC"),
    )
