"""PyTorch checkpoints as Hugging Face folders hold them, without PyTorch.

A folder is ``config.json`` beside ``model.safetensors``, or beside several files with an index. Everything is checked
from the headers before a tensor is read, and then one tensor is read at a time, so that memory never holds more.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from omni_jax.checkpoint.name_map import (
    COMPONENTS,
    Entry,
    describe_differences,
    describe_list,
    make_name_table,
    optional_constants,
    published_name,
)
from omni_jax.checkpoint.packed_linear import Packing, widen_packed
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, read_header, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import has_file, is_plain_name, read_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_headers(folder: Path, component: str | None = None, packing: Packing | None = None) -> dict[str, StoredTensor]:
    """Every tensor of a folder under its published name, whichever of the two naming schemes the files use.

    Args:
      folder: with one file of tensors, or with several and their index.
      component: the part of the model that was saved alone into this folder, whose names may lack its own.
      packing: how the folder packs linear maps, which are widened as they are read; None: it may have no packed ones.

    Raises:
      CheckpointError: for a file that is missing, cut short or disagrees with the index, and for whole numbers that are
        no part of a packed weight; each is named.
    """
    if has_file(folder / SINGLE_FILE):
        found = read_header(folder / SINGLE_FILE)
    elif has_file(folder / INDEX_FILE):
        found = _read_shards(folder)
    else:
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read")

    # the two schemes have two names for a tensor, so a folder of both could hold it twice
    tensors: dict[str, StoredTensor] = {}
    file_names: dict[str, str] = {}  # published name -> the name in the file
    doubled: list[str] = []
    for name, tensor in found.items():
        published = published_name(name, component)
        if published in tensors:
            doubled.append(f"{file_names[published]} and {name}")
        tensors[published] = tensor
        file_names[published] = name
    if doubled:
        trouble = describe_list("of them", doubled)
        raise CheckpointError(f"{folder} holds tensors twice, under both of their names:{trouble}")
    return widen_packed(tensors, packing)


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    files_of_tensors = read_object(index).get("weight_map")
    if not isinstance(files_of_tensors, dict) or not all(isinstance(file, str) for file in files_of_tensors.values()):
        raise CheckpointError(f"{index} is no index: its weight_map must name a file for each tensor")
    files = sorted(set(files_of_tensors.values()))
    # an index from a stranger reads no file but those beside it
    outside = [file for file in files if not is_plain_name(file)]
    if outside:
        raise CheckpointError(f"{index} names files outside its folder:{describe_list('of them', outside)}")
    # named together, so that a download that was interrupted can be completed at once
    absent: list[str] = []
    for file in files:
        if not has_file(folder / file):
            absent.append(file)
    if absent:
        trouble = describe_list("missing", absent)
        raise CheckpointError(f"{folder}: {INDEX_FILE} names files that are not there:{trouble}")

    # index and files must agree in both directions, or files of two models lie in one folder
    found: dict[str, StoredTensor] = {}
    unlisted: list[str] = []
    for file in files:
        for name, tensor in read_header(folder / file).items():
            found[name] = tensor
            if files_of_tensors.get(name) != file:
                unlisted.append(f"{name} (in {file})")
    lost: list[str] = []
    for name, file in files_of_tensors.items():
        if name not in found:
            lost.append(f"{name} (should be in {file})")
    if unlisted or lost:
        trouble = describe_list("in a file where the index does not have them", unlisted)
        trouble += describe_list("in no file", lost)
        raise CheckpointError(f"{index} does not agree with its files:{trouble}")
    return found


def check_tensors(
    folder: Path, tensors: dict[str, StoredTensor], config: OmniConfig, components: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Checks names, shapes and dtypes before a tensor is read.

    Args:
      folder: where the tensors are, for the message.
      tensors: as ``read_headers`` gives them.
      config: what they must fit.
      components: which of them must be complete; those that the files hold if None. Of a component that is there
        without being asked for, names and shapes must be right.

    Returns:
      The components to read, in the order of COMPONENTS.

    Raises:
      CheckpointError: with all that is missing, unexpected or of a shape other than the configuration's.
    """
    # which components there are, and whether those that are asked for are among them
    present = {name.split(".")[0] for name in tensors}
    if not present & set(COMPONENTS):
        first = next(iter(tensors), "none at all")
        raise CheckpointError(
            f"{folder} holds no tensor of {', '.join(COMPONENTS)} (the first is {first}), but its config.json is that "
            "of the whole model. A Thinker saved alone has its own config.json; no other part can be read alone"
        )
    held = _order_components(present)
    requested = held if components is None else components
    absent = [component for component in requested if component not in present]
    if absent:
        raise CheckpointError(f"{folder} holds no {' and no '.join(absent)}; it has {', '.join(held)}")
    wanted = _order_components(requested)

    # a component that was not asked for may lack tensors, but those that are there must be right
    expected: dict[str, tuple[int, ...]] = {}
    for entry in make_name_table(config):
        for name in entry.names:
            if entry.component in wanted or name in tensors:
                expected[name] = entry.shape
    for name, shape in optional_constants(config).items():
        if name in tensors:
            expected[name] = shape
    trouble = describe_differences(expected, tensors)
    mixed = _mixed_stacks(tensors, make_name_table(config, wanted))
    trouble += describe_list("stacks whose layers differ in dtype", mixed)
    if trouble:
        raise CheckpointError(f"{folder} does not hold the model that its config.json describes:{trouble}")
    return wanted


def _order_components(names: Container[str]) -> tuple[str, ...]:
    """Those of COMPONENTS that are among ``names``, in their order."""
    return tuple(component for component in COMPONENTS if component in names)


def _mixed_stacks(tensors: dict[str, StoredTensor], entries: Iterable[Entry]) -> list[str]:
    """The stacked leaves whose layers do not share a dtype."""
    mixed = []
    for entry in entries:
        dtypes: set[str] = set()
        for name in entry.names:
            if name in tensors:  # what is missing is reported elsewhere
                dtypes.add(str(tensors[name].dtype))
        if len(dtypes) > 1:
            mixed.append(f"{entry.names[0]} to {entry.names[-1]}: {', '.join(sorted(dtypes))}")
    return mixed


def read_layers(entry: Entry, tensors: dict[str, StoredTensor]) -> Iterator[np.ndarray]:
    """A leaf of our tree from the published tensors: layer by layer where it is stacked, else all of it at once."""
    for name in entry.names:
        yield entry.to_jax(tensors[name].read())


def write_tensors(folder: Path, tensors: Iterable[NewTensor], shard_bytes: int) -> None:
    """Writes tensors as one file, or as several of at most ``shard_bytes`` (or one tensor) with their index."""
    # cut by the sizes that are announced, since a file's name has the number of files in it
    shards = list(_cut_into_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, shards[0])
        return

    files_of_tensors: dict[str, str] = {}
    total_size = 0
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard)
        for tensor in shard:
            files_of_tensors[tensor.name] = file
            total_size += tensor.nbytes
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files_of_tensors.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _cut_into_shards(tensors: Iterable[NewTensor], shard_bytes: int) -> Iterator[list[NewTensor]]:
    shard: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        # a tensor larger than the limit has a shard of its own
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard = []
            size = 0
        shard.append(tensor)
        size += tensor.nbytes
    if shard:
        yield shard
