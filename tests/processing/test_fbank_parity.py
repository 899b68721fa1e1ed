"""Kaldi's filter bank against that of transformers, which follows Kaldi and is tested against it there."""

from __future__ import annotations

import numpy as np
import pytest
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from omni_jax.errors import InputError
from omni_jax.processing.fbank import HOP, NUM_BINS, RATE, log_fbank
from tests.processing.test_speech_mel import make_sound

# both in float64; the result is rounded to float32
TOLERANCE = 1e-5


def kaldi_of_transformers(samples: np.ndarray) -> np.ndarray:
    filters = mel_filter_bank(
        257, NUM_BINS, 20, RATE // 2, RATE, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    return spectrogram(
        samples,
        window_function(400, "povey", periodic=False),
        400,
        HOP,
        512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        mel_filters=filters,
        log_mel="log",
        mel_floor=1.192092955078125e-07,
        remove_dc_offset=True,
        dtype=np.dtype(np.float64),
    ).T


@pytest.mark.parametrize("num_samples", [400, 559, 560, 16_000, 50_001])
def test_it_is_that_of_kaldi(num_samples: int) -> None:
    sound = make_sound(num_samples)
    ours = log_fbank(sound)
    assert ours.shape == (1 + (num_samples - 400) // HOP, NUM_BINS) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, kaldi_of_transformers(sound.astype(np.float64)), rtol=0, atol=TOLERANCE)


def test_what_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="the sound has 399 samples at 16000 Hz; a frame has 400"):
        log_fbank(np.zeros(399))
