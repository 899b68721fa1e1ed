"""What a recipe will hold on each device, from abstract shapes alone: nothing is allocated, no device is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.sharding import param_shardings
from omni_jax.training.recipe import Recipe

# float32 master weights, and the two moments of AdamW
STATE_BYTES = 3 * jnp.dtype(jnp.float32).itemsize


@dataclass(frozen=True)
class Row:
    """One parameter: what it is, where its axes go, and how much of it one device holds."""

    path: str
    shape: tuple[int, ...]
    spec: tuple[str | tuple[str, ...] | None, ...]
    device_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def device_size(self) -> int:
        return math.prod(self.device_shape)


def plan(recipe: Recipe) -> list[Row]:
    """Every parameter of the recipe's Thinker.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide.
    """
    boxed = abstract_params(Thinker(recipe.model.thinker_config))
    shardings = jax.tree.leaves(param_shardings(boxed, recipe.mesh.abstract()))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    return [
        Row(
            "/".join(key.key for key in path),
            leaf.shape,
            tuple(sharding.spec),
            sharding.shard_shape(leaf.shape),
        )
        for (path, leaf), sharding in zip(leaves, shardings, strict=True)
    ]


def show(rows: list[Row]) -> None:
    """Prints the table and its sums."""
    table = Table("parameter", "shape", "mesh axes", "on a device", box=None)
    for row in rows:
        axes = ", ".join("-" if axis is None else str(axis) for axis in row.spec)
        table.add_row(row.path, str(row.shape), axes, str(row.device_shape))
    whole, part = sum(r.size for r in rows), sum(r.device_size for r in rows)
    console = Console(width=160)  # a parameter's name must not be cut
    console.print(table)
    console.print(
        f"{whole:,} parameters, {part:,} on a device: {part * STATE_BYTES / 2**30:.2f} GiB a device of weights "
        "and AdamW's moments in float32; activations come on top",
        highlight=False,
    )
