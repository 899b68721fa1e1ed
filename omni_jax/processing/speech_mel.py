"""Sound to the log-mel of Token2Wav: what its flow makes of codes, what its vocoder reads, and what a voice's clip is.

It is another spectrogram than that of the audio encoder (``processing.audio``): 80 bins, magnitudes, natural logarithm.
No file of a checkpoint describes it; the numbers are those of the 25 Hz codec of the same family (``qwen-tts``).
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.processing.audio import mel_filters

RATE = 16_000  # Hz, of the sound
HOP = 160  # samples from one frame to the next: 100 frames a second
NUM_BINS = 80  # evenly spaced in Slaney's mel, from 0 to 8 kHz
_FFT = 1024  # samples
_WINDOW = 640  # samples of a frame that the window does not cut off
_EDGE = (_FFT - HOP) // 2  # samples that are mirrored at either end, so that each hop has a frame
_LEAST_POWER = 1e-9  # added under the root
_LEAST_MAGNITUDE = 1e-5  # of a bin; its logarithm is -11.5
_FRAMES_PER_FFT = 1024  # whose spectra are taken at a time

# of the bins of speech, roughly, in nats: what networks that make a log-mel begin near
LOG_MEAN = -6.0
LOG_DEVIATION = 2.7
LOG_FLOOR = math.log(_LEAST_MAGNITUDE)  # the least value that a bin can have
FRAME_RATE = RATE // HOP  # Hz


def speech_log_mel(samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, "frames 80"]:
    """The natural logarithm of the magnitude in each mel bin.

    Args:
      samples: mono, from -1 to 1, at ``RATE``.

    Returns:
      float32, a frame for each whole hop of the sound.

    Raises:
      InputError: if the sound is so short that its ends cannot be mirrored.
    """
    if len(samples) <= _EDGE:
        raise InputError(f"the sound has {len(samples)} samples at {RATE} Hz; it must have over {_EDGE}")
    padded = np.pad(samples.astype(np.float64), _EDGE, mode="reflect")
    views = np.lib.stride_tricks.sliding_window_view(padded, _FFT)[::HOP]  # [frames, _FFT], without copies
    out = np.empty((len(views), NUM_BINS), np.float32)
    filters = mel_filters(NUM_BINS, _FFT, RATE)
    for begin in range(0, len(views), _FRAMES_PER_FFT):
        part = slice(begin, begin + _FRAMES_PER_FFT)
        spectrum = np.fft.rfft(views[part] * _window())  # [frames, _FFT // 2 + 1]
        magnitude = np.sqrt(spectrum.real**2 + spectrum.imag**2 + _LEAST_POWER)
        out[part] = np.log(np.maximum(magnitude @ filters, _LEAST_MAGNITUDE))
    return out


@functools.cache
def log_ceiling() -> float:
    """What no bin exceeds, for sound from -1 to 1: all of the window in the bin with the largest weights."""
    largest = mel_filters(NUM_BINS, _FFT, RATE).sum(axis=0).max()
    return math.log(_window().sum() * largest)


@functools.cache
def _window() -> Float[np.ndarray, " 1024"]:
    """A periodic Hann window in the middle of the samples that a frame sees."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    return np.pad(hann, (_FFT - _WINDOW) // 2)
