"""Clips of voices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.media import read_audio
from omni_jax.processing.speech_mel import RATE, speech_log_mel
from omni_jax.processing.voice_clip import PEAK, read_clip

MEDIA = Path(__file__).parents[1] / "media"


def make_tone(seconds: float, rate: int = RATE, loudness: float = 0.2) -> np.ndarray:
    return (loudness * np.sin(np.arange(int(seconds * rate)) * 0.2)).astype(np.float32)


def test_loudness_does_not_count() -> None:
    soft = read_clip(make_tone(1.5, loudness=0.01), RATE)
    loud = read_clip(make_tone(1.5, loudness=0.9), RATE)
    np.testing.assert_allclose(soft.samples, loud.samples, atol=1e-6)
    assert np.abs(loud.samples).max() == pytest.approx(PEAK)
    np.testing.assert_array_equal(loud.mel, speech_log_mel(loud.samples))
    assert loud.mel.shape == (150, 80) and loud.seconds == 1.5
    np.testing.assert_allclose(soft.recording, make_tone(1.5, loudness=0.01), atol=1e-7)


def test_a_file_and_its_samples_are_one_clip() -> None:
    of_file = read_clip(MEDIA / "speech.wav")
    of_array = read_clip(read_audio(MEDIA / "speech.wav", MelSettings()), RATE)
    assert of_file.digest == of_array.digest == read_clip((MEDIA / "speech.wav").read_bytes()).digest
    assert of_file.digest != read_clip(MEDIA / "speech2.mp3").digest


@pytest.mark.parametrize(
    ("source", "rate", "message"),
    [
        (make_tone(0.5), RATE, "the clip lasts 0.50 s; a clip of a voice has 1 to 30 s"),
        (make_tone(31), RATE, "the clip lasts 31.00 s; a clip of a voice has 1 to 30 s"),
        (make_tone(2, loudness=1e-4), RATE, "the clip is silent: its largest sample is 1.0e-04"),
        (make_tone(2), None, "an array of samples needs its sampling rate"),
        (str(MEDIA / "speech.wav"), RATE, "a sampling rate is for an array of samples"),
        (str(MEDIA / "silent.mp4"), None, "it has no sound"),
        (str(MEDIA / "picture.png"), None, "cannot decode it"),
        ("missing.wav", None, "no such file"),
        ("https://example.com/a.wav", None, "fetching from the web is off"),
        (b"no sound at all", None, "cannot decode it"),
        (3, None, "a sound must be a path, a URL, bytes or an array, got int"),
    ],
)
def test_what_is_no_clip(source: Any, rate: int | None, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_clip(source, rate)
