"""Sound to log-mel frames, as the Whisper feature extractor of the reference makes them (spec 2.3).

The reference pads every clip to five minutes first. Two hops of silence after the clip give the same frames, so that is
all the padding there is here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import soxr

from omni_jax.errors import InputError
from omni_jax.processing.layout import AudioInput, audio_tokens

_SLAB = 4096  # frames whose spectra are in memory at a time


@dataclass(frozen=True)
class MelSettings:
    """How sound becomes frames; the numbers are those of the published ``preprocessor_config.json``."""

    feature_size: int = 128  # mel bins
    sampling_rate: int = 16_000
    n_fft: int = 400
    hop_length: int = 160
    chunk_length: int = 300  # seconds that the reference pads to, and cuts at
    max_seconds: float = 300.0  # longest sound that is taken


def log_mel(samples: np.ndarray, settings: MelSettings) -> np.ndarray:
    """The log-mel spectrogram of a clip.

    The floor lies eight decades under the loudest bin of the whole clip, so a prefix of a clip has other features than
    the clip.

    Args:
      samples: float [n], mono, at ``settings.sampling_rate``.
      settings: sizes of the frames.

    Returns:
      float32 [ceil(n / hop), mel bins].
    """
    hop = settings.hop_length
    frames = -(-len(samples) // hop)
    # frames that begin after the clip still reach into it and count for the maximum; at the end of the reference's
    # five minutes there is no room for them, and the clip is reflected instead
    room = max(settings.chunk_length * settings.sampling_rate // hop, frames)
    computed = min(frames + math.ceil(settings.n_fft / 2 / hop), room)
    padded = np.zeros(computed * hop, np.float64)
    padded[: len(samples)] = samples
    mel = _mel_power(np.pad(padded, settings.n_fft // 2, mode="reflect"), computed, settings)
    logs = np.log10(np.maximum(mel, 1e-10))
    logs = np.maximum(logs, logs.max(initial=-10.0) - 8.0)
    return ((logs[:frames] + 4.0) / 4.0).astype(np.float32)


def _mel_power(padded: np.ndarray, frames: int, settings: MelSettings) -> np.ndarray:
    """Power in each mel bin. [frames, mel bins]"""
    n_fft, hop = settings.n_fft, settings.hop_length
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    filters = mel_filters(settings.feature_size, n_fft, settings.sampling_rate)
    views = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop][:frames]
    out = np.empty((frames, settings.feature_size))
    for begin in range(0, frames, _SLAB):
        spectrum = np.fft.rfft(views[begin : begin + _SLAB] * window)
        out[begin : begin + _SLAB] = (spectrum.real**2 + spectrum.imag**2) @ filters
    return out


@lru_cache(maxsize=4)
def mel_filters(bins: int, n_fft: int, sampling_rate: int) -> np.ndarray:
    """Triangular filters from 0 Hz to half the sampling rate, evenly spaced in Slaney's mel and of equal area.

    Slaney's mel is linear up to 1 kHz (15 mel) and logarithmic above, 27 mel to a factor of 6.4.

    Returns:
      float64 [n_fft // 2 + 1, bins].
    """
    step = math.log(6.4) / 27
    top = 15 + math.log(sampling_rate / 2 / 1000) / step
    mels = np.linspace(0, top, bins + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    frequencies = np.linspace(0, sampling_rate / 2, n_fft // 2 + 1)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (right - left)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Resamples mono float [n] to ``ceil(n * target / rate)`` samples, as ``librosa.load`` does (soxr_hq)."""
    if rate == target:
        return samples.astype(np.float32)
    length = -(-len(samples) * target // rate)
    out = soxr.resample(samples.astype(np.float32), rate, target, quality="HQ")[:length]
    return np.pad(out, (0, length - len(out)))


def audio_input(samples: np.ndarray, settings: MelSettings) -> AudioInput:
    """A clip as the model takes it.

    Args:
      samples: float32 [n], mono, at ``settings.sampling_rate``.
      settings: gives the longest clip that is taken.

    Raises:
      InputError: if the clip is too short for a single token, or too long.
    """
    seconds = len(samples) / settings.sampling_rate
    if seconds > settings.max_seconds:
        raise too_long(seconds, settings)
    if audio_tokens(-(-len(samples) // settings.hop_length)) < 1:
        raise InputError(f"the sound lasts {seconds:.4f} s; the model hears nothing under 0.025 s")
    return AudioInput(log_mel(samples, settings))


def too_long(seconds: float, settings: MelSettings) -> InputError:
    """The error for a clip over the limit; it is never cut without being asked to."""
    return InputError(
        f"the sound lasts {seconds:.2f} s, over the limit of {settings.max_seconds:g} s; cut it into pieces, or name a "
        "range (audio_start and audio_end, or video_start and video_end)"
    )
