"""Adapters (LoRA) of the Thinker as they are served: put beside its kernels, or merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from flax.typing import Dtype
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from omni_jax.checkpoint.peft import Adapter, read_adapter
from omni_jax.config import OmniConfig
from omni_jax.engine.adapters import AdapterTable
from omni_jax.errors import CheckpointError
from omni_jax.generation.lane_padding import widen_adapter_shapes
from omni_jax.layers.lora import LoRAKernel, find_adapters, merge_kernel
from omni_jax.layers.quantized import QuantizedKernel

_COMPONENT = "thinker"


def read_adapters(folders: Mapping[str, Path], config: OmniConfig) -> dict[str, Adapter]:
    """Reads adapters that requests are to choose by name.

    Args:
      folders: of each: peft's, or a run's.
      config: of the model.

    Raises:
      CheckpointError: if one is none, is of another model, or is of more than the Thinker.
    """
    adapters = {}
    for name, folder in folders.items():
        adapter = read_adapter(folder, config)
        others = [module for module in adapter.config.modules if not module.startswith(f"{_COMPONENT}/")]
        if others:
            raise CheckpointError(
                f"{folder} adapts {others[0]} too; requests can choose adapters of the Thinker alone. Give the run's "
                "folder as the model, or merge the adapter (tools/convert.py to-hf)"
            )
        adapters[name] = adapter
    return adapters


def make_table(adapters: Mapping[str, Adapter]) -> AdapterTable:
    """What the engine knows of adapters."""
    return AdapterTable(tuple(adapters), tuple(adapter.config.rank for adapter in adapters.values()))


def attach_table(params: Mapping[str, Any], adapters: Mapping[str, Adapter], dtype: Dtype) -> Any:
    """The Thinker's parameters with all adapters beside its kernels, their ranks one after the other.

    Args:
      params: of the Thinker, its layers stacked; kernels may be quantised, and wider than the checkpoint's.
      adapters: by name.
      dtype: of the adapters' arrays.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    trees = []
    modules: set[tuple[str, ...]] = set()
    for adapter in adapters.values():
        found = {path: (a, b) for path, a, b in find_adapters(adapter.params[_COMPONENT])}
        modules |= set(found)
        trees.append((adapter.config, found))
    for path in sorted(modules):
        is_stacked = "layers" in path
        name = (*path, "kernel")
        like_a, like_b = next(found[path] for _, found in trees if path in found)
        all_a = []
        all_b = []
        for config, found in trees:
            # an adapter that does not adapt this map adds nothing to it
            a, b = found.get(path, (None, None))
            axis = 1 if is_stacked else 0
            shape_b = (*like_b.shape[:axis], config.rank, *like_b.shape[axis + 1 :])
            all_a.append(np.zeros((*like_a.shape[:-1], config.rank), np.float32) if a is None else np.asarray(a))
            all_b.append(np.zeros(shape_b, np.float32) if b is None else config.scale * np.asarray(b))
        a = np.concatenate(all_a, axis=-1)
        b = np.concatenate(all_b, axis=1 if is_stacked else 0)
        flat[name] = _place(flat[name], a.astype(dtype), b.astype(dtype), is_stacked)
    return unflatten_dict(flat)


def _place(kernel: Any, a: np.ndarray, b: np.ndarray, is_stacked: bool) -> LoRAKernel:
    """The two arrays beside a kernel, spread as its inputs and outputs are."""
    values: Any = kernel.values if isinstance(kernel, QuantizedKernel) else kernel
    # a kernel may have been widened with zeros
    shape_a, shape_b = widen_adapter_shapes(values.shape, a.shape, b.shape)
    a = _pad(a, shape_a)
    b = _pad(b, shape_b)
    place_a: Sharding = values.sharding
    place_b: Sharding = values.sharding
    if isinstance(values.sharding, NamedSharding):
        spec = [*values.sharding.spec, *[None] * (values.ndim - len(values.sharding.spec))]
        mesh = values.sharding.mesh
        num_leading = 1 if is_stacked else 0
        place_a = NamedSharding(mesh, PartitionSpec(*spec[: a.ndim - 1], None))
        place_b = NamedSharding(mesh, PartitionSpec(*spec[:num_leading], None, *spec[a.ndim - 1 :]))
    return LoRAKernel(kernel, jax.device_put(a, place_a), jax.device_put(b, place_b))


def _pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, wide - narrow) for narrow, wide in zip(array.shape, shape, strict=True)])


def merge_adapter(params: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    """The components of a model with what its own adapter adds to their kernels, which keep dtype and place.

    Args:
      params: of each component.
      adapter: of some of them; what it has of others is left out.
    """
    flat: dict[tuple[str, ...], Any] = flatten_dict(params)
    for path, a, b in find_adapters(adapter.params):
        name = (*path, "kernel")
        if name in flat:
            flat[name] = _merge_kernel(flat[name], a, b, adapter.config.scale, "layers" in path)
    return unflatten_dict(flat)


def _merge_kernel(kernel: jax.Array, a: Any, b: Any, scale: float, is_stacked: bool) -> jax.Array:
    def merge(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        return merge_kernel(*arrays, scale)

    def merge_stack(*arrays: jax.Array) -> jax.Array:
        # layer by layer, so that no more than one is held in float32
        return jax.lax.map(merge, arrays) if is_stacked else merge(arrays)  # type: ignore[arg-type]

    return jax.jit(merge_stack, out_shardings=kernel.sharding)(kernel, np.asarray(a), np.asarray(b))
