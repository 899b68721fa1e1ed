"""Adds to rows of speech the codes of their sounds: ``codec_ids``, and ``codec``, the fingerprint of the tokenizer.

    python tools/make_codes.py speech.jsonl codes.jsonl --model out/tokenizer

A row has ``audio``; all else that it has is kept. Training with such rows is told the fingerprint once and refuses rows
of another one (docs/data.md). The output must lie where the rows lie, for their sounds are named from there. A command
that was stopped goes on where it was.

With ``--perturb`` the codes are those of the sound in another voice, each row's its own, while the row still names its
sound and its voice: codes of such rows say less of who speaks (docs/speech-training.md).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int
from omni_jax.engine.speech_tokenizer_engine import RATE, SpeechTokenizerEngine
from omni_jax.processing.voice_perturbation import VoicePerturbation
from tools.sound_rows import SoundRowOptions, extend_rows, run_command

_ROWS_PER_CALL = 16  # whose sounds are read and encoded together


@dataclass(frozen=True)
class Options(SoundRowOptions):
    """What to read and write; the model has a speech tokenizer."""

    perturb: bool = False
    """Make the codes of the sound with its pitch and its formants moved; all else of the row stays."""
    seed: int = 0
    """Of what --perturb draws: each row draws by this and its number."""


def make_codes(options: Options) -> int:
    """Writes the rows with codes; returns how many were left out.

    Raises:
      CheckpointError, ConfigError: if there is no tokenizer.
      InputError: if the output is there or lies elsewhere, the seed is negative, or a row cannot be read.
    """
    check_int("seed", options.seed, 0)
    engine = SpeechTokenizerEngine.load(resolve_checkpoint(options.model))

    def perturb(number: int, sound: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        if not options.perturb:
            return sound
        # what is drawn for a row does not depend on the rows before
        return VoicePerturbation().apply(sound, RATE, np.random.default_rng((options.seed, number)))

    def encode(sounds: Sequence[Float[np.ndarray, " n"]]) -> Sequence[Mapping[str, Any]]:
        return [{"codec_ids": codes.tolist(), "codec": engine.fingerprint} for codes in engine.encode(sounds)]

    settings = {"codec": engine.fingerprint, "perturbed_by": options.seed if options.perturb else None}
    return extend_rows(options, settings, perturb, encode, _ROWS_PER_CALL)


def main(options: Options) -> int:
    return run_command(lambda: make_codes(options))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
