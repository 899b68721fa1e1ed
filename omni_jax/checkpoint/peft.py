"""Adapters in the format of peft (https://github.com/huggingface/peft), for the published model's modules.

A folder has ``adapter_config.json`` and ``adapter_model.safetensors`` with two matrices for each linear map:
``base_model.model.NAME.lora_A.weight`` [R, in] and ``base_model.model.NAME.lora_B.weight`` [out, R]. ``read_adapter``
reads the adapter of a checkpoint of ours too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from omni_jax.checkpoint import store
from omni_jax.checkpoint.lora import (
    LORA,
    MAX_ALPHA,
    MAX_RANK,
    LinearMap,
    LoRAConfig,
    adapter_shapes,
    find_linear_maps,
)
from omni_jax.checkpoint.name_map import Entry, describe_differences, describe_list, published_name
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, read_header, write_file
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_float, check_int, shown
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.layers.lora import merge_kernel
from omni_jax.plain_files import has_file, read_object

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)\.weight")
# what changes what an adapter computes and is not read, with the values under which it does nothing
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
}


@dataclass(frozen=True)
class Adapter:
    """An adapter on the host.

    Attributes:
      config: what it adapts.
      params: a tree with ``a`` and ``b`` below the path of each linear map, the component first.
    """

    config: LoRAConfig
    params: Mapping[str, Any]

    def merge(self, leaf: np.ndarray, entry: Entry, layer: int) -> np.ndarray:
        """A leaf of the model, or one layer of it, with what the adapter adds; in the leaf's dtype.

        Args:
          leaf: its values.
          entry: of the leaf.
          layer: which one it is, if the leaf is stacked.
        """
        module = "/".join(entry.path[:-1])
        if entry.path[-1] != "kernel" or module not in self.config.modules:
            return leaf
        flat = flatten_dict(self.params, sep="/")
        a, b = (np.asarray(flat[f"{module}/{name}"], np.float32) for name in "ab")
        if entry.stacked:
            a = a[layer]
            b = b[layer]
        return merge_kernel(leaf, a, b, self.config.scale)


def read_adapter(folder: Path, config: OmniConfig) -> Adapter:
    """Reads a folder of peft's, or the adapter of a checkpoint or of a run's folder.

    Args:
      folder: of either kind.
      config: of the model that it is for.

    Raises:
      CheckpointError: if there is no adapter, it is damaged, it needs what is not supported, or the model has other
        linear maps.
    """
    if has_file(folder / CONFIG_FILE):
        return _read_peft(folder, config)
    checkpoint = resolve_checkpoint(folder)
    if not store.has_adapter(checkpoint):
        raise CheckpointError(
            f"{folder} has no adapter: neither {CONFIG_FILE}, as peft writes it, nor a checkpoint of a run with "
            "--lora.rank"
        )
    adapter = LoRAConfig.load(checkpoint)
    stored: dict[str, Any] = flatten_dict(store.load(checkpoint, [LORA])[LORA], sep="/")
    trouble = describe_differences(adapter_shapes(config, adapter), stored)
    if trouble:
        raise CheckpointError(f"{folder} is an adapter of another model:{trouble}")
    return Adapter(adapter, unflatten_dict({path: np.asarray(leaf) for path, leaf in stored.items()}, sep="/"))


def write_adapter(source: Path, target: Path) -> LoRAConfig:
    """Writes the adapter of a checkpoint, or of a run's folder, as a folder of peft's.

    Args:
      source: a checkpoint with an adapter.
      target: a path where nothing is yet.

    Raises:
      CheckpointError: if ``source`` has none, or ``target`` exists.
    """
    store.refuse_existing(target)
    source = resolve_checkpoint(source)
    config = OmniConfig.load(source)
    adapter = read_adapter(source, config)
    flat: dict[str, Any] = flatten_dict(adapter.params, sep="/")
    rank = adapter.config.rank
    linear_maps = find_linear_maps(config)
    is_thinker_alone = set(store.components(source)) == {"thinker", LORA}
    tensors = []
    names = []
    for module in adapter.config.modules:
        linear_map = linear_maps[module]
        for layer, name in enumerate(_module_names(linear_map)):
            # transformers 4 saves a Thinker alone without the name of the component
            name = name.removeprefix("thinker.") if is_thinker_alone else name
            names.append(name)
            a, b = (flat[f"{module}/{letter}"][layer if linear_map.layers else ...] for letter in "ab")
            # inputs + (R,) -> [R, in], and (R,) + outputs -> [out, R]
            for letter, matrix in (("A", a.reshape(-1, rank).T), ("B", b.reshape(rank, -1).T)):
                shape = _published_shape(linear_map, letter, rank)
                tensors.append(_new_tensor(f"{_PREFIX}{name}.lora_{letter}.weight", matrix.reshape(shape)))
    with store.new_folder(target) as unfinished:
        write_file(unfinished / TENSORS_FILE, tensors)
        values = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "r": adapter.config.rank,
            "lora_alpha": adapter.config.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_dora": False,
            "use_rslora": False,
            # whole names: the last part alone would name maps of other parts of the model too
            "target_modules": sorted(names),
        }
        (unfinished / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return adapter.config


def _new_tensor(name: str, values: np.ndarray) -> NewTensor:
    values = np.ascontiguousarray(values)
    return NewTensor(name, values.shape, values.dtype, lambda: values)


def _published_shape(linear_map: LinearMap, letter: str, rank: int) -> tuple[int, ...]:
    """Of lora_A or lora_B; that of patches is a convolution in PyTorch, and so are its adapter's two."""
    outputs, *inputs = linear_map.entry.shape
    return (rank, *inputs) if letter == "A" else (outputs, rank, *[1] * (len(inputs) - 1))


def _module_names(linear_map: LinearMap) -> list[str]:
    """The published names of the modules of a linear map, one for each layer."""
    return [name.removesuffix(".weight") for name in linear_map.entry.names]


def _read_peft(folder: Path, config: OmniConfig) -> Adapter:
    rank, alpha = _read_config(folder)
    linear_maps = find_linear_maps(config)
    modules_of_names = {}
    for module, linear_map in linear_maps.items():
        modules_of_names.update(dict.fromkeys(_module_names(linear_map), module))
    tensors: dict[tuple[str, str], StoredTensor] = {}
    unknown: list[str] = []
    for name, tensor in read_header(folder / TENSORS_FILE).items():
        match = _TENSOR.fullmatch(name)
        module_name = _find_name(match.group(1), modules_of_names) if match else None
        # a name may be there in two spellings, and whole numbers are no adapter's
        if match is None or module_name is None or tensor.dtype == np.int32:
            unknown.append(name)
        elif (module_name, match.group(2)) in tensors:
            raise CheckpointError(f"{folder / TENSORS_FILE} has {module_name}.lora_{match.group(2)} twice")
        else:
            tensors[module_name, match.group(2)] = tensor
    if unknown or not tensors:
        raise CheckpointError(
            f"{folder / TENSORS_FILE}: not all of it is of a linear map of the model"
            + describe_list("that is none", unknown)
        )
    modules = tuple(sorted({modules_of_names[name] for name, _ in tensors}))
    adapter = LoRAConfig(rank, alpha, modules)
    flat = {}
    for module in modules:
        linear_map = linear_maps[module]
        for letter, name in (("A", "a"), ("B", "b")):
            flat[f"{module}/{name}"] = _read_matrices(folder, linear_map, tensors, letter, rank)
    return Adapter(adapter, unflatten_dict(flat, sep="/"))


def _find_name(name: str, known: Mapping[str, Any]) -> str | None:
    """The published name of a module, as either release of transformers and a Thinker alone spell it."""
    for candidate in (name, f"thinker.{name}"):
        # the table of names ends in those of tensors
        published = published_name(f"{candidate}.weight").removesuffix(".weight")
        if published in known:
            return published
    return None


def _read_matrices(
    folder: Path, linear_map: LinearMap, tensors: Mapping[tuple[str, str], StoredTensor], letter: str, rank: int
) -> np.ndarray:
    """``a`` or ``b`` of a linear map, float32; layers without an adapter have zeros."""
    name = letter.lower()
    shape = linear_map.adapter_shapes(rank)[name]
    layer_shape = shape[len(linear_map.layers) :]
    stored_shape = _published_shape(linear_map, letter, rank)
    layers = []
    for module_name in _module_names(linear_map):
        tensor = tensors.get((module_name, letter))
        if tensor is None:
            if (module_name, "B" if letter == "A" else "A") in tensors:
                raise CheckpointError(f"{folder / TENSORS_FILE} has one matrix of two of {module_name}")
            layers.append(np.zeros(layer_shape, np.float32))
            continue
        if tensor.shape != stored_shape:
            raise CheckpointError(
                f"{folder / TENSORS_FILE}: {module_name}.lora_{letter} is {list(tensor.shape)}; for this model and "
                f"rank {rank} it must be {list(stored_shape)}"
            )
        # [R, in] -> inputs + (R,), and [out, R] -> (R,) + outputs
        matrix = tensor.read().astype(np.float32).reshape(stored_shape[0], -1)
        layers.append(matrix.T.reshape(layer_shape))
    return np.stack(layers) if linear_map.layers else layers[0]


def _read_config(folder: Path) -> tuple[int, float]:
    """Rank and alpha, the latter such that the scale is alpha / rank."""
    path = folder / CONFIG_FILE
    values = read_object(path)
    try:
        if values.get("peft_type") != "LORA":
            raise InputError(f"peft_type is {shown(values.get('peft_type'))}; LORA alone is read")
        for name, harmless in _UNSUPPORTED.items():
            if values.get(name) not in harmless:
                raise InputError(
                    f"{name} is {shown(values[name])}, which is not supported; it must be {harmless[-1]!r}"
                )
        rank = check_int("r", values.get("r"), 1, MAX_RANK)
        alpha = check_float("lora_alpha", values.get("lora_alpha"), 0, MAX_ALPHA)
    except InputError as e:
        raise CheckpointError(f"{path}: {e}") from e
    # rank-stabilised LoRA (https://arxiv.org/abs/2312.03732) divides by the root of the rank
    return rank, alpha * rank**0.5 if values.get("use_rslora") else alpha
