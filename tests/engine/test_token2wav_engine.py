"""Requests of Token2Wav: together as alone, the same for the same seed, and the errors."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.engine.token2wav_engine import Token2WavEngine, _cut_windows, vocode_windows
from omni_jax.engine.token2wav_lists import assign_lists, list_lengths, round_num_blocks, solve_blocks
from omni_jax.errors import InputError
from omni_jax.models.bigvgan import synthesize
from omni_jax.models.bigvgan_streaming import Sides
from omni_jax.models.flow_matching import draw_noise
from omni_jax.models.token2wav import Token2Wav

# the same sums, cut into pieces by the shape of the batch
TOLERANCE = 1e-5

CONFIG = OmniConfig.tiny().token2wav_config
DIT = CONFIG.dit_config


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Token2WavEngine:
    return Token2WavEngine(Token2Wav(CONFIG), store.load(tiny_model, ["token2wav"])["token2wav"])


def voice(seed: int, frames: int = 20) -> Voice:
    rng = np.random.default_rng(seed)
    cond = rng.standard_normal((1, DIT.enc_emb_dim)).astype(np.float32)
    return Voice(f"voice {seed}", 0, cond, rng.standard_normal((1, frames, DIT.mel_dim)).astype(np.float32))


def codes(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, DIT.num_embeds + 1, n) for n in lengths]


def noise_for(row: np.ndarray, seed: int = 0) -> np.ndarray:
    shape = (len(row) * DIT.repeats, DIT.mel_dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_request_together_is_the_request_alone(engine: Token2WavEngine) -> None:
    """Several lengths, two voices with clips of two lengths, noise drawn and given."""
    rows, voices = codes(1, 30, 12, 13), [voice(0), voice(1, 33), voice(0), voice(1, 33)]
    noise = [None, None, noise_for(codes(12)[0]), None]
    seeds = [5, 6, 7, 6]
    mels = engine.make_mels(rows, voices, noise, seeds)
    for i, row in enumerate(rows):
        alone = engine.make_mels([row], [voices[i]], [noise[i]], [seeds[i]])[0]
        assert mels[i].shape == alone.shape == (2 * len(row), DIT.mel_dim)
        np.testing.assert_allclose(mels[i], alone, atol=TOLERANCE * np.abs(alone).max())
    samples = engine.vocode([mels[0], mels[2], mels[0][:1]])
    assert [s.shape for s in samples] == [(480,), (24 * 240,), (240,)]
    assert all(s.dtype == np.float32 and np.isfinite(s).all() and np.abs(s).max() <= 1 for s in samples)


def test_the_seed_decides_the_noise(engine: Token2WavEngine) -> None:
    (row,) = codes(20)
    one, other, again = engine.make_mels([row] * 3, [voice(0)] * 3, [None] * 3, [1, 2, 1])
    np.testing.assert_allclose(one, again, atol=TOLERANCE * np.abs(one).max())
    assert np.abs(one - other).max() > 0.1


def test_lists_of_equal_length() -> None:
    """The longest first, each in the list that is shortest so far."""
    assert assign_lists([3, 9, 4, 4], 1) == [[1, 2, 3, 0]]
    assert assign_lists([3, 9, 4, 4], 2) == [[1], [2, 3, 0]]
    assert assign_lists([1, 1], 4) == [[0], [1], [], []]


def test_noise_is_drawn_block_by_block() -> None:
    """So that a stream, which has not all codes yet, can draw what the whole request would."""
    seeds, index = np.array([4, 4, 5], np.uint32), np.array([0, 1, 0])
    all_at_once = np.asarray(draw_noise(seeds, index, (24, 80)))
    np.testing.assert_array_equal(all_at_once[1:2], draw_noise(seeds[1:2], index[1:2], (24, 80)))
    assert len({float(block[0, 0]) for block in all_at_once}) == 3
    assert abs(all_at_once.std() - 1) < 0.05


def test_synthesize_is_both_halves(engine: Token2WavEngine) -> None:
    rows, voices, noise = codes(12), [voice(0)], [None]
    (samples,) = engine.synthesize(rows, voices, noise, [3])
    (mel,) = engine.make_mels(rows, voices, noise, [3])
    np.testing.assert_array_equal(samples, engine.vocode([mel])[0])
    assert engine.synthesize([], [], [], []) == []


# in windows of 30 and 46 frames: a short one, a long one, one of each, and several
@pytest.mark.parametrize("num_frames", [20, 46, 60, 148])
def test_windows_of_the_vocoder_leave_no_seam(engine: Token2WavEngine, num_frames: int) -> None:
    engine = copy.copy(engine)
    (size,) = engine.window_frames
    engine.window_frames = [size - 16, size]
    engine.warm_up_vocoder()
    compiled = vocode_windows._cache_size()
    mel = np.random.default_rng(0).standard_normal((num_frames, DIT.mel_dim)).astype(np.float32)
    short = mel[:7]
    samples, of_short = engine.vocode([mel, short])
    assert vocode_windows._cache_size() == compiled
    config, weights = engine.config.bigvgan_config, engine.vocoder_weights
    for ours, of_mel in ((samples, mel), (of_short, short)):
        (whole,) = np.asarray(synthesize(config, weights, of_mel[None], np.array([len(of_mel)])))
        np.testing.assert_allclose(ours, whole, rtol=0, atol=TOLERANCE)
    assert np.abs(samples).max() > 0.01


def test_the_smallest_windows_that_suffice() -> None:
    sizes, sides = [132, 260], Sides(34, 34)
    cases = {1: [132], 132: [132], 133: [260], 260: [260], 300: [260, 132], 1028: [260] * 5, 1029: [260] * 5 + [132]}
    for num_frames, expected in cases.items():
        windows = _cut_windows(0, num_frames, sizes, sides)
        assert [window.size for window in windows] == expected
        kept = [frame for w in windows for frame in range(w.start + w.first, w.start + w.last)]
        assert kept == list(range(num_frames))
        # each has what its frames depend on, or an end of the row
        for w in windows:
            assert w.start == 0 or w.first >= sides.behind
            assert w.start + w.size >= min(num_frames, w.start + w.last + sides.ahead)


def test_lengths_of_one_bucket_share_a_program(engine: Token2WavEngine) -> None:
    engine.make_mels(codes(30, 20), [voice(0)] * 2, [None] * 2, [0, 1])
    compiled = solve_blocks._cache_size()
    engine.make_mels(codes(33, 23), [voice(2)] * 2, [noise_for(codes(33)[0]), None], [0, 1])
    assert solve_blocks._cache_size() == compiled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(codes=[]), r"request 0: codes .* at least one"),
        (dict(codes=[0.5]), r"request 0: codes .* integer"),
        (dict(codes=[3, 66, 70]), r"code 66 is out of range; .* 0 to 65"),
        (dict(codes=[-1]), r"code -1 is out of range"),
        (dict(codes=[1] * 16385), r"16385 codes; .* at most 16384"),
        (dict(noise=np.zeros((3, 80))), r"noise has shape \[3, 80\]; 2 codes need \[4, 80\]"),
        (dict(seed=-1), r"seed is -1"),
        (dict(voice=dataclasses.replace(voice(0), cond=np.zeros((1, 5)))), r"cond has shape \[1, 5\].* \[1, 12\]"),
        (dict(voice=voice(0, frames=4)), r"ref_mel has shape \[1, 4, 80\].* at least 5"),
    ],
)
def test_errors(engine: Token2WavEngine, changes: dict, message: str) -> None:
    given = {"codes": [1, 2], "noise": None, "seed": 0, "voice": voice(0), **changes}
    with pytest.raises(InputError, match=message):
        engine.synthesize([np.array(given["codes"])], [given["voice"]], [given["noise"]], [given["seed"]])


def test_lengths_of_lists() -> None:
    assert list_lengths(100) == [*range(4, 17), 20, 24, 28, 32, 48, 64, 96, 128]
    assert list_lengths(100, (16, 64)) == [16, 64, 96, 128]
    assert [round_num_blocks(n, (16, 64)) for n in (1, 16, 17, 64, 65, 97)] == [16, 16, 64, 64, 96, 128]
    assert all(n <= round_num_blocks(n) <= max(4, n * 1.5) for n in range(1, 3000))
    assert all(round_num_blocks(n) <= n * 1.25 for n in range(17, 33))
