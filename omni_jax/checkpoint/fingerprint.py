"""What tells one model from another, or the codes of one speech tokenizer from another's: a digest of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store
from omni_jax.plain_files import has_file
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER, SPEECH_TOKENIZER_FILE, SpeechTokenizerConfig

_LENGTH = 16  # hexadecimal digits: two of a million models are alike with a chance of one in ten million
# what codes follow from; what is trained behind the quantizer does not change them
_CODE_PARTS = ("conv1/", "conv2/", "front/", "project_in/", "quantizer/codebook")


def fingerprint(folder: Path, components: Sequence[str]) -> str:
    """A digest of the names and values of all parameters of some components, in the dtype that they are stored in.

    They are read layer by layer: some seconds for each ten gigabytes.

    Raises:
      CheckpointError: if the checkpoint lacks a component, or is damaged.
    """
    leaves: dict[str, Any] = flatten_dict(store.abstract(folder, components), sep="/")
    return _digest("", leaves, lambda path: _read_layers(folder, path, leaves[path].shape))


def fingerprint_codec(config: SpeechTokenizerConfig, params: Any) -> str:
    """Of a speech tokenizer: a digest of what codes follow from, its sizes and its parameters up to the codebook."""
    leaves = _code_leaves(params)
    return _digest(config.to_json(), leaves, lambda path: [np.asarray(leaves[path])])


def fingerprint_params(text: str, params: Any) -> str:
    """Of a text that describes a network, and of all of its parameters."""
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    return _digest(text, leaves, lambda path: [np.asarray(leaves[path])])


def find_codec(folder: Path | None) -> str | None:
    """``fingerprint_codec`` of the tokenizer of a checkpoint; None if there is none.

    Args:
      folder: the checkpoint, or one that has its small files alone; None: there is none.

    Raises:
      CheckpointError, ConfigError: if the tokenizer or its description is damaged.
    """
    if folder is None or not has_file(folder / SPEECH_TOKENIZER_FILE):
        return None
    if SPEECH_TOKENIZER not in store.components(folder):
        return None
    leaves = _code_leaves(store.abstract(folder, [SPEECH_TOKENIZER])[SPEECH_TOKENIZER])
    return _digest(
        SpeechTokenizerConfig.load(folder).to_json(),
        leaves,
        lambda path: _read_layers(folder, f"{SPEECH_TOKENIZER}/{path}", leaves[path].shape),
    )


def _code_leaves(params: Any) -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return {path: leaf for path, leaf in flat.items() if path.startswith(_CODE_PARTS)}


def _read_layers(folder: Path, path: str, shape: Sequence[int]) -> Iterator[np.ndarray]:
    read = store.open_leaf(folder, tuple(path.split("/")))
    # a stack of layers may be as large as the memory of a host
    layers: Sequence[int | None] = range(shape[0]) if len(shape) > 2 else [None]
    for layer in layers:
        yield read(layer)


def _digest(text: str, leaves: Mapping[str, Any], read: Callable[[str], Any]) -> str:
    """Of a text, and of the path, shape, dtype and values of each array.

    Args:
      text: whatever else counts.
      leaves: arrays, or what they are like, by path.
      read: gives the values of the array at a path, in pieces that follow each other.
    """
    digest = hashlib.sha256(text.encode())
    for path, leaf in sorted(leaves.items()):
        digest.update(f"{path} {leaf.shape} {leaf.dtype}\n".encode())
        for piece in read(path):
            digest.update(np.ascontiguousarray(piece).tobytes())
    return digest.hexdigest()[:_LENGTH]
