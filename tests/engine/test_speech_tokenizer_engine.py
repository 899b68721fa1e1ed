"""Codes of sounds: whole, together with others, and while a sound goes on."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from omni_jax.batch import AudioBlocks
from omni_jax.engine.speech_tokenizer_engine import SpeechTokenizerEngine
from omni_jax.models.speech_tokenizer import SpeechTokenizer, init_params
from omni_jax.processing.audio import MelSettings, log_mel
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig

CONFIG = SpeechTokenizerConfig.tiny()


@pytest.fixture(scope="module")
def params() -> Any:
    model = SpeechTokenizer(CONFIG)
    found = nn.unbox(init_params(model, jax.random.key(0)))
    # codes that are features of some sound, so that another one has many of them
    mel = log_mel(noise(20_800), MelSettings(feature_size=CONFIG.audio_config.num_mel_bins))[:128]
    blocks = AudioBlocks(mel.reshape(8, 16, -1), np.full(8, 16, np.int32))
    features = model.apply({"params": found}, blocks, method=SpeechTokenizer.features)
    found["quantizer"]["codebook"] = np.asarray(features).reshape(CONFIG.codebook_size, -1)
    return found


@pytest.fixture(scope="module", params=[20, 5], ids=["its own blocks", "smaller blocks"])
def engine(request: pytest.FixtureRequest, params: Any) -> SpeechTokenizerEngine:
    return SpeechTokenizerEngine(CONFIG.with_blocks(request.param), params, blocks_per_call=6)


def noise(count: int) -> np.ndarray:
    # of one loudness, so that the floor of no bin depends on what comes later
    return np.random.default_rng(count).uniform(-0.3, 0.3, count).astype(np.float32)


def test_sounds_are_encoded_together_as_alone(engine: SpeechTokenizerEngine) -> None:
    sounds = [noise(count) for count in (16_000, 400, 9_999, 6_400)]
    together = engine.encode(sounds)
    assert [len(codes) for codes in together] == [50, 2, 32, 20]
    for sound, codes in zip(sounds, together, strict=True):
        np.testing.assert_array_equal(engine.encode([sound])[0], codes)
        assert codes.min() >= 0 and codes.max() < CONFIG.codebook_size
    assert len(np.unique(together[0])) > 5


@pytest.mark.parametrize("piece", [37, 3200, 12_345, 40_000])
def test_a_sound_that_goes_on_has_the_codes_of_the_whole(engine: SpeechTokenizerEngine, piece: int) -> None:
    sound = noise(16_161)
    stream = engine.stream()
    found = []
    for begin in range(0, len(sound), piece):
        found.append(stream.push(sound[begin : begin + piece]))
        # the codes of a block are there 40 samples behind its end
        pushed = min(begin + piece, len(sound))
        size = engine.config.block_codes
        assert sum(map(len, found)) == max(pushed - 40, 0) // (320 * size) * size
    found.append(stream.finish())
    np.testing.assert_array_equal(np.concatenate(found), engine.encode([sound])[0])


def test_codes_follow_from_blocks_and_so_does_the_fingerprint(params: Any) -> None:
    whole = SpeechTokenizerEngine(CONFIG, params)
    smaller = SpeechTokenizerEngine(CONFIG.with_blocks(5), params)
    assert whole.fingerprint != smaller.fingerprint
    assert not np.array_equal(whole.encode([noise(16_000)])[0], smaller.encode([noise(16_000)])[0])
    # what is behind the quantizer changes no code
    other = jax.tree.map(lambda a: a, params)
    other["proj"] = jax.tree.map(lambda a: a + 1, params["proj"])
    assert SpeechTokenizerEngine(CONFIG, other).fingerprint == whole.fingerprint
    other["front"] = jax.tree.map(lambda a: a + 1, params["front"])
    assert SpeechTokenizerEngine(CONFIG, other).fingerprint != whole.fingerprint
