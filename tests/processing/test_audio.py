import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings, audio_input, log_mel, mel_filters, resample
from omni_jax.processing.layout import AudioInput, audio_tokens

MEL = MelSettings()


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        (1, 0),
        (2, 0),
        (3, 1),
        (50, 12),
        (100, 25),
        (200, 50),
        (201, 50),
        (203, 51),
        (500, 125),
        (3000, 750),
        (30000, 7500),
    ],
)
def test_token_counts(frames, tokens):
    assert audio_tokens(frames) == tokens
    assert AudioInput(np.zeros((frames, 1))).tokens == tokens


def test_silence_lies_at_the_floor():
    np.testing.assert_array_equal(log_mel(np.zeros(16000), MEL), np.full((100, 128), -1.5, np.float32))


def test_a_clip_of_five_minutes_has_no_room_for_padding():
    samples = np.random.default_rng(0).standard_normal(300 * 16000).astype(np.float32)
    assert log_mel(samples, MEL).shape == (30000, 128)


def test_filters_have_equal_area():
    width = 8000 / 200
    np.testing.assert_allclose(mel_filters(20, 400, 16000).sum(0) * width, 1, atol=0.03)


def test_what_is_too_short_or_too_long_is_refused():
    with pytest.raises(InputError, match=r"lasts 0\.0199 s; the model hears nothing under 0\.025 s"):
        audio_input(np.zeros(319, np.float32), MEL)
    with pytest.raises(InputError, match=r"lasts 300\.00 s, over the limit of 300 s"):
        audio_input(np.zeros(300 * 16000 + 1, np.float32), MEL)
    with pytest.raises(InputError, match=r"lasts 2\.00 s, over the limit of 1\.5 s"):
        audio_input(np.zeros(32000, np.float32), MelSettings(max_seconds=1.5))
    longer = audio_input(np.zeros(301 * 16000, np.float32), MelSettings(max_seconds=400))
    assert longer.seconds == 301 and longer.mel.shape == (30100, 128)


def test_resampling_keeps_the_length_and_the_pitch():
    tone = np.sin(2 * np.pi * 440 * np.arange(22050) / 22050)
    out = resample(tone, 22050, 16000)
    assert out.dtype == np.float32 and len(out) == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(out[1000:-1000], expected[1000:-1000], atol=1e-3)
