"""From a PyTorch folder to a folder of ours; ``export`` is the way back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from omni_jax.checkpoint import store, voices
from omni_jax.checkpoint.name_map import Entry, make_name_table, optional_constants
from omni_jax.checkpoint.pytorch import check, read_headers
from omni_jax.checkpoint.pytorch import pieces as read
from omni_jax.checkpoint.tensor_file import NewTensor, StoredTensor, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

# what a conversion copies beside the parameters, either way; the first two must be there
REQUIRED_FILES = ("config.json", "tokenizer.json")
OTHER_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "LICENSE",
    "README.md",
)
# tensors of the source that are no parameters (name_map.optional_constants); without them PyTorch misses something
CONSTANTS_FILE = "constants.safetensors"

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      components: what was converted.
      tensors: how many published tensors the parameters are.
      nbytes: bytes of the parameters, before compression.
      largest: bytes of the largest leaf.
    """

    components: tuple[str, ...]
    tensors: int
    nbytes: int
    largest: int


def to_jax(
    source: Path,
    target: Path,
    *,
    components: Sequence[str] | None = None,
    dtype: DTypeLike | None = None,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Converts a Hugging Face folder. Everything is checked before the first number is read.

    Args:
      source: the folder, with config.json and tokenizer.json.
      target: a path where nothing is yet.
      components: which of thinker, talker and token2wav; without it, all that the files hold.
      dtype: what the Thinker and the Talker are cast to; Token2Wav, which needs float32, keeps the file's.
      progress: called after each tensor.

    Raises:
      CheckpointError: if a file or a tensor is missing, unexpected or of another shape, ``target`` exists, or Talker
        or Token2Wav are converted and the voices are missing or wrong.
      ConfigError: if config.json is not the model's.
    """
    store.refuse_existing(target)
    files = side_files(source)
    config = OmniConfig.load(source)
    tensors = read_headers(source)
    here = check(source, tensors, config, components)
    speakers = _speakers(source, config) if {"talker", "token2wav"} & set(here) else {}
    entries = make_name_table(config, here)
    count, done = sum(len(e.names) for e in entries), 0

    def pieces(entry: Entry) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in read(entry, tensors):
            done += 1
            progress(done, count)
            yield piece

    leaves = [_leaf(entry, tensors, dtype, pieces) for entry in entries]

    def beside(folder: Path) -> None:
        for file in [*files, *([source / voices.PUBLISHED_FILE] if speakers else [])]:
            shutil.copyfile(file, folder / file.name)
        if speakers:
            voices.save_voices(folder, speakers)
        kept = [n for n in optional_constants(config) if n in tensors and n.split(".")[0] in here]
        write_file(folder / CONSTANTS_FILE, [NewTensor.of(n, tensors[n]) for n in kept])

    store.save(target, leaves, beside)
    sizes = [leaf.nbytes for leaf in leaves]
    return Conversion(here, count, sum(sizes), max(sizes))


def side_files(source: Path) -> list[Path]:
    """The files that go along with the parameters, out of the folder of either side.

    Raises:
      CheckpointError: if one that must be there is not.
    """
    if missing := [name for name in REQUIRED_FILES if not (source / name).is_file()]:
        raise CheckpointError(f"{source} has no {' and no '.join(missing)}; fetch all files of the model into it")
    return [source / name for name in REQUIRED_FILES + OTHER_FILES if (source / name).is_file()]


def _speakers(source: Path, config: OmniConfig) -> dict[str, voices.Voice]:
    path = source / voices.PUBLISHED_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{source} has no {path.name}, the voices that the Talker and Token2Wav speak in; fetch it from the "
            "published model, or convert with --components thinker for text alone"
        )
    speakers = voices.read_spk_dict(path)
    voices.check(speakers, config, path)
    return speakers


def _leaf(
    entry: Entry,
    tensors: dict[str, StoredTensor],
    dtype: DTypeLike | None,
    pieces: Callable[[Entry], Iterator[np.ndarray]],
) -> store.Leaf:
    keeps = entry.component == "token2wav" or dtype is None
    kind = tensors[entry.names[0]].dtype if keeps else np.dtype(dtype)
    return store.Leaf(entry.path, entry.leaf_shape, kind, entry.stacked, lambda: pieces(entry))
