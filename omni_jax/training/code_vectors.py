"""What embeddings of codes begin with where a model learns to speak from nothing: the codebook of its tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from omni_jax.checkpoint import store
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER


def read_code_vectors(folder: Path, width: int, seed: int = 0) -> Float[np.ndarray, "codes width"] | None:
    """The codebook of a checkpoint's speech tokenizer through a random linear map.

    The map keeps, roughly, which codes are near each other. Each element has a deviation of about 1.

    Args:
      folder: the checkpoint.
      width: of the vectors.
      seed: of the map.

    Returns:
      a vector for each code; None if the checkpoint has no speech tokenizer.
    """
    if SPEECH_TOKENIZER not in store.components(folder):
        return None
    codebook = store.open_leaf(folder, (SPEECH_TOKENIZER, "quantizer", "codebook"))(None)  # [codes, Q]
    # a deviation of 1 in each channel
    codebook = (codebook - codebook.mean(axis=0)) / np.maximum(codebook.std(axis=0), 1e-6)  # [codes, Q]
    channels = codebook.shape[1]
    mapping = np.random.default_rng(seed).standard_normal((channels, width)) / np.sqrt(channels)  # [Q, width]
    return (codebook @ mapping).astype(np.float32)
