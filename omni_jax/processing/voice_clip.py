"""A recording of a voice that is to be spoken in: its samples, and the mel that Token2Wav takes of it.

Recordings are louder and softer. The clips of the 25 Hz codec of the same family (``qwen-tts``) are scaled so that the
largest sample lies 6 dB under full scale, both for the mel and for the speaker vector; so they are here.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.media import array_audio, read_audio
from omni_jax.processing.sources import is_located
from omni_jax.processing.speech_mel import RATE, speech_log_mel

MIN_SECONDS = 1.0
MAX_SECONDS = 30.0
PEAK = 10 ** (-6 / 20)  # the largest sample of a clip
_SILENCE = 1e-3  # the largest sample of a sound that holds nothing, -60 dB


@dataclass(frozen=True, eq=False)
class VoiceClip:
    """A recording of one voice.

    Attributes:
      samples: float32, mono, at ``speech_mel.RATE``; the largest is ``PEAK``.
      mel: of them, natural-log mel, 100 frames a second (``speech_mel.speech_log_mel``).
      loudest: the largest sample of the recording itself.
    """

    samples: Float[np.ndarray, " n"]
    mel: Float[np.ndarray, "frames 80"]
    loudest: float

    @property
    def seconds(self) -> float:
        return len(self.samples) / RATE

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of the recording: two clips with one digest sound the same."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.samples).tobytes(), digest_size=16)
        digest.update(np.float64(self.loudest).tobytes())
        return digest.digest()

    @property
    def recording(self) -> Float[np.ndarray, " n"]:
        """The samples as loud as they were recorded."""
        return self.samples * np.float32(self.loudest / PEAK)


def read_clip(source: Any, rate: int | None = None) -> VoiceClip:
    """Reads a recording of a voice.

    Args:
      source: what ``sources.locate_source`` takes; or an array of samples, see ``media.array_audio``.
      rate: samples a second of an array; a file knows its own.

    Raises:
      InputError: if there is no sound, it cannot be read, it is silent, or it lasts less than ``MIN_SECONDS`` or more
        than ``MAX_SECONDS``.
    """
    settings = MelSettings(sampling_rate=RATE, max_seconds=MAX_SECONDS)
    if is_located(source):
        if rate is not None:
            raise InputError("a sampling rate is for an array of samples; a file knows its own")
        samples = read_audio(source, settings)
    elif isinstance(source, np.ndarray):
        if rate is None:
            raise InputError("an array of samples needs its sampling rate")
        samples = array_audio(source, rate, settings)
    else:
        raise InputError(f"a sound must be a path, a URL, bytes or an array, got {type(source).__name__}")
    return make_clip(samples)


def make_clip(samples: Float[np.ndarray, " n"]) -> VoiceClip:
    """The same of float32 samples at ``speech_mel.RATE``; raises what ``read_clip`` does of them."""
    seconds = len(samples) / RATE
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise InputError(f"the clip lasts {seconds:.2f} s; a clip of a voice has {MIN_SECONDS:g} to {MAX_SECONDS:g} s")
    scaled, loudest = scale_clip(samples)
    return VoiceClip(scaled, speech_log_mel(scaled), loudest)


def scale_clip(samples: Float[np.ndarray, " n"]) -> tuple[Float[np.ndarray, " n"], float]:
    """A clip as Token2Wav is given it, in training and in use: its largest sample is ``PEAK``.

    Returns:
      the samples, float32; and how large the largest was.

    Raises:
      InputError: if it is silent.
    """
    loudest = float(np.abs(samples).max(initial=0))
    if loudest < _SILENCE:
        raise InputError(f"the clip is silent: its largest sample is {loudest:.1e}")
    return (samples * (PEAK / loudest)).astype(np.float32), loudest
