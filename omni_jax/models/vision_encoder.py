"""The vision encoder: windows in most layers, whole frames in a few (docs/reference.md, 4).

The host has cut each frame into windows, so an entry of one or several windows is an element of the batch; no patch is
ever moved on the device.

Letters: F frames, W entries of a frame, P patches of an entry, D width, N heads, H width of a head, E the Thinker's
width.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Float, Int

from omni_jax.batch import VisionFrames
from omni_jax.config import VisionEncoderConfig
from omni_jax.layers.attention import Mask, SelfAttention, attention
from omni_jax.layers.linear import EMBEDDING_STD, Linear
from omni_jax.layers.mlp import GatedMLP
from omni_jax.layers.norm import RMSNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.rotary import Tables, picture_tables, rotate
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.sharding import constrain


class _Segments(NamedTuple):
    """Patches of equal number see each other; 0 is padding."""

    frame: Int[jax.Array, "F W P"]  # in the layers ``fullatt_block_indexes``
    window: Int[jax.Array, "F W P"]  # in the others; told apart within an entry alone


class VisionLayer(nn.Module):
    """One pre-norm transformer layer over windows, or over the frames they make up (``Qwen2_5OmniVisionBlock``)."""

    config: VisionEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[jax.Array, "F W P D"], index: int | jax.Array, rope: Tables, segments: _Segments
    ) -> tuple[jax.Array, None]:
        c = self.config
        kw = dtypes(self)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
            # by row and column alone: the encoder has no angle for time
            return _attend_by_layer(c, index, rotate(q, rope), rotate(k, rope), v, segments), None

        with jax.named_scope("vision_attention"):
            y = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="attention_norm")(x)
            head_dim = c.hidden_size // c.num_heads
            project = SelfAttention(c.hidden_size, c.num_heads, c.num_heads, head_dim, name="attention", **kw)
            x = x + project(y, attend)[0]  # [F, W, P, D]
        with jax.named_scope("vision_mlp"):
            y = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="mlp_norm")(x)
            x = x + GatedMLP(c.hidden_size, c.intermediate_size, True, name="mlp", **kw)(y)  # [F, W, P, D]
        return constrain(x, "batch", None, None, None), None


def _attend_by_layer(
    config: VisionEncoderConfig,
    index: int | jax.Array,
    q: Float[jax.Array, "F W P N H"],
    k: Float[jax.Array, "F W P N H"],
    v: Float[jax.Array, "F W P N H"],
    segments: _Segments,
) -> Float[jax.Array, "F W P N H"]:
    """Attention within frames in the layers ``fullatt_block_indexes``, within windows in the others."""
    frames, entries, patches = segments.frame.shape

    # an entry or a frame is an element of the batch, so little is computed to be masked away
    def in_windows(q: jax.Array, k: jax.Array, v: jax.Array, segments: _Segments) -> jax.Array:
        return _attend_within("window", (frames * entries, patches), q, k, v, segments.window)

    def in_frames(q: jax.Array, k: jax.Array, v: jax.Array, segments: _Segments) -> jax.Array:
        return _attend_within("frame", (frames, entries * patches), q, k, v, segments.frame)

    if isinstance(index, int):
        attend = in_frames if index in config.fullatt_block_indexes else in_windows
        return attend(q, k, v, segments)
    # scanned layers are one program, so both ways are compiled and the index selects one
    is_full = jnp.isin(index, jnp.array(config.fullatt_block_indexes, jnp.int32))
    return jax.lax.cond(is_full, in_frames, in_windows, q, k, v, segments)


def _number_windows(frames: VisionFrames, side: int) -> Int[jax.Array, "F W P"]:
    """Of every patch the number of its window of ``side x side`` patches, from 1; 0 for padding.

    An entry holds windows of one frame alone, so the number need not tell frames apart.
    """
    row, column = jnp.asarray(frames.row), jnp.asarray(frames.column)  # [F, W, P]
    number = 1 + row // side * 2**15 + column // side  # a side of 2**15 windows has more pixels than any picture
    return jnp.where(jnp.asarray(frames.valid) > 0, number, 0)


def _attend_within(
    unit: str, shape: tuple[int, int], q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> jax.Array:
    """Attention over patches regrouped to [units, patches of a unit]."""
    with jax.named_scope(f"{unit}_attention"):
        split = q.shape
        # the entries of a frame lie one behind the other, so this moves nothing
        q, k, v = (a.reshape(*shape, *a.shape[3:]) for a in (q, k, v))  # [units, patches, N, H]
        return attention(q, k, v, Mask(segments.reshape(shape))).reshape(split)


class Merger(nn.Module):
    """Four neighbouring patches to one cell in the Thinker's width (reference ``Qwen2_5OmniPatchMerger``)."""

    config: VisionEncoderConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[jax.Array, "F W P D"]) -> Float[jax.Array, "F W cells E"]:
        c = self.config
        kw = dtypes(self)
        width = c.hidden_size * c.spatial_merge_size**2
        x = RMSNorm(c.hidden_size, param_dtype=self.param_dtype, name="norm")(x)
        # the host has made the four patches of a cell neighbours
        x = constrain(x.reshape(*x.shape[:2], -1, width), "batch", None, None, None)  # [F, W, cells, 4 D]
        x = jax.nn.gelu(Linear((width,), (width,), ("mlp", "embed"), name="up", **kw)(x), approximate=False)
        x = constrain(x, "batch", None, None, None)
        # cells begin as large as the embeddings of text that they stand between
        down = Linear((width,), (c.out_hidden_size,), ("mlp", "embed"), gain=EMBEDDING_STD, name="down", **kw)
        x = down(x)  # [F, W, cells, E]
        return constrain(x, "batch", None, None, None)


class VisionEncoder(nn.Module):
    """Patches to merged cells in the Thinker's width (reference ``Qwen2_5OmniVisionEncoder``)."""

    config: VisionEncoderConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        self.patch_embed = Linear((c.patch_dim,), (c.hidden_size,), ("patch", "embed"), use_bias=False, **kw)
        self.layers = layer_stack(
            VisionLayer, dict(config=c, **kw), c.depth, self.scan_layers, shared=2, remat=self.remat
        )
        self.merger = Merger(c, **kw)

    def __call__(self, frames: VisionFrames) -> Float[jax.Array, "F W cells E"]:
        """Cells of every entry, in the order of its patches; those of padding have no meaning."""
        c = self.config
        with jax.named_scope("patch_embed"):
            # the reference's convolution has its kernel as stride, which makes it a product for each patch
            x = self.patch_embed(constrain(jnp.asarray(frames.patches, self.dtype), "batch", None, None, None))
        rope = picture_tables(frames.row, frames.column, c.hidden_size // c.num_heads)  # two of [F, W, P, H / 2]
        # a bool is one frame and its padding; in training it numbers the frames of a canvas
        frame_ids = jnp.asarray(frames.valid).astype(jnp.int32)  # [F, W, P]
        segments = _Segments(frame_ids, _number_windows(frames, c.window_size // c.patch_size))
        x = call_layers(self.layers, c.depth, x, rope, segments)  # [F, W, P, D]
        with jax.named_scope("patch_merger"):
            return self.merger(x)
