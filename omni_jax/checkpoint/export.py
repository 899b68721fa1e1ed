"""From a folder of ours back to one that PyTorch loads.

A tensor that was neither cast nor trained since it came from PyTorch goes back with the same bits, under the published
name, and so do the tensors that are no parameters. One tensor is in memory at a time.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store, voices
from omni_jax.checkpoint.convert import CONSTANTS_FILE, Conversion, Progress, side_files
from omni_jax.checkpoint.name_map import COMPONENTS, Entry, differences, make_name_table, optional_constants
from omni_jax.checkpoint.pytorch import write_tensors
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, read_header
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

SHARD_BYTES = 5 * 10**9  # what the published files are cut at


def to_hf(
    source: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Writes the Hugging Face folder of a checkpoint. Everything is checked before the first number is read.

    Args:
      source: a checkpoint of ours, with all components.
      target: a path where nothing is yet; it appears when all of it is written.
      shard_bytes: how large one file of tensors becomes at most, unless a single tensor is larger.
      progress: called after each tensor.

    Raises:
      CheckpointError: if ``target`` exists, or a component, a parameter, the voices or a file is missing or wrong.
    """
    store.refuse_existing(target)
    _refuse_parts(source)
    shapes: dict[tuple[str, ...], Any] = flatten_dict(store.abstract(source))
    kinds = {path: np.dtype(leaf.dtype) for path, leaf in shapes.items()}
    config, files, constants = OmniConfig.load(source), side_files(source), _constants(source)
    speakers = voices.load_voices(source)
    voices.check(speakers, config, source / voices.VOICES_FILE)
    entries = make_name_table(config)
    count, done = sum(len(entry.names) for entry in entries), 0
    # the tensors of one leaf are written one after the other
    opened = functools.lru_cache(maxsize=1)(functools.partial(store.open_leaf, source))

    def made(entry: Entry, layer: int) -> np.ndarray:
        nonlocal done
        tensor = entry.to_torch(opened(entry.path)(layer if entry.stacked else None))
        done += 1
        progress(done, count)
        return tensor

    def tensors() -> Iterator[NewTensor]:
        for entry in entries:
            for i, name in enumerate(entry.names):
                yield NewTensor(name, entry.shape, kinds[entry.path], functools.partial(made, entry, i))
        for name, constant in constants.items():
            yield NewTensor.of(name, constant)

    with store.new_folder(target) as unfinished:
        for file in files:
            shutil.copyfile(file, unfinished / file.name)
        _write_voices(source, unfinished, speakers)
        write_tensors(unfinished, tensors(), shard_bytes)
    sizes = [entry.size * kinds[entry.path].itemsize for entry in entries]
    return Conversion(COMPONENTS, count, sum(sizes), max(sizes))


def _refuse_parts(source: Path) -> None:
    here = store.components(source)
    if absent := [name for name in COMPONENTS if name not in here]:
        raise CheckpointError(
            f"{source} has no {' and no '.join(absent)}, and PyTorch does not load the model without; it was converted "
            f"with --components {' '.join(here)}. Convert the PyTorch folder again without --components"
        )


def _constants(source: Path) -> dict[str, StoredTensor]:
    path = source / CONSTANTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{source} has no {CONSTANTS_FILE}: an older release made it; convert it again")
    constants = read_header(path)
    known = optional_constants(OmniConfig.load(source))
    expected = {name: shape for name, shape in known.items() if name in constants}
    if trouble := differences(expected, {name: tensor.shape for name, tensor in constants.items()}):
        raise CheckpointError(f"{path} does not hold the constants of the model in config.json:{trouble}")
    return constants


def _write_voices(source: Path, target: Path, speakers: dict[str, voices.Voice]) -> None:
    """The published file as it came, as long as it says the same as the voices here."""
    original = source / voices.PUBLISHED_FILE
    if original.is_file():
        before = voices.read_spk_dict(original)
        if list(before) == list(speakers) and all(before[name].equals(speakers[name]) for name in before):
            shutil.copyfile(original, target / original.name)
            return
    voices.write_spk_dict(target / voices.PUBLISHED_FILE, speakers)
