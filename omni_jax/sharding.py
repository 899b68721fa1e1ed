"""Where arrays live: a mesh of four axes, and one table from the names that models use to the axes of the mesh.

Models name the axes of a parameter where they make it ("embed", "heads", ...) and of an activation where it matters.
Only this module knows which mesh axis each name is spread over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from omni_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# A parameter's width is spread over fsdp and gathered where it is used; its heads, hidden units or words over tensor.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "patch": (),
    "kernel": (),
    "channels": (),  # of Token2Wav's convolutions, from 1536 down to 1: too few to share out
    "norm": (),
    # activations
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "width": (),
}


def make_mesh(
    data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over ``devices`` (all of them unless given), whose four sizes must multiply to their number.

    Raises:
      ConfigError: where they do not.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, fsdp, sequence, tensor)
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError(f"a mesh of {sizes} needs {math.prod(shape)} devices, there are {len(devices)}")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape), devices=devices)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name, size in zip(MESH_AXES, self.sizes, strict=True):
            if size < 1:
                raise ConfigError(f"mesh.{name} is {size}; it must be at least 1")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of ``MESH_AXES``."""
        return self.data, self.fsdp, self.sequence, self.tensor

    @property
    def num_devices(self) -> int:
        """How many devices the mesh is made of."""
        return math.prod(self.sizes)

    def abstract(self) -> AbstractMesh:
        """A mesh of these sizes without devices, to plan with."""
        return AbstractMesh(self.sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def make(self, devices: Sequence[Any] | None = None) -> Mesh:
        """A mesh over ``devices``, all of them unless given.

        Raises:
          ConfigError: if there are not as many.
        """
        return make_mesh(*self.sizes, devices=devices)


def _spec(names: Sequence[str | None]) -> PartitionSpec:
    return PartitionSpec(*(RULES[name] or None if name else None for name in names))


def param_shardings(boxed: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The sharding of every parameter.

    Args:
      boxed: abstract parameters as ``jax.eval_shape(module.init, ...)`` gives them, still in their logical boxes.
      mesh: from ``make_mesh``.

    Returns:
      A tree of ``NamedSharding`` with the boxes removed.

    Raises:
      ConfigError: listing every parameter and axis whose size the mesh does not divide.
    """
    wrong: list[str] = []

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.LogicallyPartitioned) else leaf.shape
        for name, size in zip(names, shape, strict=True):
            axes = RULES[name] if name else ()
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if size % parts:
                wrong.append(f"{jax.tree_util.keystr(path)}: {name} of {size} over {axes} = {parts}")
        return NamedSharding(mesh, _spec(names))

    def is_box(x: Any) -> bool:
        return isinstance(x, nn.LogicallyPartitioned)

    shardings = jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)
    if wrong:
        raise ConfigError("the mesh does not divide these parameters:\n  " + "\n  ".join(wrong))
    return shardings


def whole(tree: Any) -> Any:
    """Says that arrays are whole on every device: those that every host reads, and a state's counters."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def host_sharding(params: Any, mesh: Mesh | None) -> Sharding:
    """Where such arrays are to be put by the host: beside the parameters.

    A program is compiled once for arrays that lie in one place, and again where they lie in another.
    """
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    leaf = jax.tree.leaves(params)[0]
    return SingleDeviceSharding(next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says how an activation is spread, by the names of its axes; does nothing where no mesh is set.

    An axis whose size the mesh does not divide, such as three blocks of sound over eight devices, stays whole.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = [axes_of(name, size) if name else None for name, size in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def axes_of(name: str, size: int) -> tuple[str, ...] | None:
    """The axes of the mesh that is set which an activation's axis is spread over; None if they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or size % math.prod(mesh.shape[axis] for axis in RULES[name]):
        return None
    return RULES[name] or None
