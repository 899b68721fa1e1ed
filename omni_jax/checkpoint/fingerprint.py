"""What tells one model from another: a digest of its parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store

_LENGTH = 16  # hexadecimal digits: two of a million models are alike with a chance of one in ten million


def fingerprint(folder: Path, components: Sequence[str]) -> str:
    """A digest of the names and values of all parameters of some components, in the dtype that they are stored in.

    They are read layer by layer: some seconds for each ten gigabytes.

    Raises:
      CheckpointError: if the checkpoint lacks a component, or is damaged.
    """
    digest = hashlib.sha256()
    leaves: dict[tuple[str, ...], Any] = flatten_dict(store.abstract(folder, components))
    for path, leaf in sorted(leaves.items()):
        digest.update(f"{'/'.join(path)} {leaf.shape} {leaf.dtype}\n".encode())
        read = store.open_leaf(folder, path)
        # a stack of layers may be as large as the memory of a host
        layers: Sequence[int | None] = range(leaf.shape[0]) if leaf.ndim > 2 else [None]
        for layer in layers:
            digest.update(read(layer).tobytes())
    return digest.hexdigest()[:_LENGTH]
