"""Speech as bytes, in every format of OpenAI's."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.serving.sound_formats import SOUND_FORMATS, SoundStream, encode_sound

EXACT = ("wav", "flac")  # lose nothing beyond 16 bits
# of the others: a delay of their filters, and a frame at the end
MAX_EXTRA_SECONDS = 0.1


def make_tone() -> np.ndarray:
    return (0.3 * np.sin(np.arange(36_001) * 2 * np.pi * 440 / SAMPLE_RATE)).astype(np.float32)


def decode(data: bytes) -> tuple[np.ndarray, int]:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    samples = np.concatenate([frame.to_ndarray().reshape(-1) for frame in frames])
    if samples.dtype == np.int16:
        samples = samples / np.float32(32768)
    return samples, frames[0].sample_rate


def find_peak(samples: np.ndarray, rate: int) -> float:
    """The loudest frequency, in Hz."""
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[np.argmax(spectrum)])


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("sound_format", [name for name in SOUND_FORMATS if name != "pcm16"])
def test_a_file_has_the_sound(sound_format: str, streamed: bool) -> None:
    tone = make_tone()
    if streamed:
        stream = SoundStream(sound_format)
        pieces = [stream.push(tone[i : i + 7000]) for i in range(0, len(tone), 7000)]
        # what has come is sent, and not kept to the end
        assert len(b"".join(pieces)) > 0.6 * len(encode_sound(tone, sound_format))
        data = b"".join([*pieces, stream.finish()])
    else:
        data = encode_sound(tone, sound_format)
    samples, rate = decode(data)
    if sound_format in EXACT:
        # half a step of 16 bits, and 1 part in 32767 for the scale
        np.testing.assert_allclose(samples, tone, atol=3e-5)
    assert 0 <= len(samples) / rate - len(tone) / SAMPLE_RATE < MAX_EXTRA_SECONDS
    assert abs(find_peak(samples, rate) - 440) < 2


def test_bare_samples_are_what_they_are() -> None:
    tone = make_tone()
    data = encode_sound(tone, "pcm16")
    np.testing.assert_allclose(np.frombuffer(data, "<i2") / 32767, tone, atol=2e-5)
    stream = SoundStream("pcm16")
    assert stream.push(tone[:100]) + stream.push(tone[100:]) + stream.finish() == data


@pytest.mark.parametrize("sound_format", SOUND_FORMATS)
def test_no_sound_is_a_file_too(sound_format: str) -> None:
    none = np.zeros(0, np.float32)
    assert isinstance(encode_sound(none, sound_format), bytes)
    assert isinstance(SoundStream(sound_format).finish(), bytes)
