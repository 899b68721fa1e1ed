"""From a PyTorch folder to a folder of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from omni_jax.checkpoint import store
from omni_jax.checkpoint.pytorch import check, read_headers
from omni_jax.checkpoint.pytorch import pieces as read
from omni_jax.checkpoint.table import Entry, table
from omni_jax.checkpoint.tensor_file import StoredTensor
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

# what a conversion copies beside the parameters; the first two must be there
REQUIRED_FILES = ("config.json", "tokenizer.json")
OTHER_FILES = (
    "preprocessor_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "spk_dict.pt",
    "LICENSE",
)

Progress = Callable[[int, int], None]  # tensors done, tensors in all


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
      components: what was converted.
      tensors: published tensors read.
      nbytes: bytes of parameters written, before compression.
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
      CheckpointError: if a file or a tensor is missing, unexpected or of another shape, or ``target`` exists.
      ConfigError: if config.json is not the model's.
    """
    store.refuse_existing(target)
    if missing := [name for name in REQUIRED_FILES if not (source / name).is_file()]:
        raise CheckpointError(f"{source} has no {' and no '.join(missing)}; fetch all files of the model into it")
    config = OmniConfig.load(source)
    tensors = read_headers(source)
    entries = table(config, check(source, tensors, config, components))
    count, done = sum(len(e.names) for e in entries), 0

    def pieces(entry: Entry) -> Iterator[np.ndarray]:
        nonlocal done
        for piece in read(entry, tensors):
            done += 1
            progress(done, count)
            yield piece

    leaves = [_leaf(entry, tensors, dtype, pieces) for entry in entries]
    files = [source / name for name in REQUIRED_FILES + OTHER_FILES if (source / name).is_file()]
    store.save(target, leaves, files)
    sizes = [leaf.nbytes for leaf in leaves]
    return Conversion(tuple(dict.fromkeys(e.component for e in entries)), count, sum(sizes), max(sizes))


def _leaf(
    entry: Entry,
    tensors: dict[str, StoredTensor],
    dtype: DTypeLike | None,
    pieces: Callable[[Entry], Iterator[np.ndarray]],
) -> store.Leaf:
    keeps = entry.component == "token2wav" or dtype is None
    kind = tensors[entry.names[0]].dtype if keeps else np.dtype(dtype)
    return store.Leaf(entry.path, entry.leaf_shape, kind, entry.stacked, lambda: pieces(entry))
