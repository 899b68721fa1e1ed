"""The two feed-forward networks of the model."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from omni_jax.layers.linear import Linear
from omni_jax.layers.params import dtypes


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), over the last axis (reference ``Qwen2MLP``)."""

    width: int
    hidden: int
    use_bias: bool
    out_gain: float = 1.0  # how large initial results are, in terms of hidden units
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = dict(dtypes(self), use_bias=self.use_bias)
        gate = Linear((self.width,), (self.hidden,), ("embed", "mlp"), name="gate", **kw)(x)  # [..., hidden]
        up = Linear((self.width,), (self.hidden,), ("embed", "mlp"), name="up", **kw)(x)
        down = Linear((self.hidden,), (self.width,), ("mlp", "embed"), gain=self.out_gain, name="down", **kw)
        return down(jax.nn.silu(gate) * up)


class GeluMLP(nn.Module):
    """down(gelu(up(x))): the exact (erf) GELU, or its approximation with tanh."""

    width: int
    hidden: int
    approximate: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kw = dtypes(self)
        y = Linear((self.width,), (self.hidden,), ("embed", "mlp"), name="up", **kw)(x)  # [..., hidden]
        y = jax.nn.gelu(y, approximate=self.approximate)
        return Linear((self.hidden,), (self.width,), ("mlp", "embed"), name="down", **kw)(y)
