"""Speaker vectors by a network that this repository has trained (``training.objectives.speaker_verifier``).

A sound is read in segments as long as those of the training. Its vector is the direction of the sum of theirs, so every
call has one shape.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from omni_jax.checkpoint import store
from omni_jax.checkpoint.fingerprint import fingerprint_params
from omni_jax.errors import CheckpointError
from omni_jax.models.speaker_verifier import SpeakerVerifier, abstract_params
from omni_jax.processing.speaker_mel import cut_segments, speaker_log_mel
from omni_jax.processing.speaker_vectors import normalize_vector
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER, SpeakerVerifierConfig

_SEGMENTS_PER_CALL = 8


class SpeakerEngine:
    """A network of speaker vectors and its parameters: a ``processing.speaker_vectors.SpeakerModel``.

    Attributes:
      width: numbers of a vector.
      fingerprint: of what vectors follow from, like ``"1f0c5d2e9a7b3c48"``.
    """

    def __init__(self, config: SpeakerVerifierConfig, params: Any) -> None:
        """Compiles nothing yet."""
        self.width = config.width
        self.fingerprint = fingerprint_params(config.to_json(), params)
        self._config = config
        self._model = SpeakerVerifier(config)
        self._params = params

    @classmethod
    def load(cls, folder: Path, width: int | None = None) -> SpeakerEngine:
        """Of a checkpoint, on the first device.

        Args:
          folder: the checkpoint.
          width: numbers that a vector must have (``enc_emb_dim`` of Token2Wav); None: any.

        Raises:
          CheckpointError: if it has no such network, or another than its ``speaker_verifier.json`` says.
          ConfigError: if that file describes none.
        """
        config = SpeakerVerifierConfig.load(folder)
        if width is not None and config.width != width:
            raise CheckpointError(f"{folder} makes speaker vectors of {config.width} numbers; Token2Wav takes {width}")
        expected = nn.unbox(abstract_params(SpeakerVerifier(config)))
        return cls(config, store.load_unpublished(folder, SPEAKER_VERIFIER, expected))

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " width"]:
        """The vector of a sound, float32 of length 1.

        Args:
          samples: mono, at ``speech_mel.RATE``.

        Raises:
          InputError: if the sound is silent or shorter than half a second.
          CheckpointError: if the network gives no vector.
        """
        segments = cut_segments(speaker_log_mel(samples), self._config.segment)
        total = np.zeros(self.width)
        for begin in range(0, len(segments), _SEGMENTS_PER_CALL):
            part = segments[begin : begin + _SEGMENTS_PER_CALL]
            mel = np.zeros((_SEGMENTS_PER_CALL, self._config.segment, self._config.mel_dim), np.float32)
            # a segment of padding is as long as others, so that its numbers are finite
            length = np.full(_SEGMENTS_PER_CALL, self._config.segment, np.int32)
            for number, segment in enumerate(part):
                mel[number, : len(segment)] = segment
                length[number] = len(segment)
            vectors = np.asarray(_embed(self._model, self._params, mel, length))  # [8, width]
            total += vectors[: len(part)].sum(axis=0)
        return normalize_vector(total, self.width, "the network of speaker vectors")


@functools.partial(jax.jit, static_argnums=0)
def _embed(
    model: SpeakerVerifier, params: Any, mel: Float[jax.Array, "B T M"], length: Int[jax.Array, " B"]
) -> Float[jax.Array, "B width"]:
    return jnp.asarray(model.apply({"params": params}, mel, length))  # [B, width]
