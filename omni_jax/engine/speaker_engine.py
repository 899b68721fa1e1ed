"""Speaker vectors by a network that this repository has trained (``training.objectives.speaker_verifier``)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Float

from omni_jax.batch import bucket
from omni_jax.checkpoint import store
from omni_jax.checkpoint.name_map import describe_differences
from omni_jax.errors import CheckpointError
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.speaker_verifier import SpeakerVerifier, abstract_params
from omni_jax.processing.speech_mel import speech_log_mel
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER, SpeakerVerifierConfig

_LEAST_FRAMES = 64  # that lengths of clips are rounded up from


class SpeakerEngine:
    """A network of speaker vectors and its parameters: a ``processing.speaker_vectors.SpeakerModel``.

    Attributes:
      width: numbers of a vector.
    """

    def __init__(self, config: SpeakerVerifierConfig, params: Any) -> None:
        """Compiles nothing yet."""
        self.width = config.width
        self._model = SpeakerVerifier(config)
        self._params = params

    @classmethod
    def load(cls, folder: Path, width: int) -> SpeakerEngine:
        """Of a checkpoint, on the first device.

        Args:
          folder: the checkpoint.
          width: numbers that a vector must have (``enc_emb_dim`` of Token2Wav).

        Raises:
          CheckpointError: if it has no such network, or another than its ``speaker_verifier.json`` says.
          ConfigError: if that file describes none.
        """
        config = SpeakerVerifierConfig.load(folder)
        if config.width != width:
            raise CheckpointError(f"{folder} makes speaker vectors of {config.width} numbers; Token2Wav takes {width}")
        params = store.load(folder, [SPEAKER_VERIFIER])[SPEAKER_VERIFIER]
        shapes: dict[str, Any] = flatten_dict(nn.unbox(abstract_params(SpeakerVerifier(config))), sep="/")
        found: dict[str, Any] = flatten_dict(params, sep="/")
        trouble = describe_differences({path: leaf.shape for path, leaf in shapes.items()}, found)
        if trouble:
            raise CheckpointError(f"{folder} does not hold the network that its file describes:{trouble}")
        return cls(config, params)

    def __call__(self, samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, " width"]:
        """The vector of a clip, float32 of length 1; ``samples`` are those of a ``VoiceClip``."""
        mel = speech_log_mel(samples)
        least = max(_LEAST_FRAMES, shortest_clip(self._model.config.encoder))
        padded = np.zeros((1, bucket(len(mel), least), mel.shape[1]), np.float32)
        padded[0, : len(mel)] = mel
        return np.asarray(_embed(self._model, self._params, padded, np.full(1, len(mel), np.int32)))[0]


@functools.partial(jax.jit, static_argnums=0)
def _embed(model: SpeakerVerifier, params: Any, mel: jax.Array, length: jax.Array) -> Any:
    return model.apply({"params": params}, mel, length)
