"""What Token2Wav can be given: checks that name the request, the value and the limit."""

from __future__ import annotations

import numpy as np

from omni_jax.checkpoint.voices import Voice
from omni_jax.checks import SEED_MAX, check_int
from omni_jax.config import DiTConfig
from omni_jax.errors import InputError
from omni_jax.models.speaker_encoder import shortest_clip


def check_codes(config: DiTConfig, where: str, codes: np.ndarray, num_before: int = 0) -> None:
    """Checks codes of one request, of which ``num_before`` have come already.

    Raises:
      InputError: for what is no list of codes, for a code that does not exist and for too many.
    """
    # the limit counts mel frames, of which each code is ``repeats``
    max_codes = config.max_position_embeddings // config.repeats
    if codes.ndim != 1 or (codes.size and codes.dtype.kind not in "iu"):
        raise InputError(f"{where}: codes must be a list of integers, got {codes.dtype}{list(codes.shape)}")
    # frames of a stream are numbered through, so the limit holds for all of its codes together
    num_codes = num_before + codes.size
    if num_codes > max_codes:
        raise InputError(f"{where}: {num_codes} codes; Token2Wav takes at most {max_codes} at once, split them")
    # num_embeds is a code too: the table has num_embeds + 1 rows (docs/reference.md, 1.7)
    unknown = codes[(codes < 0) | (codes > config.num_embeds)]
    if unknown.size:
        raise InputError(f"{where}: code {unknown[0]} is out of range; Token2Wav knows 0 to {config.num_embeds}")


def check_seed(where: str, seed: int) -> None:
    """Checks a seed of noise.

    Raises:
      InputError: for a seed that is no unsigned number of 32 bits.
    """
    check_int(f"{where}: seed", seed, 0, SEED_MAX)


def check_voice(config: DiTConfig, voice: Voice) -> None:
    """Checks a voice against the model's sizes.

    Raises:
      InputError: for a voice that is not made for this model.
    """
    cond_shape = np.shape(voice.cond)
    clip_shape = np.shape(voice.ref_mel)
    min_frames = shortest_clip(config)
    if cond_shape != (1, config.enc_emb_dim):
        raise InputError(
            f"voice {voice.name}: cond has shape {list(cond_shape)}, the model needs [1, {config.enc_emb_dim}]"
        )
    fits = len(clip_shape) == 3 and clip_shape[0] == 1 and clip_shape[1] >= min_frames
    if not fits or clip_shape[2] != config.mel_dim:
        needed = f"[1, T, {config.mel_dim}] with T at least {min_frames}"
        raise InputError(f"voice {voice.name}: ref_mel has shape {list(clip_shape)}, the model needs {needed}")


def check_noise(config: DiTConfig, where: str, noise: np.ndarray | None, num_codes: int) -> None:
    """Checks the noise that is given for so many codes.

    Raises:
      InputError: for noise of another shape than [codes * repeats, mel_dim].
    """
    needed = (num_codes * config.repeats, config.mel_dim)
    if noise is not None and np.shape(noise) != needed:
        raise InputError(f"{where}: noise has shape {list(np.shape(noise))}; {num_codes} codes need {list(needed)}")


def count_chunk_blocks(config: DiTConfig, name: str, num_codes: int, least: int = 1) -> int:
    """The blocks of the DiT in a chunk of so many codes.

    Raises:
      InputError: if they are no whole number of blocks, or fewer than ``least``.
    """
    block_codes = config.block_size // config.repeats
    if num_codes < least * block_codes or num_codes % block_codes:
        limit = f"a multiple of {block_codes}, the codes of a block"
        if least > 1:
            limit += f", and at least {least * block_codes}"
        raise InputError(f"{name} is {num_codes}; it must be {limit}")
    return num_codes // block_codes


def check_first_look_ahead(num_frames: int | None, chunk_frames: int, needed: int) -> None:
    """Checks how far the vocoder is to look ahead in a first packet.

    Args:
      num_frames: mel frames; None for all that it needs.
      chunk_frames: of the first chunk.
      needed: frames that the vocoder depends on.

    Raises:
      InputError: if they are more than it needs, or would leave nothing of the chunk.
    """
    if num_frames is not None:
        check_int("first_look_ahead", num_frames, 0, min(needed, chunk_frames - 1))
