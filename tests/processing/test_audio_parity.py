"""Log-mel frames against ``WhisperFeatureExtractor``, which pads to five minutes."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings, log_mel
from tests.processing.conftest import MEDIA

# the reference computes spectra in float32: quiet bins beside a loud one carry its rounding (5e-5 seen)
TOLERANCE = 1e-4

SETTINGS = [
    MelSettings(),
    MelSettings(feature_size=80, chunk_length=30),
    MelSettings(feature_size=40, chunk_length=60, n_fft=512),
    MelSettings(chunk_length=20, hop_length=200, n_fft=480),
]


def reference(samples, settings):
    names = ("feature_size", "sampling_rate", "hop_length", "chunk_length", "n_fft")
    extractor = WhisperFeatureExtractor(**{name: getattr(settings, name) for name in names})
    out = extractor(
        samples,
        sampling_rate=settings.sampling_rate,
        padding="max_length",
        return_attention_mask=True,
        return_tensors="np",
    )
    return out["input_features"][0].T[out["attention_mask"][0] == 1]


def clips(rate, seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(rate * 3 + int(rng.integers(rate))).astype(np.float32) * 0.1
    click = np.zeros(rate, np.float32)
    click[-5:] = 1.0
    tone = np.sin(np.arange(rate) * 0.3).astype(np.float32)
    return {
        "noise": noise,
        "short": noise[:400],
        "odd": noise[:401],
        "quiet": noise * 1e-4,
        "click": click,
        "tone": tone,
    }


# the reference pads every clip to five minutes in the published setting, so that one seed of it takes seconds
@pytest.mark.parametrize(("settings", "seed"), [*zip(SETTINGS, (0, 1, 2, 3), strict=True), (SETTINGS[3], 4)])
def test_random_clips(settings, seed):
    for name, samples in clips(settings.sampling_rate, seed).items():
        ours, theirs = log_mel(samples, settings), reference(samples, settings)
        assert ours.shape == theirs.shape, name
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("name", ["speech.wav", "speech2.mp3", "video.mp4"])
def test_real_sound(name):
    samples = media.read_audio(MEDIA / name, MelSettings())
    np.testing.assert_allclose(
        log_mel(samples, MelSettings()), reference(samples, MelSettings()), atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("short", [0, 1, 159, 200, 400])
def test_near_the_end_of_what_the_reference_pads_to(short):
    settings = MelSettings(chunk_length=4)
    samples = np.random.default_rng(3).standard_normal(4 * 16000 - short).astype(np.float32)
    np.testing.assert_allclose(log_mel(samples, settings), reference(samples, settings), atol=TOLERANCE, rtol=0)
