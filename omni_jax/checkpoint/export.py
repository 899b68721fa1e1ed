"""From a folder of ours back to one that PyTorch loads.

A tensor that was neither cast nor trained since it came from PyTorch goes back with the same bits, under the published
name, and so do the tensors that are no parameters. One tensor is in memory at a time. The small files go back in the
form of transformers 4, which version 5 reads too. An adapter of the checkpoint is merged into the kernels it adapts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store, voices
from omni_jax.checkpoint.convert import Conversion, Progress, ProgressCounter
from omni_jax.checkpoint.model_files import CONSTANTS_FILE, TOKEN2WAV_FILE, side_files, write_thinker_config
from omni_jax.checkpoint.name_map import (
    COMPONENTS,
    Entry,
    describe_differences,
    make_constants,
    make_name_table,
    optional_constants,
)
from omni_jax.checkpoint.peft import Adapter, read_adapter
from omni_jax.checkpoint.pytorch import write_tensors
from omni_jax.checkpoint.tensor_file import NewTensor, read_header
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import copy_file, has_file

SHARD_BYTES = 5 * 10**9  # what the published files are cut at


def to_hf(
    source: Path,
    target: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Writes the Hugging Face folder of a checkpoint. Everything is checked before the first tensor is read.

    What was trained beside the published model, such as the discriminators of its vocoder, is left out.

    A checkpoint with a Thinker and nothing else becomes a folder as PyTorch's
    ``Qwen2_5OmniThinkerForConditionalGeneration`` saves it.

    Args:
      source: a checkpoint of ours, with all components or a Thinker alone; or a training run's folder, whose last one
        it is.
      target: a path where nothing is yet; it appears when all of it is written.
      shard_bytes: the largest size of one file of tensors, unless a single tensor is larger.
      progress: called after each tensor.

    Raises:
      CheckpointError: if ``target`` exists, or a component, a parameter, the voices or a file is missing or wrong; and
        if the DiT was distilled.
    """
    store.refuse_existing(target)
    source = resolve_checkpoint(source)
    components = _check_components(source)
    _check_not_distilled(source, components)
    is_thinker_alone = components == ("thinker",)
    # ``abstract`` compares all shapes with config.json; the dtypes are those that the tensors are written in
    shapes: dict[tuple[str, ...], Any] = flatten_dict(store.abstract(source, components))
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in shapes.items()}
    config = OmniConfig.load(source)
    files = side_files(source)
    constants = _make_constants(source, config, components)
    # a Thinker has no voices; whatever else is exported must have those of its config.json's sizes
    speakers = {} if is_thinker_alone else voices.load_voices(source)
    voices.check(speakers, config, source / voices.VOICES_FILE)

    # the tensors with their sizes, from which the files are cut; values are read when their turn to be written comes
    entries = make_name_table(config, components)
    counter = ProgressCounter(entries, progress)
    adapter = read_adapter(source, config) if store.has_adapter(source) else None
    tensors = list(_make_tensors(source, entries, dtypes, counter, is_thinker_alone, adapter))
    tensors += constants

    with store.new_folder(target) as unfinished:
        for file in files:
            copy_file(file, unfinished / file.name)
        if is_thinker_alone:
            write_thinker_config(unfinished)
        else:
            _write_voices(source, unfinished, speakers)
        write_tensors(unfinished, tensors, shard_bytes)
    sizes = [entry.size * dtypes[entry.path].itemsize for entry in entries]
    left_out = tuple(name for name in store.components(source) if name in store.UNPUBLISHED)
    return Conversion(components, counter.total, sum(sizes), max(sizes), left_out)


def _make_tensors(
    source: Path,
    entries: Sequence[Entry],
    dtypes: dict[tuple[str, ...], np.dtype],
    counter: ProgressCounter,
    is_thinker_alone: bool,
    adapter: Adapter | None,
) -> Iterator[NewTensor]:
    # the tensors of one leaf are written one after the other, so one open leaf is enough
    open_leaf = functools.lru_cache(maxsize=1)(functools.partial(store.open_leaf, source))

    def read(entry: Entry, layer: int) -> np.ndarray:
        read_leaf = open_leaf(entry.path)
        leaf = read_leaf(layer if entry.stacked else None)
        if adapter is not None:
            leaf = adapter.merge(leaf, entry, layer)
        tensor = entry.to_torch(leaf)
        counter.advance()
        return tensor

    for entry in entries:
        for layer, name in enumerate(entry.names):
            # transformers 4 saves a Thinker alone without the name of the component
            written_name = name.removeprefix("thinker.") if is_thinker_alone else name
            yield NewTensor(written_name, entry.shape, dtypes[entry.path], functools.partial(read, entry, layer))


def _check_components(source: Path) -> tuple[str, ...]:
    """The components of a checkpoint that PyTorch has a model for."""
    found = store.components(source)
    present: list[str] = []
    absent: list[str] = []
    for name in COMPONENTS:
        if name in found:
            present.append(name)
        else:
            absent.append(name)
    components = tuple(present)
    if components in (COMPONENTS, ("thinker",)):
        return components
    raise CheckpointError(
        f"{source} has no {' and no '.join(absent)}, and PyTorch loads all three components or a Thinker alone; it was "
        f"converted with --components {' '.join(found)}. Convert the PyTorch folder again without --components"
    )


def _check_not_distilled(source: Path, components: Sequence[str]) -> None:
    """Raises CheckpointError if the DiT has guidance in itself, or needs another solver than PyTorch's."""
    if "token2wav" in components and has_file(source / TOKEN2WAV_FILE):
        raise CheckpointError(
            f"the DiT of {source} was distilled ({TOKEN2WAV_FILE}), and PyTorch's model would guide it once more, by a "
            "velocity without codes that it has unlearnt; what it would say is noise. Convert the checkpoint that the "
            "distillation began from"
        )


def _make_constants(source: Path, config: OmniConfig, components: Sequence[str]) -> list[NewTensor]:
    """The tensors that are no parameters: as they came, or computed where the converted files had none."""
    path = source / CONSTANTS_FILE
    if not has_file(path):
        raise CheckpointError(f"{source} has no {CONSTANTS_FILE}: an older release made it; convert it again")
    stored = read_header(path)
    # any of them may be missing, but nothing else may be there
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in optional_constants(config).items():
        if name in stored:
            expected[name] = shape
    trouble = describe_differences(expected, stored)
    if trouble:
        raise CheckpointError(f"{path} does not hold the constants of the model in config.json:{trouble}")
    constants = []
    for name, values in make_constants(config).items():
        if name in stored:
            constants.append(NewTensor.of(name, stored[name]))
        elif name.split(".")[0] in components:
            # the default binds the values of this round; without it all lambdas would give those of the last
            constants.append(NewTensor(name, values.shape, values.dtype, lambda values=values: values))
    return constants


def _write_voices(source: Path, target: Path, speakers: dict[str, voices.Voice]) -> None:
    """Writes the voices; the published file as it came, as long as it holds the same as ours."""
    original = source / voices.PUBLISHED_FILE
    if has_file(original):
        published = voices.read_spk_dict(original)
        if _are_same_voices(published, speakers):
            copy_file(original, target / original.name)
            return
    voices.write_spk_dict(target / voices.PUBLISHED_FILE, speakers)


def _are_same_voices(one: dict[str, voices.Voice], other: dict[str, voices.Voice]) -> bool:
    """Whether both have the same names in the same order, and equal values under each."""
    # the order counts: the first voice is the default where there is no Chelsie
    if list(one) != list(other):
        return False
    return all(voice.equals(other[name]) for name, voice in one.items())
