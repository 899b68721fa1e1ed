"""Normalisation of the last axis, always in float32 inside."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from omni_jax.layers.params import param


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis, then scales (reference ``Qwen2RMSNorm``)."""

    width: int
    eps: float = 1e-6
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", nn.initializers.ones, (self.width,), ("norm",))
        y = x.astype(jnp.float32)  # [..., width]
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # cast back first, as in the reference: in bfloat16 the other order rounds differently
        return y.astype(x.dtype) * scale.astype(x.dtype)


class LayerNorm(nn.Module):
    """Centres and scales the last axis to unit variance, then applies scale and bias."""

    width: int
    eps: float = 1e-5
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", nn.initializers.ones, (self.width,), ("norm",))
        bias = param(self, "bias", nn.initializers.zeros, (self.width,), ("norm",))
        y = x.astype(jnp.float32)  # [..., width]
        y -= jnp.mean(y, axis=-1, keepdims=True)
        # from the centred values: the mean of squares less the squared mean would cancel
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        # unlike in ``RMSNorm``, scale and bias are applied in float32
        return (y * scale + bias).astype(x.dtype)
