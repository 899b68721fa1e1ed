"""Parameters padded to whole lanes of a TPU, with zeros that change no result.

An axis that is no multiple of 128 on each chip is laid out in another way than the products want it, and a program then
copies the parameters of all layers before each run. Of the published models that is the hidden axis of the vision
encoder's MLPs, 3420.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from omni_jax.config import OmniConfig
from omni_jax.layers.lora import LoRAKernel
from omni_jax.layers.quantized import QuantizedKernel

LANES = 128


def widen_config(config: OmniConfig, num_parts: int) -> OmniConfig:
    """The configuration of a model that computes the same with padded parameters.

    Args:
      config: of a checkpoint.
      num_parts: that the mesh cuts hidden axes into.
    """
    vision = config.thinker_config.vision_config
    unit = LANES * num_parts
    width = -(-vision.intermediate_size // unit) * unit
    vision = dataclasses.replace(vision, intermediate_size=width)
    return dataclasses.replace(config, thinker_config=dataclasses.replace(config.thinker_config, vision_config=vision))


def pad_params(params: Any, wider: Any) -> Any:
    """Zeros behind each axis of each parameter, up to the shapes of ``wider``, whose shardings they get too.

    Args:
      params: arrays, and kernels that are quantised or have an adapter.
      wider: a tree of abstract arrays like it.
    """

    def pad_leaf(leaf: Any, target: jax.ShapeDtypeStruct) -> Any:
        if isinstance(leaf, LoRAKernel):
            shape_a, shape_b = widen_adapter_shapes(target.shape, leaf.a.shape, leaf.b.shape)
            arrays: Any = leaf
            a = _pad(arrays.a, shape_a, arrays.a.sharding)
            b = _pad(arrays.b, shape_b, arrays.b.sharding)
            return dataclasses.replace(leaf, kernel=pad_leaf(leaf.kernel, target), a=a, b=b)
        if isinstance(leaf, QuantizedKernel):
            num_outputs = leaf.scale.ndim - 1 - (leaf.values.ndim - target.ndim)
            # groups of inputs are whole, whatever is behind the last; outputs that are padding have any scale
            shape = (*leaf.scale.shape[:-num_outputs], *target.shape[-num_outputs:])
            scale: Any = leaf.scale
            scale = _pad(scale, shape, scale.sharding)
            return QuantizedKernel(_pad(leaf.values, target.shape, target.sharding), scale)
        return _pad(leaf, target.shape, target.sharding)

    return jax.tree.map(pad_leaf, params, wider, is_leaf=lambda leaf: isinstance(leaf, LoRAKernel | QuantizedKernel))


def widen_adapter_shapes(
    kernel: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of an adapter's two arrays beside a kernel of this shape.

    Args:
      kernel: a shape, with an axis of layers where there are several.
      a, b: the shapes beside a narrower kernel.
    """
    num_leading = len(a) + len(b) - 2 - len(kernel)
    num_inputs = len(a) - 1
    return (*kernel[:num_inputs], a[-1]), (*b[: num_leading + 1], *kernel[num_inputs:])


def _pad(array: Any, shape: tuple[int, ...], sharding: Any) -> Any:
    if array.shape == shape:
        return array
    widths = [(0, wide - narrow) for narrow, wide in zip(array.shape, shape, strict=True)]
    return jax.jit(jnp.pad, static_argnums=1, out_shardings=sharding)(array, tuple(widths))
