"""The contract of the parts that listen, think and talk; those of Token2Wav have theirs beside their own tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.batch import Array
from omni_jax.checkpoint import store
from omni_jax.config import AudioEncoderConfig, OmniConfig
from omni_jax.layers.stack import unstack_layers
from omni_jax.layers.streaming import Block, Streaming
from omni_jax.models import talker, thinker
from omni_jax.models.audio_encoder import AudioEncoder, AudioStream
from omni_jax.models.decoder import DecoderStream, Positions
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from tests.streaming import Case, check_contract

TOLERANCE = 2e-5  # float32, summed in another order for blocks of another length
CONFIG = OmniConfig.tiny()
WORDS = 50


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Any:
    return unstack_layers(store.load(tiny_model, ["thinker", "talker"]))


@dataclass(frozen=True)
class Worded:
    """A decoder whose embeddings are rows of a table, so that a unit can be changed without becoming NaN.

    A masked NaN is still one where a probability of nought meets it; only padding may hold any. Numbers beyond the
    table give it there.
    """

    part: DecoderStream
    table: np.ndarray  # float32 [words, D]

    @property
    def streaming(self) -> Streaming:
        return self.part.streaming

    def apply_sequence(self, params: Any, x: Block) -> Block:
        return self.part.apply_sequence(params, self._looked_up(x))

    def init_state(self, batch: int) -> Any:
        return self.part.init_state(batch)

    def step(self, params: Any, state: Any, block: Block, active: Array | None = None) -> tuple[Block, Any]:
        return self.part.step(params, state, self._looked_up(block), active)

    def _looked_up(self, x: Block) -> Block:
        words, ids = x.values
        return Block(Positions(jnp.take(jnp.asarray(self.table), words, axis=0), ids), x.valid, x.row)


def rows(units: int, lengths: tuple[int, ...]) -> np.ndarray:
    return np.arange(units) < np.array(lengths)[:, None]


def test_audio_encoder(params: Any) -> None:
    c = CONFIG.thinker_config.audio_config
    valid = rows(120, (120, 1, 50, 77))
    mel = np.random.default_rng(0).standard_normal((*valid.shape, 4, c.num_mel_bins), np.float32)
    part = AudioStream(AudioEncoder(c, scan_layers=False))
    check_contract(Case(part, params["thinker"]["audio_encoder"], Block(mel, valid), TOLERANCE, trains=True))


@pytest.mark.parametrize("name", ["thinker", "talker"])
def test_decoder(params: Any, name: str) -> None:
    if name == "thinker":
        part = thinker.decoder_stream(Thinker(CONFIG.thinker_config, scan_layers=False), slots=32)
    else:
        part = talker.decoder_stream(Talker(CONFIG.talker_config, scan_layers=False), slots=32)
    rng, valid = np.random.default_rng(0), rows(24, (24, 1, 17, 9))
    table = rng.standard_normal((WORDS + 1, part.model.config.hidden_size)).astype(np.float32)
    words = rng.integers(0, WORDS, valid.shape)
    ids = np.cumsum(rng.integers(0, 3, (*valid.shape, 3)), axis=1)  # time, height and width on their own
    x = Block((words, ids), valid)
    check_contract(Case(Worded(part, table), params[name]["decoder"], x, TOLERANCE, trains=True))


def test_declared_numbers() -> None:
    ear = AudioStream(AudioEncoder(AudioEncoderConfig())).streaming
    assert (ear.latency, ear.receptive_field) == (pytest.approx(2.0), 50)
    config = OmniConfig.tiny()
    think = thinker.decoder_stream(Thinker(config.thinker_config), slots=1).streaming
    talk = talker.decoder_stream(Talker(config.talker_config), slots=1).streaming
    assert (think.latency, talk.latency) == (0.04, 0.02)
    assert think.receptive_field is None and talk.receptive_field is None
