"""The speech tokenizer at work: sounds to codes, whole ones in calls of one fixed shape, and one while it goes on.

Letters: A blocks of a call, S codes of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from omni_jax.batch import AudioBlocks
from omni_jax.checkpoint import store
from omni_jax.checkpoint.fingerprint import fingerprint_codec
from omni_jax.models.speech_tokenizer import SpeechTokenizer, abstract_params
from omni_jax.processing.audio import MelSettings, MelStream, log_mel
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER, SpeechTokenizerConfig

RATE = 16_000  # Hz, of the sounds
_BLOCKS_PER_CALL = 16


class SpeechTokenizerEngine:
    """A speech tokenizer and its parameters.

    Attributes:
      config: of the tokenizer.
      fingerprint: of what codes follow from, like ``"1f0c5d2e9a7b3c48"``: rows carry it beside their codes.
    """

    def __init__(self, config: SpeechTokenizerConfig, params: Any, blocks_per_call: int = _BLOCKS_PER_CALL) -> None:
        """Compiles nothing yet.

        Args:
          config: of the tokenizer.
          params: of it, float32.
          blocks_per_call: that are encoded together; a call with fewer is filled with silence.
        """
        self.config = config
        self.fingerprint = fingerprint_codec(config, params)
        self._model = SpeechTokenizer(config)
        self._params = params
        self._blocks_per_call = blocks_per_call
        self._mel = MelSettings(feature_size=config.audio_config.num_mel_bins)

    @classmethod
    def load(cls, folder: Path) -> SpeechTokenizerEngine:
        """Of a checkpoint, on the first device.

        Raises:
          CheckpointError: if it has no speech tokenizer, or another than its ``speech_tokenizer.json`` says.
          ConfigError: if that file describes none.
        """
        config = SpeechTokenizerConfig.load(folder)
        expected = nn.unbox(abstract_params(SpeechTokenizer(config)))
        return cls(config, store.load_unpublished(folder, SPEECH_TOKENIZER, expected))

    def encode(self, sounds: Sequence[Float[np.ndarray, " n"]]) -> list[Int[np.ndarray, " codes"]]:
        """The codes of each sound, 50 a second and rounded up.

        Args:
          sounds: mono, from -1 to 1, at ``RATE``; none of them empty.
        """
        size = self.config.audio_config.block_frames
        blocks: list[np.ndarray] = []
        num_frames = []
        for sound in sounds:
            mel = log_mel(sound, self._mel)  # [frames, mel]
            num_frames.append(len(mel))
            for begin in range(0, len(mel), size):
                blocks.append(mel[begin : begin + size])
        codes: list[np.ndarray] = []
        for begin in range(0, len(blocks), self._blocks_per_call):
            codes += self.encode_blocks(blocks[begin : begin + self._blocks_per_call])

        found = []
        first = 0
        for frames in num_frames:
            last = first - (-frames // size)
            found.append(np.concatenate(codes[first:last]))
            first = last
        return found

    def stream(self) -> CodeStream:
        """For a sound that goes on."""
        return CodeStream(self, self._mel)

    def encode_blocks(self, blocks: Sequence[Float[np.ndarray, "frames mel"]]) -> list[Int[np.ndarray, " codes"]]:
        """The codes of blocks of log-mel, of which there are at most as many as a call takes."""
        audio = self.config.audio_config
        # two shapes: a short sound, or one that goes on, has a single block
        count = 1 if len(blocks) == 1 else self._blocks_per_call
        mel = np.zeros((count, audio.block_frames, audio.num_mel_bins), np.float32)
        length = np.zeros(count, np.int32)
        for number, block in enumerate(blocks):
            mel[number, : len(block)] = block
            length[number] = len(block)
        codes = np.asarray(_encode(self._model, self._params, AudioBlocks(mel, length)))  # [A, S]
        # of an odd number of frames the last has a code of its own
        return [codes[number, : (len(block) + 1) // 2] for number, block in enumerate(blocks)]


class CodeStream:
    """Codes of a sound that goes on: those of a block as soon as the sound has all that the block sees.

    They do not depend on the pieces that the sound comes in. They are those of ``SpeechTokenizerEngine.encode`` but for
    what ``processing.audio.MelStream`` says: until the loudest bin has come, bins far under it may differ.
    """

    def __init__(self, engine: SpeechTokenizerEngine, mel: MelSettings) -> None:
        self._engine = engine
        self._mel = MelStream(mel, engine.config.audio_config.block_frames)

    def push(self, samples: Float[np.ndarray, " n"]) -> Int[np.ndarray, " codes"]:
        """Takes more of the sound; returns the codes of the blocks that are complete now, which may be none.

        Args:
          samples: mono, from -1 to 1, at ``RATE``.
        """
        return self._encode(self._mel.push(samples))

    def finish(self) -> Int[np.ndarray, " codes"]:
        """Says that the sound has ended; returns the codes that are left."""
        return self._encode([self._mel.finish()])

    def _encode(self, blocks: Sequence[np.ndarray]) -> Int[np.ndarray, " codes"]:
        # a call for each, which is what a stream mostly has
        codes = [np.zeros(0, np.int32)]
        for block in blocks:
            if len(block):
                codes += self._engine.encode_blocks([block])
        return np.concatenate(codes)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: SpeechTokenizer, params: Any, audio: AudioBlocks) -> Int[jax.Array, "A S"]:
    # codes of a TPU are to be those of a CPU, wherever two codes are not equally near
    with jax.default_matmul_precision("high"):
        found: Any = model.apply({"params": params}, audio, method=SpeechTokenizer.encode)
    return jnp.asarray(found)
