"""Linear maps and embedding tables, with the logical axes of their parameters."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.layers.lora import LoRAKernel, multiply_adapter
from omni_jax.layers.params import param
from omni_jax.layers.quantized import QuantizedKernel, multiply_quantized

# that the entries of an embedding table begin with: as much as layers add to them at first, so that tokens can be told
# apart by all layers from the first step
EMBEDDING_STD = 0.5


class Linear(nn.Module):
    """Contracts the last ``len(inputs)`` axes of its argument with a kernel of shape ``inputs + outputs``.

    The kernel may be a ``QuantizedKernel``, and either may be within a ``LoRAKernel``.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]  # logical names of inputs + outputs
    use_bias: bool = True
    gain: float = 1.0  # how large initial outputs are, in terms of inputs
    bias_std: float = 0.0  # that the entries of the bias begin with
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch_and_inputs"]) -> Float[jax.Array, "*batch_and_outputs"]:
        n = len(self.inputs)
        # by the number of inputs, so that without a gain outputs are about as large as inputs
        std = self.gain / math.sqrt(math.prod(self.inputs))
        kernel: Any = param(self, "kernel", nn.initializers.normal(std), self.inputs + self.outputs, self.axes)
        adapter: LoRAKernel | None = None
        if isinstance(kernel, LoRAKernel):
            adapter = kernel
            kernel = adapter.kernel
        if isinstance(kernel, QuantizedKernel):
            y = multiply_quantized(jnp.asarray(x), kernel, n, self.dtype)
        else:
            # the last axes of x are contracted with the first ones of the kernel; there are no batch axes
            contracted = (tuple(range(x.ndim - n, x.ndim)), tuple(range(n)))
            # parameters are cast where they are used: they may be kept in another dtype
            y = jax.lax.dot_general(jnp.asarray(x, self.dtype), kernel.astype(self.dtype), (contracted, ((), ())))
        if adapter is not None:
            y += multiply_adapter(jnp.asarray(x), adapter, n, self.dtype)
        if self.use_bias:
            initial = nn.initializers.normal(self.bias_std)
            y += param(self, "bias", initial, self.outputs, self.axes[n:]).astype(self.dtype)
        return y


class Embedding(nn.Module):
    """A table of ``rows`` embeddings of ``width``."""

    rows: int
    width: int
    axes: tuple[str, str] = ("vocab", "embed")
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "*batch"]) -> Float[jax.Array, "*batch width"]:
        table = param(self, "embedding", nn.initializers.normal(EMBEDDING_STD), (self.rows, self.width), self.axes)
        # cast after the lookup: before it, the whole table would be converted
        return jnp.take(table, ids, axis=0).astype(self.dtype)
