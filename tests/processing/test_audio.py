import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings, MelStream, Resampler, audio_input, log_mel, mel_filters, resample
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
    with pytest.raises(InputError, match=r"lasts 0\.0199 s; the model takes nothing under 0\.025 s"):
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


BLOCK = 200


def streamed(samples, size, settings=MEL):
    mel = MelStream(settings, BLOCK)
    blocks = [b for i in range(0, len(samples), size) for b in mel.push(samples[i : i + size])]
    assert all(len(b) == BLOCK for b in blocks)
    return np.concatenate([*blocks, mel.finish()])


# around the end of a block, and of what its last frame sees, 40 samples later
@pytest.mark.parametrize("n", [1, 160, 401, 31_999, 32_000, 32_001, 32_039, 32_040, 32_160, 64_041, 100_003])
@pytest.mark.parametrize("size", [160, 1001, 200_000])
def test_a_sound_in_pieces_has_the_frames_of_the_whole(n, size):
    """Exactly, where nothing is louder than the first block."""
    noise = np.random.default_rng(0).standard_normal(n)
    samples = (noise * np.exp(-np.arange(n) / 5000)).astype(np.float32)
    np.testing.assert_array_equal(streamed(samples, size), log_mel(samples, MEL))


def test_the_floor_rises_with_the_sound():
    rng = np.random.default_rng(0)
    samples = (rng.standard_normal(150_000) * np.repeat([1e-6, 1e-3, 1, 1e-6, 1e-6], 30_000)).astype(np.float32)
    ours, whole = streamed(samples, 1600), log_mel(samples, MEL)
    np.testing.assert_array_equal(ours, streamed(samples, 7777))
    np.testing.assert_array_equal(ours[2 * BLOCK :], whole[2 * BLOCK :])  # the loudest is in the third block
    other = ours != whole
    assert other[:BLOCK].any()
    np.testing.assert_array_equal(whole[other], whole.min())  # only what the clip's own floor hides
    assert (ours[other] < whole[other]).all()


def test_a_stream_of_the_longest_sound_ends_as_the_clip():
    settings = MelSettings(chunk_length=5)
    for n in (79_681, 79_840, 79_841, 80_000):
        samples = np.random.default_rng(0).standard_normal(n).astype(np.float32)
        samples[0] = 100  # the loudest
        np.testing.assert_array_equal(streamed(samples, 1600, settings), log_mel(samples, settings))


@pytest.mark.parametrize("rate", [8000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("size", [100, 4801])
def test_resampling_in_pieces(rate, size):
    samples = np.random.default_rng(0).standard_normal(9999).astype(np.float32)
    stream = Resampler(rate, 16_000)
    pieces = [stream.push(samples[i : i + size]) for i in range(0, len(samples), size)]
    out = np.concatenate([*pieces, stream.finish()])
    np.testing.assert_array_equal(out, resample(samples, rate, 16_000))
