"""From a PyTorch folder to a folder of ours; ``export`` is the way back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from omni_jax.checkpoint import pytorch, store, voices
from omni_jax.checkpoint.model_files import CONSTANTS_FILE, copy_published_files, side_files
from omni_jax.checkpoint.name_map import Entry, make_name_table, optional_constants
from omni_jax.checkpoint.packed_linear import CONFIG_KEY, find_packing
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, write_file
from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.config_file import CONFIG_FILE, read_config_file
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import copy_file, has_file

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      components: what was converted.
      tensors: how many published tensors the parameters are.
      nbytes: bytes of the parameters, before compression.
      largest: bytes of the largest leaf.
      left_out: components of the source that the target has no place for.
    """

    components: tuple[str, ...]
    tensors: int
    nbytes: int
    largest: int
    left_out: tuple[str, ...] = ()


class ProgressCounter:
    """Counts the tensors of a conversion and reports each."""

    def __init__(self, entries: Sequence[Entry], report: Progress) -> None:
        self.total = sum(len(entry.names) for entry in entries)
        self._done = 0
        self._report = report

    def advance(self) -> None:
        """One more tensor is done."""
        self._done += 1
        self._report(self._done, self.total)


def to_jax(
    source: Path,
    target: Path,
    *,
    components: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Converts a Hugging Face folder. Everything is checked before the first tensor is read.

    Args:
      source: the folder of a whole model, or of a Thinker that was saved alone; written by transformers 4 or 5. Weights
        that AWQ or GPTQ packed in 4 bits are widened.
      target: a path where nothing is yet.
      components: which of thinker, talker and token2wav; all that the files hold if None.
      dtype: what the Thinker and the Talker are cast to; Token2Wav, which needs float32, keeps the file's.
      progress: called after each tensor.

    Raises:
      CheckpointError: if a file or a tensor is missing, unexpected or of another shape, ``target`` exists, or Talker
        or Token2Wav are converted and the voices are missing or wrong.
      ConfigError: if config.json is not the model's.
    """
    # everything that can be wrong is found before the target is begun, for a conversion takes minutes
    store.refuse_existing(target)
    side_files(source)
    config_values = read_config_file(source)
    packing = find_packing(config_values)
    config_values = {name: value for name, value in config_values.items() if name != CONFIG_KEY}
    config = OmniConfig.from_dict(config_values, str(source / CONFIG_FILE))
    is_thinker_alone = config_values.get("model_type") == ThinkerConfig.MODEL_TYPE
    # a Thinker saved alone has names without "thinker." in transformers 4, and with it in some folders of 5
    tensors = pytorch.read_headers(source, "thinker" if is_thinker_alone else None, packing)
    found = pytorch.check_tensors(source, tensors, config, components)
    # text alone needs no voice, so a folder without them can be converted for it
    speakers = _read_voices(source, config) if {"talker", "token2wav"} & set(found) else {}

    # nothing is read here: a leaf has a generator that reads its tensors when ``save`` comes to it
    entries = make_name_table(config, found)
    counter = ProgressCounter(entries, progress)
    leaves = [_make_leaf(entry, tensors, dtype, counter) for entry in entries]

    def write_beside(folder: Path) -> None:
        copy_published_files(source, folder)
        if packing is not None:
            # what is written is not packed
            (folder / CONFIG_FILE).write_text(json.dumps(config_values, indent=2) + "\n", encoding="utf-8")
        if speakers:
            # the published file too: it goes back to PyTorch byte by byte, where the voices are still the same
            copy_file(source / voices.PUBLISHED_FILE, folder / voices.PUBLISHED_FILE)
            voices.save_voices(folder, speakers)
        _write_constants(folder, tensors, config, found)

    store.save(target, leaves, write_beside)
    sizes = [leaf.nbytes for leaf in leaves]
    return Conversion(found, counter.total, sum(sizes), max(sizes))


def _read_voices(source: Path, config: OmniConfig) -> dict[str, voices.Voice]:
    path = source / voices.PUBLISHED_FILE
    if not has_file(path):
        raise CheckpointError(
            f"{source} has no {path.name}, the voices that the Talker and Token2Wav speak in; fetch it from the "
            "published model, or convert with --components thinker for text alone"
        )
    speakers = voices.read_spk_dict(path)
    voices.check(speakers, config, path)
    return speakers


def _make_leaf(
    entry: Entry, tensors: dict[str, StoredTensor], dtype: DTypeLike | None, counter: ProgressCounter
) -> store.Leaf:
    # Token2Wav stays in float32: its 36 evaluations would add up the errors of narrower weights
    keeps_dtype = entry.component == "token2wav" or dtype is None
    # any layer will do: ``check_tensors`` refuses a stack whose layers differ in dtype
    leaf_dtype = tensors[entry.names[0]].dtype if keeps_dtype else np.dtype(dtype)

    def read() -> Iterator[np.ndarray]:
        for layer in pytorch.read_layers(entry, tensors):
            counter.advance()
            yield layer

    return store.Leaf(entry.path, entry.leaf_shape, leaf_dtype, entry.stacked, read)


def _write_constants(
    folder: Path, tensors: dict[str, StoredTensor], config: OmniConfig, components: Sequence[str]
) -> None:
    constants = []
    for name in optional_constants(config):
        # transformers 5 does not save them; ``export`` computes what is missing
        if name in tensors and name.split(".")[0] in components:
            constants.append(NewTensor.of(name, tensors[name]))
    write_file(folder / CONSTANTS_FILE, constants)
