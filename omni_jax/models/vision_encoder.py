"""The picture encoder: windows in most layers, whole frames in a few (reference ``Qwen2_5OmniVisionEncoder``).

The host has cut each frame into windows, so a window is an element of the batch; no patch is ever moved on the device.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float

from omni_jax.batch import VisionFrames
from omni_jax.config import VisionEncoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention
from omni_jax.layers.linear import Linear
from omni_jax.layers.mlp import GatedMLP
from omni_jax.layers.norm import RMSNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.rotary import Tables, picture_tables, rotate
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.sharding import constrain


class VisionLayer(nn.Module):
    """One pre-norm transformer layer over windows [F, W, P, D], or over the frames they make up."""

    config: VisionEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, index: int | jax.Array, rope: Tables, valid: jax.Array) -> tuple[jax.Array, None]:
        c, kw = self.config, dtypes(self)
        frames, windows, patches, _ = x.shape

        def within(shape: tuple[int, int], *qkv: jax.Array) -> jax.Array:
            q, k, v = (a.reshape(*shape, *a.shape[3:]) for a in qkv)
            return attention(q, k, v, Mask(valid.astype(jnp.int32).reshape(shape))).reshape(qkv[0].shape)

        in_windows = functools.partial(within, (frames * windows, patches))
        in_frames = functools.partial(within, (frames, windows * patches))

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            q, k = rotate(q, rope), rotate(k, rope)
            if isinstance(index, int):
                return (in_frames if index in c.fullatt_block_indexes else in_windows)(q, k, v), None
            is_full = jnp.isin(index, jnp.array(c.fullatt_block_indexes, jnp.int32))
            return jax.lax.cond(is_full, in_frames, in_windows, q, k, v), None

        head_dim = c.hidden_size // c.num_heads
        project = SelfAttention(c.hidden_size, c.num_heads, c.num_heads, head_dim, name="attention", **kw)
        y = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="attention_norm")(x)
        x = x + project(y, attend)[0]
        y = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="mlp_norm")(x)
        x = x + GatedMLP(c.hidden_size, c.intermediate_size, True, name="mlp", **kw)(y)
        return constrain(x, "batch", None, None, None), None


class Merger(nn.Module):
    """Four neighbouring patches to one cell in the Thinker's width (reference ``Qwen2_5OmniPatchMerger``)."""

    config: VisionEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "F W P D"]) -> Float[jax.Array, "F W cells out"]:
        c, kw = self.config, dtypes(self)
        x = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="norm")(x)
        wide = c.hidden_size * c.spatial_merge_size**2
        x = constrain(x.reshape(*x.shape[:2], -1, wide), "batch", None, None, None)
        x = jax.nn.gelu(Linear((wide,), (wide,), ("mlp", "embed"), name="up", **kw)(x), approximate=False)
        x = Linear((wide,), (c.out_hidden_size,), ("mlp", "embed"), name="down", **kw)(
            constrain(x, "batch", None, None, None)
        )
        return constrain(x, "batch", None, None, None)


class VisionEncoder(nn.Module):
    """Patches to merged cells in the Thinker's width."""

    config: VisionEncoderConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        self.patch_embed = Linear((c.patch_dim,), (c.hidden_size,), ("patch", "embed"), use_bias=False, **kw)
        self.layers = layer_stack(
            VisionLayer, dict(config=c, **kw), c.depth, self.scan_layers, shared=2, remat=self.remat
        )
        self.merger = Merger(c, **kw)

    def __call__(self, frames: VisionFrames) -> Float[jax.Array, "F W cells out"]:
        c = self.config
        x = self.patch_embed(constrain(jnp.asarray(frames.patches, self.dtype), "batch", None, None, None))
        rope = picture_tables(frames.row, frames.column, c.hidden_size // c.num_heads)
        return self.merger(call_layers(self.layers, c.depth, x, rope, jnp.asarray(frames.valid)))
