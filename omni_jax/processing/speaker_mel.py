"""What a speaker verifier reads of a sound, in training and after it: the log-mel of it in stretches of one length."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.processing.speech_mel import speech_log_mel
from omni_jax.processing.voice_clip import scale_clip

MIN_FRAMES = 50  # of a sound: half a second says little of a speaker, and less nothing


def speaker_log_mel(samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, "frames 80"]:
    """The log-mel of a sound that is made as loud as a clip of a voice.

    Args:
      samples: mono, at ``speech_mel.RATE``.

    Raises:
      InputError: if it is silent, or shorter than ``MIN_FRAMES``.
    """
    scaled, _ = scale_clip(samples)
    mel = speech_log_mel(scaled)
    if len(mel) < MIN_FRAMES:
        raise InputError(f"the sound has {len(mel)} mel frames; it must have {MIN_FRAMES} at least")
    return mel


def cut_segments(mel: Float[np.ndarray, "frames 80"], segment: int) -> list[Float[np.ndarray, "length 80"]]:
    """Stretches of ``segment`` frames that cover a sound evenly, overlapping where need be; a shorter sound is one."""
    last = len(mel) - segment
    if last <= 0:
        return [mel]
    count = -(-len(mel) // segment)
    begins = np.linspace(0, last, count).round().astype(int)
    return [mel[begin : begin + segment] for begin in begins]
