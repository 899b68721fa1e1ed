"""Convolutions over time.

Letters: B batch, T frames, F frequencies, inputs and outputs: channels, taps of a kernel.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from omni_jax.batch import Array
from omni_jax.layers.params import param

Axes3 = tuple[str, str, str]


class Conv1D(nn.Module):
    """A convolution whose ends are padded with ``(kernel - 1) * dilation`` zeros in all.

    With stride 1 there are as many frames after it as before.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    use_bias: bool = True
    axes: Axes3 = ("kernel", "patch", "embed")
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def weights(self) -> tuple[Float[jax.Array, "k inputs outputs"], Float[jax.Array, " outputs"]]:
        """The kernel, and the bias: zeros where there is none."""
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = param(self, "kernel", init, (self.kernel, self.inputs, self.outputs), self.axes).astype(self.dtype)
        if not self.use_bias:
            return kernel, jnp.zeros(self.outputs, self.dtype)
        bias = param(self, "bias", nn.initializers.zeros, (self.outputs,), self.axes[2:])
        return kernel, bias.astype(self.dtype)

    def __call__(self, x: Float[jax.Array, "B T inputs"]) -> Float[jax.Array, "B T_out outputs"]:
        kernel, bias = self.weights()
        padding = same_padding(self.kernel, self.dilation)
        y = conv(x.astype(self.dtype), kernel, padding, stride=self.stride, dilation=self.dilation)
        return y + bias if self.use_bias else y


class UpsamplingConv1D(nn.Module):
    """The weights of a transposed convolution that makes exactly ``stride`` frames of each.

    All ``stride`` phases of the output are channels of one ordinary convolution over the input, so nothing is
    multiplied with the zeros that a stretched input would have. Reference: ``ConvTranspose1d``.
    """

    inputs: int
    outputs: int
    kernel: int
    stride: int
    axes: Axes3 = ("kernel", "patch", "embed")
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def weights(self) -> tuple[Float[jax.Array, "taps inputs phases"], Float[jax.Array, " outputs"]]:
        """The kernel of the ordinary convolution, [taps, inputs, stride * outputs], and the bias of the output."""
        init = nn.initializers.lecun_normal(in_axis=(0, 1))
        kernel = param(self, "kernel", init, (self.kernel, self.inputs, self.outputs), self.axes)
        bias = param(self, "bias", nn.initializers.zeros, (self.outputs,), self.axes[2:])
        return _phase_kernel(kernel.astype(self.dtype), self.stride), bias.astype(self.dtype)


def upsampling_padding(kernel: int, stride: int) -> tuple[int, int]:
    """Frames to put before and after the input of the ordinary convolution that stands for a transposed one."""
    # frames that the reference cuts from either end of its output
    cut = (kernel - stride) // 2
    # the furthest input frames, before and after frame n, that one of the phases of its output reads
    return (kernel - 1 - cut) // stride, (stride - 1 + cut) // stride


def _phase_kernel(kernel: Float[jax.Array, "k inputs outputs"], stride: int) -> Float[jax.Array, "taps inputs phases"]:
    """A transposed convolution's kernel as that of an ordinary one, all phases of whose output are channels.

    Output frame ``stride * n + p`` is the sum over taps o of ``x[n + o] * kernel[p + cut - stride * o]``.
    """
    size, inputs, outputs = kernel.shape
    cut = (size - stride) // 2
    behind, ahead = upsampling_padding(size, stride)
    # row i of the padded kernel is tap i - before of the kernel
    before = stride * ahead - cut
    after = stride * behind + stride - 1 + cut - (size - 1)
    padded = jnp.pad(kernel, ((before, after), (0, 0), (0, 0)))  # [taps * stride, inputs, outputs]
    # a transposed convolution reads its kernel in the other direction, hence the reversal
    taps = padded.reshape(behind + ahead + 1, stride, inputs, outputs)[::-1]  # [taps, stride, inputs, outputs]
    return taps.transpose(0, 2, 1, 3).reshape(behind + ahead + 1, inputs, -1)


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


def conv_taps(
    x: Float[jax.Array, "B T inputs"], kernel: Float[jax.Array, "taps inputs outputs"], padding: tuple[int, int]
) -> Float[jax.Array, "B T outputs"]:
    """``conv`` of stride 1 as a loop over the taps, each a matrix product of all frames.

    Compilers for TPUs take minutes for float32 convolutions of some shapes, and seconds for this.
    """
    num_rows, num_frames, inputs = x.shape
    padded = jnp.pad(x, ((0, 0), padding, (0, 0)))

    def add_tap(tap: jax.Array, total: jax.Array) -> jax.Array:
        shifted = jax.lax.dynamic_slice_in_dim(padded, tap, num_frames, axis=1)  # [B, T, inputs]
        weights = jax.lax.dynamic_index_in_dim(kernel, tap, keepdims=False)  # [inputs, outputs]
        product = shifted.reshape(num_rows * num_frames, inputs) @ weights
        return total + product.reshape(total.shape)

    total = jnp.zeros((num_rows, num_frames, kernel.shape[2]), x.dtype)
    return jax.lax.fori_loop(0, kernel.shape[0], add_tap, total)


def conv_products(
    x: Float[jax.Array, "B F T inputs"], kernel: Float[jax.Array, "rows taps inputs outputs"], stride: int
) -> Float[jax.Array, "B F T_out outputs"]:
    """A convolution over frequencies and frames as one matrix product for each row of the kernel.

    What all taps of a row read lies side by side, so that a product is ``taps * inputs`` deep.

    Args:
      x: half of the kernel's size in zeros is put on each side of it.
      kernel: of odd sizes.
      stride: over frames.
    """
    num_rows, num_taps, _, num_outputs = kernel.shape
    batch, num_frequencies, num_frames, _ = x.shape
    num_places = (num_frames - 1) // stride + 1
    last = (num_places - 1) * stride  # frame that the first tap of the last place reads
    rows_beside = (num_rows // 2, num_rows // 2)
    frames_beside = (num_taps // 2, num_taps // 2)
    padded = jnp.pad(x, ((0, 0), rows_beside, frames_beside, (0, 0)))
    views = [jax.lax.slice_in_dim(padded, tap, tap + last + 1, stride, axis=2) for tap in range(num_taps)]
    beside = jnp.stack(views, axis=1)  # [B, taps, F + rows - 1, T_out, inputs]
    total = jnp.zeros((batch, num_frequencies, num_places, num_outputs), x.dtype)
    for row in range(num_rows):
        total += jnp.einsum("bkftc,kcd->bftd", beside[:, :, row : row + num_frequencies], kernel[row])
    return total
