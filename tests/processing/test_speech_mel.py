"""The log-mel of Token2Wav against PyTorch's Fourier transform and transformers' filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank

from omni_jax.errors import InputError
from omni_jax.processing.speech_mel import HOP, NUM_BINS, RATE, speech_log_mel

# float64 here and float32 there; bins near the floor have few digits left after the sum under the root
TOLERANCE = 2e-4


def make_sound(num_samples: int) -> np.ndarray:
    """A rising tone in noise, with silence in the middle."""
    rng = np.random.default_rng(num_samples)
    seconds = np.arange(num_samples) / RATE
    sound = 0.3 * np.sin(2 * np.pi * (200 + 2000 * seconds) * seconds) + 0.01 * rng.standard_normal(num_samples)
    sound[num_samples // 3 : num_samples // 2] = 0
    return sound.astype(np.float32)


def log_mel_of_pytorch(samples: np.ndarray) -> np.ndarray:
    filters = mel_filter_bank(1 + 1024 // 2, NUM_BINS, 0.0, 8000.0, RATE, norm="slaney", mel_scale="slaney")
    padded = torch.nn.functional.pad(torch.from_numpy(samples)[None, None], (432, 432), mode="reflect")[0]
    spectrum = torch.stft(
        padded, 1024, HOP, 640, torch.hann_window(640), center=False, onesided=True, return_complex=True
    )[0]
    magnitude = torch.sqrt(spectrum.abs() ** 2 + 1e-9)  # [bins of the transform, frames]
    mel = torch.from_numpy(filters.T).float() @ magnitude
    return torch.log(torch.clamp(mel, min=1e-5)).T.numpy()


@pytest.mark.parametrize("num_samples", [433, 16_000, 16_159, 200_000])
def test_it_is_that_of_pytorch(num_samples: int) -> None:
    sound = make_sound(num_samples)
    ours = speech_log_mel(sound)
    assert ours.shape == (num_samples // HOP, NUM_BINS) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, log_mel_of_pytorch(sound), rtol=0, atol=TOLERANCE)


def test_silence_has_a_floor() -> None:
    """Of the root, which is above that of the bins in all but the narrowest."""
    assert speech_log_mel(np.zeros(RATE)).min() >= np.log(1e-5) - 1e-6


def test_what_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="the sound has 432 samples at 16000 Hz; it must have over 432"):
        speech_log_mel(np.zeros(432))
