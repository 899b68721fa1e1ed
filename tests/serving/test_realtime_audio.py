"""Sound of a realtime session: its formats, the order of its packets, and where speech is in it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.media import read_audio
from omni_jax.serving.realtime_audio import (
    MAX_LATE_SECONDS,
    PCM_RATE,
    RATES,
    PacketBuffer,
    decode_samples,
    encode_samples,
)
from omni_jax.serving.turn_detection import TurnDetector, WebRtcDetector

SPEECH = Path(__file__).parents[1] / "media" / "speech.wav"
PACKET = 480  # 20 ms


@pytest.mark.parametrize("audio_format", ["audio/pcmu", "audio/pcma"])
def test_g711_is_that_of_the_standard_library(audio_format: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        audioop = pytest.importorskip("audioop", reason="Python 3.13 has none")
    encode, decode = {
        "audio/pcmu": (audioop.lin2ulaw, audioop.ulaw2lin),
        "audio/pcma": (audioop.lin2alaw, audioop.alaw2lin),
    }[audio_format]
    every = np.arange(-32767, 32768)
    samples = every.astype(np.float32) / 32767
    assert encode_samples(samples, audio_format) == encode(every.astype("<i2").tobytes(), 2)
    codes = bytes(range(256))
    decoded = np.round(decode_samples(codes, audio_format) * 32768).astype("<i2")
    assert decoded.tobytes() == decode(codes, 2)


@pytest.mark.parametrize("audio_format", RATES)
def test_a_sound_survives_its_format(audio_format: str) -> None:
    tone = (0.5 * np.sin(np.arange(4000) / 9)).astype(np.float32)
    back = decode_samples(encode_samples(tone, audio_format), audio_format)
    # 16 bits, or 13 bits of which the lowest are left out where it is loud
    np.testing.assert_allclose(back, tone, atol=1e-4 if audio_format == "audio/pcm" else 0.02)


def test_half_a_sample_is_an_error() -> None:
    with pytest.raises(InputError, match="3 bytes"):
        decode_samples(b"abc", "audio/pcm")


def packets(count: int) -> list[np.ndarray]:
    """Each of samples that are its number."""
    return [np.full(PACKET, number, np.float32) for number in range(1, count + 1)]


def receive(order: list[int], sent: list[np.ndarray], first: int = 0) -> list[float]:
    """The number of each packet that is played; 0 is silence."""
    buffer = PacketBuffer(PCM_RATE)
    played = [buffer.push(sent[number], first + number) for number in order]
    return np.concatenate([*played, buffer.finish()])[::PACKET].tolist()


def test_packets_without_a_number_are_taken_as_they_come() -> None:
    buffer = PacketBuffer(PCM_RATE)
    assert [len(buffer.push(samples, None)) for samples in packets(3)] == [PACKET] * 3


@pytest.mark.parametrize(
    "order, played",
    [
        ([0, 1, 2, 3], [1, 2, 3, 4]),
        ([0, 2, 1, 3], [1, 2, 3, 4]),  # another order
        ([0, 1, 1, 2], [1, 2, 3]),  # twice
        ([0, 2, 3], [1, 0, 3, 4]),  # never
        ([0, *range(2, 20), 1], [1, 0, *range(3, 21)]),  # too late
    ],
)
def test_packets_are_played_in_their_order(order: list[int], played: list[int]) -> None:
    assert receive(order, packets(20)) == played
    assert receive(order, packets(20), first=1000) == played


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), max_size=60))
def test_whatever_comes_is_played_in_order_and_in_time(numbers: list[int]) -> None:
    buffer = PacketBuffer(PCM_RATE)
    sent = packets(41)
    played: list[np.ndarray] = []
    for number in numbers:
        played.append(buffer.push(sent[number], number))
        assert sum(map(len, buffer._waiting.values())) <= MAX_LATE_SECONDS * PCM_RATE
    values = np.concatenate([np.zeros(0), *played, buffer.finish()])[::PACKET]
    first = numbers[0] if numbers else 0
    # each packet lies at its time, or is silence there
    for place, value in enumerate(values):
        assert value in (0, first + place + 1)


def make_dialogue() -> tuple[np.ndarray, float]:
    """A second of noise, three of speech, and two of noise; and the seconds of speech."""
    speech = read_audio(str(SPEECH), MelSettings(sampling_rate=PCM_RATE))
    loud = np.flatnonzero(np.abs(speech) > 0.05 * np.abs(speech).max())
    speech = speech[loud[0] : loud[-1]]
    noise = np.random.default_rng(0).normal(0, 1e-4, 6 * PCM_RATE).astype(np.float32)
    noise[PCM_RATE : PCM_RATE + len(speech)] += speech
    return noise[: 3 * PCM_RATE + len(speech)], len(speech) / PCM_RATE


@pytest.mark.parametrize("packet", [160, 480, 24_000])
def test_speech_is_found_however_it_is_cut(packet: int) -> None:
    sound, seconds = make_dialogue()
    detector = TurnDetector(WebRtcDetector(0.5), PCM_RATE, threshold=0.5, silence_seconds=0.5)
    found = []
    for begin in range(0, len(sound), packet):
        found += detector.push(sound[begin : begin + packet])
    assert [boundary.kind for boundary in found] == ["start", "stop"]
    start, stop = found
    assert abs(start.seconds - 1) < 0.2 and abs(stop.seconds - (1 + seconds + 0.5)) < 0.3


def test_a_click_is_no_speech() -> None:
    sound = np.random.default_rng(0).normal(0, 1e-4, 2 * PCM_RATE).astype(np.float32)
    sound[PCM_RATE : PCM_RATE + 200] = 0.9
    detector = TurnDetector(WebRtcDetector(0.5), PCM_RATE, threshold=0.5, silence_seconds=0.5)
    assert detector.push(sound) == []
