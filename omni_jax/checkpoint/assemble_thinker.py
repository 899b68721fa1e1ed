"""A Thinker assembled from the models that its training begins with (Qwen2.5-Omni report, section 3).

Qwen2.5 gives the language model, Qwen2.5-VL the vision encoder, Whisper-large-v3 the audio encoder. Their tensors have
other names than in the published Thinker, and nothing else is different, but that Qwen2.5-VL keeps query, key and value
in one tensor. So each of the Thinker's tensors is looked up in ``SOURCES``, and then converted like a published one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from omni_jax.checkpoint import store
from omni_jax.checkpoint.model_files import CONSTANTS_FILE, side_files
from omni_jax.checkpoint.name_map import Entry, describe_differences, describe_list, make_name_table
from omni_jax.checkpoint.pytorch import read_headers
from omni_jax.checkpoint.tensor_file import StoredTensor, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import copy_file

# from paths of leaves below a component, like decoder/head/kernel, the values that they begin with
Initializer: TypeAlias = Callable[[Sequence[str]], Sequence[np.ndarray]]
_GROUP_BYTES = 1 << 30  # of leaves that are made at once


@dataclass(frozen=True)
class TensorSource:
    """Where a tensor of the Thinker is to be found.

    Attributes:
      model: "llm", "vision" or "audio".
      names: what it may be called there; the first that is there is taken.
    """

    model: str
    names: tuple[str, ...]


# A tensor of the Thinker, as a regular expression -> its source; the first that matches. The audio encoder's projection
# and its ``bos_eos`` match none, since Whisper has neither: they always begin at random.
SOURCES: dict[str, TensorSource] = {
    # small language models use their embeddings as the head too, and have no tensor of that name
    r"thinker\.lm_head\.weight": TensorSource("llm", ("lm_head.weight", "model.embed_tokens.weight")),
    r"thinker\.(model\..*)": TensorSource("llm", (r"\1",)),
    # before the pattern for all of ``visual``, which matches these names too
    r"thinker\.visual\.(blocks\.\d+\.attn)\.[qkv]\.(weight|bias)": TensorSource(
        "vision", (r"visual.\1.qkv.\2", r"model.visual.\1.qkv.\2")
    ),
    # with and without the module that newer releases of transformers put around both towers
    r"thinker\.visual\.(.*)": TensorSource("vision", (r"visual.\1", r"model.visual.\1")),
    # of Whisper with its language modelling head, and of Whisper saved without one
    r"thinker\.audio_tower\.ln_post\.(.*)": TensorSource(
        "audio", (r"model.encoder.layer_norm.\1", r"encoder.layer_norm.\1")
    ),
    r"thinker\.audio_tower\.((conv|layers).*)": TensorSource("audio", (r"model.encoder.\1", r"encoder.\1")),
}
# tensors of which Qwen2.5-VL holds three in one, stacked along the first axis in the order q, k, v
_FUSED = re.compile(r"thinker\.visual\.blocks\.\d+\.attn\.([qkv])\.")


@dataclass(frozen=True)
class _FoundTensor:
    """A tensor of another model, or its first, second or third part."""

    tensor: StoredTensor
    third: int | None = None  # 0, 1, 2 for q, k, v of a fused tensor; None: all of it

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = self.tensor.shape
        return (first if self.third is None else first // 3, *rest)

    def read(self) -> np.ndarray:
        values = self.tensor.read()
        return values if self.third is None else np.split(values, 3)[self.third]


def assemble_thinker(
    files: Path,
    target: Path,
    models: Mapping[str, Path],
    initialize: Initializer,
    components: Sequence[str] = ("thinker",),
) -> list[str]:
    """Writes a checkpoint with a Thinker alone. All is checked before the first tensor is read.

    Args:
      files: a folder with config.json, tokenizer.json and the other small files of the model.
      target: a path where nothing is yet.
      models: Hugging Face folders of "llm", "vision" and "audio"; the tensors of one that is missing begin at random.
      initialize: makes the leaves that begin at random, about a gigabyte of them at a time.
      components: () for a checkpoint of the small files alone.

    Returns:
      The published names of the tensors that begin at random.

    Raises:
      CheckpointError: if a model lacks a tensor of the Thinker, or has it in another shape.
      ConfigError: if config.json is not the model's.
    """
    # Look up every tensor of the Thinker; headers alone are read. One whose model is given must be there. One whose
    # model is not given, or that no model has, begins at random.
    entries = make_name_table(OmniConfig.load(files), components)
    headers = {model: read_headers(folder) for model, folder in models.items()}
    found: dict[str, _FoundTensor] = {}
    expected: dict[str, tuple[int, ...]] = {}
    random_names: list[str] = []
    for entry in entries:
        for name in entry.names:
            tensor = _find_tensor(name, headers)
            if tensor is None:
                random_names.append(name)
            else:
                found[name] = tensor
            if _source_model(name) in models:
                expected[name] = entry.shape

    trouble = describe_differences(expected, found)
    if trouble:
        folders = ", ".join(f"{model} {folder}" for model, folder in models.items())
        raise CheckpointError(f"{folders}: not the Thinker that {files / 'config.json'} describes:{trouble}")
    dtypes = _choose_dtypes(entries, found)
    initial = _InitialLeaves([entry for entry in entries if not found.keys() >= set(entry.names)], initialize)

    def make_leaf(entry: Entry) -> store.Leaf:
        def read() -> Iterator[np.ndarray]:
            # called when the leaf is written, so that one tensor is in memory at a time
            for number, name in enumerate(entry.names):
                if name in found:
                    yield entry.to_jax(found[name].read())
                else:
                    leaf = initial.read(entry)
                    yield leaf[number] if entry.stacked else leaf

        return store.Leaf(entry.path, entry.leaf_shape, dtypes[entry.path], entry.stacked, read)

    def write_beside(folder: Path) -> None:
        for file in side_files(files):
            copy_file(file, folder / file.name)
        # a Thinker has no constants; the file is there because ``export`` takes a checkpoint without it for an old one
        write_file(folder / CONSTANTS_FILE, [])

    store.save(target, [make_leaf(entry) for entry in entries], write_beside)
    return random_names


class _InitialLeaves:
    """Leaves that begin at random, made in groups when the first of a group is read."""

    def __init__(self, entries: Sequence[Entry], initialize: Initializer) -> None:
        self._initialize = initialize
        self._groups: list[list[str]] = []
        self._made: tuple[int, Sequence[np.ndarray]] = (-1, ())  # the latest group
        self._group_of: dict[tuple[str, ...], tuple[int, int]] = {}  # its group, and its place in that, by path
        num_bytes = _GROUP_BYTES
        for entry in entries:
            own_bytes = 4 * math.prod(entry.leaf_shape)
            if num_bytes + own_bytes > _GROUP_BYTES:
                self._groups.append([])
                num_bytes = 0
            num_bytes += own_bytes
            self._group_of[entry.path] = len(self._groups) - 1, len(self._groups[-1])
            self._groups[-1].append("/".join(entry.path[1:]))

    def read(self, entry: Entry) -> np.ndarray:
        """The whole leaf."""
        group, place = self._group_of[entry.path]
        if self._made[0] != group:
            # the one before is released first
            self._made = (-1, ())
            self._made = (group, self._initialize(self._groups[group]))
        return self._made[1][place]


def _choose_dtypes(entries: tuple[Entry, ...], found: Mapping[str, _FoundTensor]) -> dict[tuple[str, ...], np.dtype]:
    """The dtype of each leaf: its tensors', or float32 where they begin at random."""
    dtypes: dict[tuple[str, ...], np.dtype] = {}
    mixed: list[str] = []
    for entry in entries:
        kinds: set[np.dtype] = set()
        for name in entry.names:
            if name in found:
                kinds.add(found[name].tensor.dtype)
        # the layers of a stack become one array, which has one dtype
        if len(kinds) > 1:
            mixed.append(entry.names[0])
        dtypes[entry.path] = next(iter(kinds), np.dtype(np.float32))
    if mixed:
        raise CheckpointError(f"the models have layers of several dtypes:{describe_list('of them', mixed)}")
    return dtypes


def _source_model(name: str) -> str | None:
    """Which of the models has a tensor of the Thinker; None for one that always begins at random."""
    for pattern, source in SOURCES.items():
        if re.fullmatch(pattern, name):
            return source.model
    return None


def _find_tensor(name: str, headers: Mapping[str, Mapping[str, StoredTensor]]) -> _FoundTensor | None:
    """Where the files have a tensor of the Thinker; None if they do not."""
    for pattern, source in SOURCES.items():
        match = re.fullmatch(pattern, name)
        if match is None:
            continue
        header = headers.get(source.model, {})
        for other in source.names:
            tensor = header.get(match.expand(other))
            if tensor is not None:
                fused = _FUSED.match(name)
                return _FoundTensor(tensor, "qkv".index(fused[1]) if fused else None)
        return None  # later patterns do not count, even where they match too
    return None
