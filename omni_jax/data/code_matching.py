"""Sounds for a speech tokenizer whose codes are to be those of a Token2Wav: rows, and batches of both networks' blocks.

Rows are those of ``speech_examples``, but ``codec_ids`` may be missing: then nobody knows the codes. Where they are
there, they are codes that the Token2Wav's own Talker has drawn; rows of ``tools/self_distill.py`` have these, and their
sound, under ``speech`` and ``sound``. The blocks of the tokenizer are longer than those of the
DiT, so each frame of the latter says where its code stands among the former.

Letters: B rows, N blocks of a row of the DiT, F frames of a block, A blocks of the tokenizer, T frames of a block, S
positions of a block, M mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array, AudioBlocks
from omni_jax.checks import check_int
from omni_jax.config import DiTConfig
from omni_jax.data.examples import Reject, examples_or_reject
from omni_jax.data.rows import row_values
from omni_jax.data.sources import Row
from omni_jax.data.speech_examples import UNKNOWN_CODE, PrepareSpeech, SpeechExample
from omni_jax.data.speech_packing import SpeechBatch, SpeechBudget, SpeechPacking, SpeechPart
from omni_jax.data.speech_packing import make_empty_batch as make_empty_speech
from omni_jax.processing.audio import MelSettings, log_mel
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig

_FRAMES_PER_CODE = 2


@struct.dataclass
class MatchingBatch:
    """What one step is trained on."""

    speech: SpeechBatch  # without codes
    audio: AudioBlocks
    codes: Int[Array, "A S"] = struct.field(metadata={"logical_axes": ("batch", None)})  # or UNKNOWN_CODE
    # of each frame of the DiT the position of its row's blocks of the tokenizer that has its code
    position: Int[Array, "B N F"] = struct.field(metadata={"logical_axes": ("batch", None, None)})


@dataclass(frozen=True)
class MatchingExample(SpeechExample):
    """A ``SpeechExample`` with the log-mel of the tokenizer, as many frames."""

    tokenizer_mel: Float[np.ndarray, "frames M"]


@dataclass(frozen=True)
class PrepareMatching:
    """Reads a row and its sound.

    Attributes:
      speech: for the DiT.
      mel: how sound becomes frames of the tokenizer.
      codebook_size: codes of the tokenizer.
    """

    speech: PrepareSpeech
    mel: MelSettings
    codebook_size: int

    def __call__(self, row: Row) -> list[MatchingExample] | Reject:
        """The row's example; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(lambda row: [self.example(row)], row, self.speech.too_long)

    def example(self, row: Row) -> MatchingExample:
        """Of a row; it raises what ``PrepareSpeech.example`` does."""
        values = _flatten(row_values(row))
        self.speech.check_keys(values)
        codes = self._read_codes(values) if "codec_ids" in values else None
        samples = self.speech.read_samples(row, values, "audio")
        speech = self.speech.make(row, values, codes, samples)
        # its last frame may see less than a hop of sound, which the DiT has no frame for
        mel = log_mel(samples, self.mel)[: len(speech.mel)]
        return MatchingExample(**vars(speech), tokenizer_mel=mel)

    def _read_codes(self, values: Mapping[str, Any]) -> Int[np.ndarray, " K"]:
        codes = self.speech.read_codes(values)
        check_int("the largest code of codec_ids", int(codes.max()), 0, self.codebook_size - 1)
        return codes


def _flatten(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of ``tools/self_distill.py`` as one of speech; any other as it is."""
    speech = values.get("speech")
    if not isinstance(speech, Mapping):
        return values
    found = {"audio": values.get("sound"), "codec_ids": speech.get("codec_ids")}
    # its voice is a name, which neither network reads
    return {**found, "codec": speech["codec"]} if "codec" in speech else found


@dataclass(frozen=True)
class MatchingPacking:
    """Utterances into ``MatchingBatch``.

    Attributes:
      prepare: reads rows.
      speech: packs for the DiT.
      tokenizer: its sizes.
    """

    prepare: PrepareMatching
    speech: SpeechPacking
    tokenizer: SpeechTokenizerConfig

    def new_part(self) -> SpeechPart:
        return self.speech.new_part()

    def assemble(self, parts: Sequence[SpeechPart], *, first: int, streams: int) -> MatchingBatch:
        """The batch of a process; nothing in it depends on which streams these are."""
        budget = self.speech.budget
        num_rows = len(parts) * budget.rows
        speech = self.speech.assemble(parts, first=first, streams=streams)
        row_blocks = count_blocks(self.tokenizer, budget, self.speech.config.block_size)
        batch = _make_empty(self.tokenizer, speech, num_rows, row_blocks)
        used = np.zeros(num_rows, int)  # blocks of each row of the tokenizer
        for number, part in enumerate(parts):
            for placed in part.placed:
                row = number * budget.rows + placed.row
                self._write(batch, placed.example, (row, placed.begin), row * row_blocks, used[row])
                used[row] += -(-len(placed.example.mel) // self.tokenizer.audio_config.block_frames)
        return batch

    def _write(
        self, batch: MatchingBatch, example: MatchingExample, place: tuple[int, int], row_begin: int, block: int
    ) -> None:
        """Copies an example to its place.

        Args:
          batch: to write to.
          example: it.
          place: row of the batch, and first block of the DiT.
          row_begin: first block of the row of the tokenizer.
          block: first of the example's among those.
        """
        size = self.tokenizer.audio_config.block_frames
        num_frames = len(example.mel)
        num_blocks = -(-num_frames // size)
        own = slice(row_begin + block, row_begin + block + num_blocks)
        # blocks lie one behind the other, so each reshape is a view, and writing to it fills them
        batch.audio.mel[own].reshape(num_blocks * size, -1)[:num_frames] = example.tokenizer_mel
        batch.audio.length[own] = np.minimum(num_frames - size * np.arange(num_blocks), size)
        batch.codes[own].reshape(-1)[: len(example.codes)] = example.codes
        row, begin = place
        frames = batch.position[row, begin : begin - (-num_frames // self.speech.config.block_size)].reshape(-1)
        frames[:num_frames] = block * self.tokenizer.block_codes + np.arange(num_frames) // _FRAMES_PER_CODE

    def measure_fill(self, batch: MatchingBatch) -> dict[str, float]:
        known = np.asarray(batch.codes) != UNKNOWN_CODE
        return {**self.speech.measure_fill(batch.speech), "known_codes": float(known.mean())}


def count_blocks(tokenizer: SpeechTokenizerConfig, budget: SpeechBudget, block_size: int) -> int:
    """Blocks of the tokenizer that a row has, whatever utterances the blocks of the DiT are of."""
    # each utterance may end in a block that is not full
    return budget.blocks * block_size // tokenizer.audio_config.block_frames + budget.utterances


def make_empty_batch(config: DiTConfig, budget: SpeechBudget, tokenizer: SpeechTokenizerConfig) -> MatchingBatch:
    """One row of padding.

    Args:
      config: of the DiT.
      budget: of a stream.
      tokenizer: its sizes.
    """
    row_blocks = count_blocks(tokenizer, budget, config.block_size)
    return _make_empty(tokenizer, make_empty_speech(config, budget, 1), 1, row_blocks)


def _make_empty(tokenizer: SpeechTokenizerConfig, speech: SpeechBatch, num_rows: int, row_blocks: int) -> MatchingBatch:
    audio = tokenizer.audio_config
    num_blocks = num_rows * row_blocks
    return MatchingBatch(
        speech,
        AudioBlocks(
            np.zeros((num_blocks, audio.block_frames, audio.num_mel_bins), np.float32), np.zeros(num_blocks, np.int32)
        ),
        codes=np.full((num_blocks, tokenizer.block_codes), UNKNOWN_CODE, np.int32),
        position=np.zeros(speech.codes.shape, np.int32),
    )
