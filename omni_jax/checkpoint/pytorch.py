"""PyTorch checkpoints as Hugging Face folders hold them, without PyTorch.

A folder is ``config.json`` beside ``model.safetensors``, or beside several files with an index. Everything is checked
from the headers before a number is read, and then one tensor is read at a time, so that memory never holds more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from omni_jax.checkpoint.name_map import (
    COMPONENTS,
    Entry,
    differences,
    listed,
    make_name_table,
    optional_constants,
    published_name,
)
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, read_header, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder under its published name, whichever of the two naming schemes the files use.

    Raises:
      CheckpointError: for a file that is missing, cut short or disagrees with the index; each is named.
    """
    if (folder / SINGLE_FILE).exists():
        found = read_header(folder / SINGLE_FILE)
    elif (folder / INDEX_FILE).exists():
        found = _read_shards(folder)
    else:
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; other formats are not read")
    tensors = {published_name(name): tensor for name, tensor in found.items()}
    if len(tensors) != len(found):
        double = [n for n in found if published_name(n) != n and published_name(n) in found]
        raise CheckpointError(f"{folder} holds tensors twice, under both of their names:{listed('of them', double)}")
    return tensors


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX_FILE
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except OSError as e:
        raise CheckpointError(f"cannot read {index}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{index} is no index: it must be JSON with a weight_map ({e})") from e
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder}: {INDEX_FILE} names files that are not there:{listed('missing', absent)}")
    found: dict[str, StoredTensor] = {}
    unlisted: list[str] = []
    for file in files:
        header = read_header(folder / file)
        unlisted += [f"{name} (in {file})" for name in header if places.get(name) != file]
        found.update(header)
    lost = [f"{name} (should be in {file})" for name, file in places.items() if name not in found]
    if unlisted or lost:
        trouble = listed("in a file where the index has not got them", unlisted) + listed("in no file", lost)
        raise CheckpointError(f"{index} does not agree with its files:{trouble}")
    return found


def check(
    folder: Path, tensors: dict[str, StoredTensor], config: OmniConfig, components: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Which components are to be read: those asked for, or without a wish all that the files hold.

    They must be whole. Of a component that is there without being asked for, names and shapes must be right.

    Raises:
      CheckpointError: with all that is missing, unexpected or of a shape other than the configuration's.
    """
    present = {name.split(".")[0] for name in tensors}
    if not present & set(COMPONENTS):
        first = next(iter(tensors), "none at all")
        raise CheckpointError(
            f"{folder} holds no tensor of {', '.join(COMPONENTS)} (the first is {first}); a part that was saved by "
            "itself is not read, give the folder of the whole model"
        )
    if absent := [c for c in components or () if c not in present]:
        here = ", ".join(c for c in COMPONENTS if c in present)
        raise CheckpointError(f"{folder} holds no {' and no '.join(absent)}; it has {here}")
    wanted = tuple(c for c in COMPONENTS if c in (present if components is None else components))
    everything = {name: entry.shape for entry in make_name_table(config) for name in entry.names}
    expected = {n: shape for n, shape in everything.items() if n.split(".")[0] in wanted or n in tensors}
    constants = optional_constants(config)
    expected.update({n: shape for n, shape in constants.items() if n in tensors})
    trouble = differences(expected, {name: tensor.shape for name, tensor in tensors.items()})
    trouble += listed("stacks whose layers differ in dtype", _mixed(tensors, make_name_table(config, wanted)))
    if trouble:
        raise CheckpointError(f"{folder} does not hold the model that its config.json describes:{trouble}")
    return wanted


def _mixed(tensors: dict[str, StoredTensor], entries: Iterable[Entry]) -> list[str]:
    kinds = {entry.names: {str(tensors[n].dtype) for n in entry.names if n in tensors} for entry in entries}
    return [f"{names[0]} to {names[-1]}: {', '.join(sorted(k))}" for names, k in kinds.items() if len(k) > 1]


def pieces(entry: Entry, tensors: dict[str, StoredTensor]) -> Iterator[np.ndarray]:
    """One leaf of the tree as the published tensors give it: layer by layer where it is stacked, else at once."""
    for name in entry.names:
        yield entry.to_jax(tensors[name].read())


def write_tensors(folder: Path, tensors: Iterable[NewTensor], shard_bytes: int) -> None:
    """Writes tensors as one file, or as several of at most ``shard_bytes`` (or one tensor) with their index."""
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        return write_file(folder / SINGLE_FILE, shards[0])
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_file(folder / file, shard)
        places.update({t.name: file for t in shard})
    size = sum(t.nbytes for shard in shards for t in shard)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(tensors: Iterable[NewTensor], shard_bytes: int) -> Iterator[list[NewTensor]]:
    shard: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    if shard:
        yield shard
