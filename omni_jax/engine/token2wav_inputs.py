"""What Token2Wav can be given: checks that name the request, the value and the limit."""

from __future__ import annotations

import numpy as np

from omni_jax.checkpoint.voices import Voice
from omni_jax.config import DiTConfig
from omni_jax.errors import InputError
from omni_jax.models.speaker_encoder import shortest_clip


def check_codes(config: DiTConfig, where: str, codes: np.ndarray, before: int = 0) -> None:
    """Codes of one request; ``before`` of them have come already.

    Raises:
      InputError: for what is no list of codes, for a code that does not exist and for too many.
    """
    longest = config.max_position_embeddings // config.repeats
    if codes.ndim != 1 or (codes.size and codes.dtype.kind not in "iu"):
        raise InputError(f"{where}: codes must be a list of integers, got {codes.dtype}{list(codes.shape)}")
    if before + codes.size > longest:
        raise InputError(f"{where}: {before + codes.size} codes; Token2Wav takes at most {longest} at once, split them")
    wrong = codes[(codes < 0) | (codes > config.num_embeds)]
    if wrong.size:
        raise InputError(f"{where}: code {wrong[0]} is out of range; Token2Wav knows 0 to {config.num_embeds}")


def check_seed(where: str, seed: int) -> None:
    """Raises:
    InputError: for a seed that is no unsigned number of 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"{where}: seed is {seed}; it must be at least 0 and below 2**32")


def check_voice(config: DiTConfig, voice: Voice) -> None:
    """Raises:
    InputError: for a voice that is not made for this model.
    """
    cond, clip = np.shape(voice.cond), np.shape(voice.ref_mel)
    shortest = shortest_clip(config)
    if cond != (1, config.enc_emb_dim):
        raise InputError(f"voice {voice.name}: cond has shape {list(cond)}, the model needs [1, {config.enc_emb_dim}]")
    if len(clip) != 3 or clip[0] != 1 or clip[1] < shortest or clip[2] != config.mel_dim:
        needed = f"[1, T, {config.mel_dim}] with T at least {shortest}"
        raise InputError(f"voice {voice.name}: ref_mel has shape {list(clip)}, the model needs {needed}")
