"""Adapters of linear maps (LoRA) beside the components of a checkpoint: which there are, and their shapes.

A checkpoint with an adapter has one more tree, ``params/lora``. It repeats the paths of the linear maps, component
first, with an ``a`` and a ``b`` (``omni_jax.layers.lora``) below each; ``lora.json`` says which maps those are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from omni_jax.checkpoint.name_map import COMPONENTS, Entry, make_name_table
from omni_jax.checks import check_float, check_int, shown
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.plain_files import read_object

LORA = "lora"  # the tree of adapters, beside those of the components
LORA_FILE = "lora.json"
MAX_RANK = 1024
MAX_ALPHA = 1e6
_MAX_MODULES = 4096
# the DiT multiplies this kernel part by part, and not as one linear map
_IN_PARTS = ("token2wav", "dit", "input_proj", "kernel")


@dataclass(frozen=True)
class LoRAConfig:
    """What an adapter adapts.

    Attributes:
      rank: R, of every adapter.
      alpha: what adapters add is multiplied by alpha / rank.
      modules: paths of the linear maps that have one, like ``thinker/decoder/layers/attention/query``, sorted.
    """

    rank: int
    alpha: float
    modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def to_json(self) -> str:
        """The text of ``lora.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def load(cls, folder: Path) -> LoRAConfig:
        """Reads ``lora.json``.

        Raises:
          CheckpointError: if it is missing, or its values are none that an adapter has.
        """
        path = folder / LORA_FILE
        values = read_object(path)
        try:
            rank = check_int("rank", values.get("rank"), 1, MAX_RANK)
            alpha = check_float("alpha", values.get("alpha"), 0, MAX_ALPHA)
        except InputError as e:
            raise CheckpointError(f"{path}: {e}") from e
        modules = values.get("modules")
        if (
            not isinstance(modules, list)
            or not 0 < len(modules) <= _MAX_MODULES
            or not all(isinstance(module, str) for module in modules)
        ):
            raise CheckpointError(f"{path}: modules is {shown(modules)}; it must be a list of paths")
        return cls(rank, alpha, tuple(modules))


@dataclass(frozen=True)
class LinearMap:
    """A linear map of the model, as the name table has it.

    Attributes:
      entry: of its kernel.
      num_inputs: axes of the kernel that are inputs; they come before the outputs.
    """

    entry: Entry
    num_inputs: int

    @property
    def inputs(self) -> tuple[int, ...]:
        """Shape of what it takes."""
        return self._kernel_shape[: self.num_inputs]

    @property
    def outputs(self) -> tuple[int, ...]:
        """Shape of what it gives."""
        return self._kernel_shape[self.num_inputs :]

    @property
    def layers(self) -> tuple[int, ...]:
        """The leading axis of a stack of layers, or nothing."""
        return (len(self.entry.names),) if self.entry.stacked else ()

    @property
    def _kernel_shape(self) -> tuple[int, ...]:
        return self.entry.leaf_shape[len(self.layers) :]

    def adapter_shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of ``a`` and ``b``."""
        return {"a": (*self.layers, *self.inputs, rank), "b": (*self.layers, rank, *self.outputs)}


def find_linear_maps(config: OmniConfig, components: Sequence[str] = COMPONENTS) -> dict[str, LinearMap]:
    """The linear maps of components, by their paths; convolutions and embeddings are none."""
    found = {}
    for entry in make_name_table(config, components):
        # its published kernel has two axes, outputs first; or several, all inputs of which are merged into one
        is_linear = len(entry.shape) == 2 or len(entry.split) == 2
        if entry.path[-1] != "kernel" or not is_linear or entry.path == _IN_PARTS:
            continue
        num_outputs = 1
        while math.prod(entry.split[:num_outputs]) < entry.shape[0]:
            num_outputs += 1
        found["/".join(entry.path[:-1])] = LinearMap(entry, len(entry.split) - num_outputs)
    return found


def choose_modules(linear_maps: Mapping[str, LinearMap], targets: str) -> tuple[str, ...]:
    """The linear maps whose whole path matches a regular expression, sorted.

    Raises:
      ConfigError: if there is none, or the expression is none.
    """
    try:
        modules = sorted(path for path in linear_maps if re.fullmatch(targets, path))
    except re.error as e:
        raise ConfigError(f"lora.targets: {targets!r} is no regular expression: {e}") from e
    if not modules:
        examples = ", ".join(list(linear_maps)[:3])
        raise ConfigError(f"lora.targets: no linear map's whole path matches {targets!r}; paths: {examples} ...")
    return tuple(modules)


def adapter_shapes(config: OmniConfig, adapter: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every array of an adapter, by its path below ``lora``.

    Raises:
      CheckpointError: if the model has no such linear map.
    """
    linear_maps = find_linear_maps(config)
    shapes = {}
    for module in adapter.modules:
        if module not in linear_maps:
            raise CheckpointError(f"{LORA_FILE}: the model that config.json describes has no linear map {module}")
        for name, shape in linear_maps[module].adapter_shapes(adapter.rank).items():
            shapes[f"{module}/{name}"] = shape
    return shapes
