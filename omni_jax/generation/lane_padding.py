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
      params: arrays.
      wider: a tree of abstract arrays like it.
    """

    def pad(array: jax.Array, target: jax.ShapeDtypeStruct) -> jax.Array:
        if array.shape == target.shape:
            return array
        widths = [(0, wide - narrow) for narrow, wide in zip(array.shape, target.shape, strict=True)]
        return jax.jit(jnp.pad, static_argnums=1, out_shardings=target.sharding)(array, tuple(widths))

    return jax.tree.map(pad, params, wider)
