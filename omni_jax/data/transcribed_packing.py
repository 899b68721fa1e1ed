"""Examples of sound with its text into batches of fixed shapes: in each row the blocks of several utterances.

Letters: B rows, N blocks of a row, T mel frames of a block, M mel bins, U utterances of a row, L labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array, AudioBlocks
from omni_jax.data.speech_packing import SpeechBudget, SpeechPart
from omni_jax.data.transcribed_examples import NO_LABEL, PrepareTranscribed, TranscribedExample
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig


@struct.dataclass
class TranscribedBatch:
    """Utterances in rows, each in blocks of its own that stand one after the other."""

    audio: AudioBlocks  # B N blocks
    target_mel: Float[Array, "B N T mel"] = struct.field(metadata={"logical_axes": ("batch", None, None, None)})
    # of each utterance its first block and its frames; 0 frames: padding
    begin: Int[Array, "B U"] = struct.field(metadata={"logical_axes": ("batch", None)})
    length: Int[Array, "B U"] = struct.field(metadata={"logical_axes": ("batch", None)})
    labels: Int[Array, "B U L"] = struct.field(metadata={"logical_axes": ("batch", None, None)})


@dataclass(frozen=True)
class TranscribedPacking:
    """Utterances into ``TranscribedBatch``.

    Attributes:
      prepare: reads rows.
      budget: of one stream.
      config: of the tokenizer.
    """

    prepare: PrepareTranscribed
    budget: SpeechBudget
    config: SpeechTokenizerConfig

    def new_part(self) -> SpeechPart:
        return SpeechPart(self.budget, self.config.audio_config.block_frames)

    def assemble(self, parts: Sequence[SpeechPart], *, first: int, streams: int) -> TranscribedBatch:
        """The batch of a process; nothing in it depends on which streams these are."""
        budget = self.budget
        batch = make_empty_batch(self.config, budget, len(parts) * budget.rows, self.prepare.max_labels)
        for number, part in enumerate(parts):
            for placed in part.placed:
                place = (number * budget.rows + placed.row, placed.number)
                _write(batch, self.config, budget.blocks, placed.example, place, placed.begin)
        return batch

    def measure_fill(self, batch: TranscribedBatch) -> dict[str, float]:
        frames = np.prod(np.shape(batch.target_mel)[:3])
        return {
            "utterances": float((np.asarray(batch.length) > 0).sum()),
            "frames": float(np.asarray(batch.length).sum() / frames),
        }


def make_empty_batch(
    config: SpeechTokenizerConfig, budget: SpeechBudget, num_rows: int, max_labels: int
) -> TranscribedBatch:
    """Rows of padding."""
    audio = config.audio_config
    num_blocks = num_rows * budget.blocks
    utterances = (num_rows, budget.utterances)
    return TranscribedBatch(
        AudioBlocks(
            np.zeros((num_blocks, audio.block_frames, audio.num_mel_bins), np.float32), np.zeros(num_blocks, np.int32)
        ),
        target_mel=np.zeros((num_rows, budget.blocks, audio.block_frames, config.mel_dim), np.float32),
        begin=np.zeros(utterances, np.int32),
        length=np.zeros(utterances, np.int32),
        labels=np.full((*utterances, max_labels), NO_LABEL, np.int32),
    )


def _write(
    batch: TranscribedBatch,
    config: SpeechTokenizerConfig,
    row_blocks: int,
    example: TranscribedExample,
    place: tuple[int, int],
    begin: int,
) -> None:
    """Copies an example to its place: a row and the number of an utterance in it, and a block of the row."""
    num_frames = len(example.mel)
    size = config.audio_config.block_frames
    num_blocks = -(-num_frames // size)
    first = place[0] * row_blocks + begin
    # blocks lie one behind the other, so each reshape is a view, and writing to it fills them
    mel = batch.audio.mel[first : first + num_blocks].reshape(num_blocks * size, -1)
    mel[:num_frames] = example.mel
    left = num_frames - size * np.arange(num_blocks)
    batch.audio.length[first : first + num_blocks] = np.minimum(left, size)
    target = batch.target_mel[place[0], begin : begin + num_blocks].reshape(num_blocks * size, -1)
    target[:num_frames] = example.target_mel
    batch.begin[place] = begin
    batch.length[place] = num_frames
    batch.labels[place][: len(example.labels)] = example.labels
