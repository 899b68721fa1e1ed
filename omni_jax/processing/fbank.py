"""Log-energies of a mel filter bank as Kaldi computes them, which speaker models such as CAM++ read.

Frames of 25 ms every 10 ms that lie within the sound, without dither: mean removed, pre-emphasis, Povey's window, power
spectrum, 80 triangles in the mel of HTK from 20 Hz to 8 kHz, natural logarithm (``compute-fbank-feats`` with
``--num-mel-bins=80 --dither=0``).
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError

RATE = 16_000  # Hz, of the sound
NUM_BINS = 80
HOP = 160  # samples from one frame to the next
_WINDOW = 400  # samples of a frame
_FFT = 512  # the next power of two
_PREEMPHASIS = 0.97
_POVEY = 0.85  # power of a Hann window
_LEAST_HZ = 20.0
_LEAST_ENERGY = float(np.finfo(np.float32).eps)  # whose logarithm is -15.9


def log_fbank(samples: Float[np.ndarray, " n"]) -> Float[np.ndarray, "frames 80"]:
    """The filter bank's log-energies.

    Args:
      samples: mono, at ``RATE``. Kaldi's own are those of 16-bit numbers; the models that this is for take -1 to 1.

    Returns:
      float32, ``1 + (n - 400) // 160`` frames.

    Raises:
      InputError: if the sound is shorter than a frame.
    """
    if len(samples) < _WINDOW:
        raise InputError(f"the sound has {len(samples)} samples at {RATE} Hz; a frame has {_WINDOW}")
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), _WINDOW)[::HOP]  # [frames, _WINDOW]
    frames = frames - frames.mean(axis=1, keepdims=True)
    # the first sample of a frame is its own predecessor
    before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - _PREEMPHASIS * before) * _window()
    spectrum = np.fft.rfft(frames, _FFT)  # [frames, _FFT // 2 + 1]
    energies = (spectrum.real**2 + spectrum.imag**2) @ _filters()  # [frames, bins]
    return np.log(np.maximum(energies, _LEAST_ENERGY)).astype(np.float32)


@functools.cache
def _window() -> Float[np.ndarray, " 400"]:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / (_WINDOW - 1))
    return hann**_POVEY


@functools.cache
def _filters() -> Float[np.ndarray, "257 80"]:
    """Triangles of height 1 that are evenly spaced, and straight, in mel."""
    edges = np.linspace(_to_mel(_LEAST_HZ), _to_mel(RATE / 2), NUM_BINS + 2)
    mels = _to_mel(np.linspace(0, RATE / 2, _FFT // 2 + 1))[:, None]  # [_FFT // 2 + 1, 1]
    # of each triangle [bins]
    left = edges[:-2]
    centre = edges[1:-1]
    right = edges[2:]
    rising = (mels - left) / (centre - left)  # [_FFT // 2 + 1, bins]
    falling = (right - mels) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling))


def _to_mel(hertz: float | np.ndarray) -> np.ndarray:
    return 1127 * np.log1p(np.asarray(hertz) / 700)
