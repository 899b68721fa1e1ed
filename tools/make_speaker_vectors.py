"""Adds to rows of speech the vectors of their speakers, ``speaker``: what the DiT is given of a voice in training.

    python tools/make_speaker_vectors.py codes.jsonl spoken.jsonl --model runs/verifier

A row has ``audio``, half a second of it at least; all else that it has is kept. Clips of voices must go through the
same network when the model speaks (docs/speech-training.md). The output must lie where the rows lie, for their sounds
are named from there. A command that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.engine.speaker_engine import SpeakerEngine
from tools.sound_rows import SoundRowOptions, extend_rows, run_command


def make_speaker_vectors(options: SoundRowOptions) -> int:
    """Writes the rows with vectors; returns how many were left out.

    Raises:
      CheckpointError, ConfigError: if there is no speaker verifier.
      InputError: if the output is there or lies elsewhere, or a row cannot be read or gives no vector.
    """
    engine = SpeakerEngine.load(resolve_checkpoint(options.model))

    def embed(number: int, sound: Float[np.ndarray, " n"]) -> Float[np.ndarray, " width"]:
        return engine(sound)

    def to_values(vectors: Sequence[Float[np.ndarray, " width"]]) -> Sequence[Mapping[str, Any]]:
        return [{"speaker": vector.tolist()} for vector in vectors]

    return extend_rows(options, {"speaker_verifier": engine.fingerprint}, embed, to_values)


def main(options: SoundRowOptions) -> int:
    return run_command(lambda: make_speaker_vectors(options))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(SoundRowOptions, description=__doc__)))
