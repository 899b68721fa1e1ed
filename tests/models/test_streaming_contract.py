"""The contract of the audio encoder, the speech tokenizer and the decoder; Token2Wav's parts have theirs elsewhere.

The engine calls encoder and tokenizer on blocks and the decoder on what follows a cache; these calls are wrapped here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.batch import Array, AudioBlocks
from omni_jax.checkpoint import store
from omni_jax.config import AudioEncoderConfig, OmniConfig
from omni_jax.layers.attention import Mask
from omni_jax.layers.stack import unstack_layers
from omni_jax.layers.streaming import Block, Streaming
from omni_jax.models import speech_tokenizer
from omni_jax.models.audio_encoder import AudioEncoder
from omni_jax.models.decoder import Decoder, KVCache
from omni_jax.models.speech_tokenizer import SpeechTokenizer
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig
from tests.streaming import Case, check_contract

TOLERANCE = 2e-5  # float32, summed in another order for blocks of another length
CONFIG = OmniConfig.tiny().thinker_config
TOKEN_SECONDS = 0.04
CODE_RATE = 50
VOCABULARY = 50


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Any:
    """Of the Thinker, layers stacked."""
    return store.load(tiny_model, ["thinker"])["thinker"]


class BlockPart:
    """What takes blocks of log-mel as a part that streams. An input unit is the frames of one output unit.

    A block is all that its outputs depend on, so there is no state; a row begins with a block.
    """

    @property
    def streaming(self) -> Streaming:
        raise NotImplementedError

    def apply_blocks(self, params: Any, blocks: AudioBlocks) -> Any:
        raise NotImplementedError

    def apply_sequence(self, params: Any, x: Block) -> Block:
        units = x.valid.shape[1]
        padding = -units % self.streaming.block
        mel = jnp.pad(jnp.asarray(x.values), ((0, 0), (0, padding), (0, 0), (0, 0)))
        valid = jnp.pad(jnp.asarray(x.valid), ((0, 0), (0, padding)))
        output, _ = self.step(params, (), Block(mel, valid))
        return Block(jax.tree.map(lambda a: a[:, :units], output.values), x.valid)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def step(self, params: Any, state: tuple[()], block: Block, active: Array | None = None) -> tuple[Block, tuple[()]]:
        valid = _active_units(block, active)
        mel = jnp.where(valid[..., None, None], block.values, 0)  # [B, units, frames, M]
        size = self.streaming.block
        lengths = mel.shape[2] * valid.reshape(-1, size).sum(axis=1)
        blocks = AudioBlocks(mel.reshape(len(lengths), size * mel.shape[2], -1), lengths)
        outputs = self.apply_blocks(params, blocks)
        return Block(jax.tree.map(lambda a: a.reshape(*valid.shape, *a.shape[2:]), outputs), valid), state


@dataclass(frozen=True)
class AudioPart(BlockPart):
    """The encoder, from four frames to a token."""

    model: AudioEncoder

    @property
    def streaming(self) -> Streaming:
        return Streaming(TOKEN_SECONDS, self.model.config.block_tokens, look_ahead=0, look_back=0)

    def apply_blocks(self, params: Any, blocks: AudioBlocks) -> Any:
        return self.model.apply({"params": params}, blocks)


@dataclass(frozen=True)
class TokenizerPart(BlockPart):
    """The speech tokenizer, from two frames to a code and what was quantized."""

    model: SpeechTokenizer

    @property
    def streaming(self) -> Streaming:
        return Streaming(1 / CODE_RATE, self.model.config.block_codes, look_ahead=0, look_back=0)

    def apply_blocks(self, params: Any, blocks: AudioBlocks) -> Any:
        model = self.model.bind({"params": params})
        features = model.features(blocks)
        return model.quantizer.encode(jax.lax.stop_gradient(features)), features


@dataclass(frozen=True, eq=False)
class DecoderPart:
    """A decoder as a part that streams: from token ids and position ids to hidden states. Its state is the cache.

    The embeddings are rows of a table, so that a unit can be changed without becoming NaN: a masked NaN is still one
    where a probability of zero meets it, and only padding may hold any. Ids beyond the table give it there.
    """

    model: Decoder
    table: np.ndarray  # float32 [V, D]
    capacity: int

    @property
    def streaming(self) -> Streaming:
        return Streaming(TOKEN_SECONDS, block=1, look_ahead=0, look_back=None)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        valid = jnp.asarray(x.valid)
        embeds, ids = self._inputs(x)
        mask = Mask(valid.astype(jnp.int32), causal=True)
        hidden = self.model.apply({"params": params}, jnp.where(valid[..., None], embeds, 0), ids, mask)
        return Block(hidden, valid)

    def init_state(self, batch: int) -> KVCache:
        model = self.model
        return KVCache.init(model.config, batch, self.capacity, model.scan_layers, model.dtype)

    def step(self, params: Any, state: KVCache, block: Block, active: Array | None = None) -> tuple[Block, KVCache]:
        valid = _active_units(block, active)
        embeds, ids = self._inputs(block)
        outputs: Any = self.model.apply({"params": params}, embeds, ids, valid, state, method="extend")
        hidden, cache = outputs
        return Block(hidden, valid), cache

    def _inputs(self, x: Block) -> tuple[Any, Any]:
        tokens, ids = x.values
        embeds = jnp.take(jnp.asarray(self.table), tokens, axis=0)  # [B, T, D]
        return embeds, jnp.moveaxis(jnp.asarray(ids), 2, 0)  # [3, B, T]


def _active_units(block: Block, active: Array | None) -> Any:
    valid = jnp.asarray(block.valid)
    return valid if active is None else valid & jnp.asarray(active)[:, None]


def valid_units(units: int, lengths: tuple[int, ...]) -> np.ndarray:
    return np.arange(units) < np.array(lengths)[:, None]


def test_audio_encoder(params: Any) -> None:
    """With blocks of 4 tokens, of which a stream takes several; no weight depends on their length."""
    config = dataclasses.replace(CONFIG.audio_config, n_window=8)
    valid = valid_units(13, (13, 1, 4, 7))
    mel = np.random.default_rng(0).standard_normal((*valid.shape, 4, config.num_mel_bins), np.float32)
    case = Case(AudioPart(AudioEncoder(config)), params["audio_encoder"], Block(mel, valid), TOLERANCE, trains=True)
    check_contract(case)


def test_audio_block_is_two_seconds() -> None:
    streaming = AudioPart(AudioEncoder(AudioEncoderConfig())).streaming
    assert (streaming.latency, streaming.receptive_field) == (pytest.approx(2.0), 50)


def test_speech_tokenizer() -> None:
    n_window = 6
    config = SpeechTokenizerConfig.tiny().with_blocks(n_window)
    model = SpeechTokenizer(config)
    leaves = nn.unbox(speech_tokenizer.init_params(model, jax.random.key(0)))
    valid = valid_units(3 * n_window + 2, (3 * n_window + 2, 1, n_window, n_window + 3))
    rng = np.random.default_rng(0)
    # at random it would give every sound much the same features, and so one code
    leaves["quantizer"]["codebook"] = rng.standard_normal(leaves["quantizer"]["codebook"].shape, np.float32)
    mel = rng.standard_normal((*valid.shape, 2, config.audio_config.num_mel_bins), np.float32)
    case = Case(TokenizerPart(model), leaves, Block(mel, valid), TOLERANCE)
    codes, _ = case.apply_sequence(leaves, case.x).values
    assert len(np.unique(codes[0])) > n_window / 2
    check_contract(case)


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "single"])
def test_decoder(params: Any, scan: bool) -> None:
    config = CONFIG.text_config
    rng = np.random.default_rng(0)
    valid = valid_units(12, (12, 1, 7))
    table = rng.standard_normal((VOCABULARY + 1, config.hidden_size)).astype(np.float32)
    tokens = rng.integers(0, VOCABULARY, valid.shape)
    ids = np.cumsum(rng.integers(0, 3, (*valid.shape, 3)), axis=1)  # time, height and width on their own
    part = DecoderPart(Decoder(config, scan_layers=scan), table, capacity=16)
    leaves = params["decoder"] if scan else unstack_layers(params["decoder"])
    check_contract(Case(part, leaves, Block((tokens, ids), valid), TOLERANCE, trains=not scan))
