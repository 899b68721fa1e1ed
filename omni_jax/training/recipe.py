"""What a run trains and over which devices: the value that a module of ``configs/`` makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from jax.sharding import AbstractMesh, AxisType

from omni_jax.config import OmniConfig
from omni_jax.sharding import MESH_AXES


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1

    def abstract(self) -> AbstractMesh:
        """A mesh of these sizes without devices, to plan with."""
        sizes = (self.data, self.fsdp, self.sequence, self.tensor)
        return AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


@dataclass(frozen=True)
class Recipe:
    """One run; ``about`` says in a line what it does."""

    about: str
    model: OmniConfig
    mesh: MeshSizes = field(default_factory=MeshSizes)
