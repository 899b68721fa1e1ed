"""Where arrays live: a mesh of four axes, and one table from logical axes to the axes of the mesh.

Models name the axes of a parameter where they make it ("embed", "heads", ...) and of an activation where it matters;
``omni_jax.batch`` names those of a batch. Only this module knows which mesh axes a name is sharded over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.tree_util import KeyPath, keystr

from omni_jax.errors import ConfigError

R = TypeVar("R")

# data: rows. fsdp: rows, and parameters, which are gathered where they are used. sequence: positions of text.
# tensor: heads, hidden units and the vocabulary.
MESH_AXES = ("data", "fsdp", "sequence", "tensor")

# The width of a parameter is sharded over fsdp and gathered where it is used; its heads, hidden units or vocabulary
# over tensor.
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
    "channels": (),  # of Token2Wav's convolutions, from 1536 down to 1: too few to shard
    "norm": (),
    "rank": (),  # of an adapter: small
    # activations, and the arrays of a batch; blocks of sound and frames lie where the rows are that they belong to
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "width": (),
}


def make_mesh(
    data: int = 1, fsdp: int = 1, sequence: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over ``devices`` (all of them unless given), whose four sizes must multiply to their number.

    Of TPUs in several slices, which a data centre's network connects, ``data`` goes over the slices first: only sums of
    gradients then pass between them. Each slice has all parameters.

    Raises:
      ConfigError: where they do not, or ``data`` is no multiple of the number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = (data, fsdp, sequence, tensor)
    if math.prod(shape) != len(devices):
        sizes = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ConfigError(f"a mesh of {sizes} needs {math.prod(shape)} devices, there are {len(devices)}")
    axis_types = (AxisType.Auto,) * len(shape)
    num_slices = count_slices(devices)
    if num_slices == 1:
        return jax.make_mesh(shape, MESH_AXES, axis_types=axis_types, devices=devices)
    if data % num_slices:
        raise ConfigError(
            f"mesh.data is {data}; over {num_slices} slices of TPUs it must be a multiple of {num_slices}"
        )
    within_slice = (data // num_slices, fsdp, sequence, tensor)
    placed = mesh_utils.create_hybrid_device_mesh(within_slice, (num_slices, 1, 1, 1), devices)
    return Mesh(placed, MESH_AXES, axis_types=axis_types)


def count_slices(devices: Sequence[Any]) -> int:
    """How many slices of TPUs devices are of; others than TPUs are of one."""
    return len({getattr(device, "slice_index", 0) for device in devices})


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


def logical_sharding(axes: PartitionSpec | Sequence[str | None], mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The sharding of an array whose axes have these logical names; None: an axis that lies in full on every device."""
    mesh_axes = []
    for name in axes:
        # a name without mesh axes and no name at all mean the same
        mesh_axes.append((RULES[name] or None) if name else None)
    return NamedSharding(mesh, PartitionSpec(*mesh_axes))


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
    undivided: list[str] = []  # all are gathered, so that one error names them together

    def leaf_sharding(path: KeyPath, leaf: Any) -> NamedSharding:
        # a parameter that names no axes lies in full on every device
        boxed_leaf = _is_box(leaf)
        names = leaf.names if boxed_leaf else (None,) * leaf.ndim
        shape = leaf.value.shape if boxed_leaf else leaf.shape
        for name, size in zip(names, shape, strict=True):
            if not name or _divides(mesh, name, size):
                continue
            num_parts = _num_parts(mesh, name)
            undivided.append(f"{keystr(path)}: {name} of {size} over {RULES[name]} = {num_parts}")
        return logical_sharding(names, mesh)

    shardings = jax.tree_util.tree_map_with_path(leaf_sharding, boxed, is_leaf=_is_box)
    if undivided:
        raise ConfigError("the mesh does not divide these parameters:\n  " + "\n  ".join(undivided))
    return shardings


def _is_box(x: Any) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)


def _num_parts(mesh: Mesh | AbstractMesh, name: str) -> int:
    """How many parts an axis of this logical name is cut into."""
    return math.prod(mesh.shape[axis] for axis in RULES[name])


def _divides(mesh: Mesh | AbstractMesh, name: str, size: int) -> bool:
    return size % _num_parts(mesh, name) == 0


def replicate(tree: Any) -> Any:
    """Constrains arrays to lie in full on every device: those that every host reads, and the counters of a state."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)


def host_sharding(params: Any, mesh: Mesh | None) -> Sharding:
    """Where the host puts the arrays that it passes to a program: on the devices of the parameters, in full on each.

    A program is compiled once for arrays that lie in one place, and again where they lie in another.
    """
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    # parameters may be abstract, where a program is only planned
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf, jax.Array):
        return SingleDeviceSharding(next(iter(leaf.devices())))
    return SingleDeviceSharding(jax.devices()[0])


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an activation by the logical names of its axes; does nothing where no mesh is set.

    An axis whose size the mesh does not divide, such as three blocks of sound over eight devices, is replicated.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    axes = [axes_of(name, size) if name else None for name, size in zip(names, x.shape, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the rows of a batch are sharded."""
    return _num_parts(mesh, "batch")


def batch_sharding(mesh: Mesh, num_rows: int) -> NamedSharding:
    """Of arrays with a row for each request: over the axes of the batch, or in full on every device where they do not
    divide the rows.
    """
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]) if _divides(mesh, "batch", num_rows) else PartitionSpec())


def map_over_batch(function: Callable[[Any, Any], R], shared: Any, rows: Any) -> R:
    """``function(shared, rows)``, computed by each shard of the batch for its own rows alone.

    Left to the compiler, gathers among rows and sums over them would move all of them to every device.

    Args:
      function: from and to trees of arrays; it must not depend on how many rows there are.
      shared: what all rows need.
      rows: arrays whose first axis is the rows. Where the mesh does not divide it, every device computes all.

    Returns:
      What ``function`` does, with its rows where they were.
    """
    num_rows = len(jax.tree.leaves(rows)[0])
    axes = axes_of("batch", num_rows)
    mesh = jax.sharding.get_abstract_mesh()
    if axes is None or batch_shards(mesh) == 1:
        return replicate(function(shared, rows))
    spec = PartitionSpec(axes)
    # other axes of the mesh stay the compiler's
    mapped = jax.shard_map(
        function, in_specs=(PartitionSpec(), spec), out_specs=spec, axis_names=set(axes), check_vma=False
    )
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), mapped(shared, rows))


def axes_of(name: str, size: int) -> tuple[str, ...] | None:
    """The axes of the current mesh that an axis of an activation is sharded over; None if they do not divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not _divides(mesh, name, size):
        return None
    # within a shard_map over them the size is one device's already
    if set(RULES[name]) & set(mesh.manual_axes):
        return None
    return RULES[name] or None
