"""What embeddings of codes begin with where a model learns to speak from nothing: the codebook of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from omni_jax.checkpoint import store
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER


def read_codebook(folder: Path) -> Float[np.ndarray, "codes Q"] | None:
    """The codebook of a checkpoint's speech tokenizer, with a mean of 0 and a deviation of 1 in each channel.

    Args:
      folder: the checkpoint.

    Returns:
      it; None if the checkpoint has no speech tokenizer.
    """
    if SPEECH_TOKENIZER not in store.components(folder):
        return None
    codebook = store.open_leaf(folder, (SPEECH_TOKENIZER, "quantizer", "codebook"))(None)  # [codes, Q]
    return (codebook - codebook.mean(axis=0)) / np.maximum(codebook.std(axis=0), 1e-6)  # [codes, Q]


def write_code_vectors(
    table: Float[np.ndarray, "rows width"], codebook: Float[np.ndarray, "codes Q"], seed: int = 0
) -> None:
    """Gives codes the vectors that a random linear map makes of the codebook, with a deviation of about 1.

    The map keeps, roughly, which codes are near each other.

    Args:
      table: its row of each code is written; those behind the codes stay.
      codebook: see ``read_codebook``.
      seed: of the map.
    """
    channels = codebook.shape[1]
    mapping = np.random.default_rng(seed).standard_normal((channels, table.shape[1])) / np.sqrt(channels)  # [Q, width]
    count = min(len(codebook), len(table))
    table[:count] = codebook[:count] @ mapping
