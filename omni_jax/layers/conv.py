"""Convolutions over time, [batch, frames, channels]."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from omni_jax.layers.params import param


class Conv1D(nn.Module):
    """A convolution with ``(kernel - 1) // 2`` zeros on either side."""

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init, shape = nn.initializers.lecun_normal(in_axis=(0, 1)), (self.kernel, self.inputs, self.outputs)
        kernel = param(self, "kernel", init, shape, ("kernel", "patch", "embed"))
        bias = param(self, "bias", nn.initializers.zeros, (self.outputs,), ("embed",))
        side = (self.kernel - 1) // 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride,),
            padding=((side, side),),
            dimension_numbers=("NTC", "TIO", "NTC"),
        )
        return y + bias.astype(self.dtype)
