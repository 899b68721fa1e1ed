"""Examples of speech into batches of fixed shapes: in each row of a batch the blocks of several utterances.

Nothing is truncated and nothing leaks: frames attend to those of their own utterance alone.

Letters: B rows, N blocks of a row, F frames of a block, M mel bins, U utterances of a row, T frames of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.data.speech_examples import PrepareSpeech

NO_UTTERANCE = -1  # of a block of padding


@struct.dataclass
class SpeechBatch:
    """Utterances in rows, each in blocks of its own that stand one after the other."""

    codes: Int[Array, "B N F"] = struct.field(metadata={"logical_axes": ("batch", None, None)})
    mel: Float[Array, "B N F M"] = struct.field(metadata={"logical_axes": ("batch", None, None, None)})
    # of each block, which of the row's it is a part of
    utterance: Int[Array, "B N"] = struct.field(metadata={"logical_axes": ("batch", None)})
    # of each utterance its first block and its frames; 0 frames: padding
    begin: Int[Array, "B U"] = struct.field(metadata={"logical_axes": ("batch", None)})
    length: Int[Array, "B U"] = struct.field(metadata={"logical_axes": ("batch", None)})
    speaker: Float[Array, "B U enc_emb_dim"] = struct.field(metadata={"logical_axes": ("batch", None, None)})
    # another clip of the voice; 0 frames where there is none
    clip: Float[Array, "B U T M"] = struct.field(metadata={"logical_axes": ("batch", None, None, None)})
    clip_length: Int[Array, "B U"] = struct.field(metadata={"logical_axes": ("batch", None)})


@dataclass(frozen=True)
class SpeechBudget:
    """What a stream may put into a step.

    Attributes:
      rows: of the batch.
      blocks: of a row.
      utterances: of a row.
      clip_frames: of a clip.
    """

    rows: int
    blocks: int
    utterances: int
    clip_frames: int


@dataclass(frozen=True)
class PlacedSpeech:
    """An example, and where it stands in its stream's part of a batch."""

    example: Any  # a ``SpeechExample``, or another with ``mel`` and ``name``
    row: int
    begin: int  # block of the row
    number: int  # utterance of the row


class SpeechPart:
    """A stream's part of a batch in the making."""

    def __init__(self, budget: SpeechBudget, block_size: int) -> None:
        self.placed: list[PlacedSpeech] = []
        self._budget = budget
        self._block_size = block_size
        # used so far, in each row
        self._blocks = [0] * budget.rows
        self._utterances = [0] * budget.rows

    @property
    def full(self) -> bool:
        for blocks, utterances in zip(self._blocks, self._utterances, strict=True):
            if blocks < self._budget.blocks and utterances < self._budget.utterances:
                return False
        return True

    @property
    def names(self) -> list[str]:
        """Of the rows whose examples were placed."""
        return [placed.example.name for placed in self.placed]

    def place(self, example: Any, row: int | None = None) -> bool:
        """Puts an example into a row; False if it does not fit.

        Args:
          example: it.
          row: which; None: the fullest that it fits in.
        """
        rows = self.rows_with_room(example)
        if row is None:
            row = next(iter(rows), None)
        if row not in rows:
            return False
        assert row is not None
        self.placed.append(PlacedSpeech(example, row, self._blocks[row], self._utterances[row]))
        self._blocks[row] += self._num_blocks(example)
        self._utterances[row] += 1
        return True

    def rows_with_room(self, example: Any) -> list[int]:
        """The rows that an example fits in, the fullest first."""
        num_blocks = self._num_blocks(example)
        fitting = []
        for row, used in enumerate(self._blocks):
            if used + num_blocks <= self._budget.blocks and self._utterances[row] < self._budget.utterances:
                fitting.append(row)
        return sorted(fitting, key=lambda row: -self._blocks[row])

    def _num_blocks(self, example: Any) -> int:
        return -(-len(example.mel) // self._block_size)


@dataclass(frozen=True)
class SpeechPacking:
    """Utterances into ``SpeechBatch``.

    Attributes:
      prepare: reads rows.
      budget: of one stream.
      config: of the DiT.
    """

    prepare: PrepareSpeech
    budget: SpeechBudget
    config: DiTConfig

    def new_part(self) -> SpeechPart:
        return SpeechPart(self.budget, self.config.block_size)

    def assemble(self, parts: Sequence[SpeechPart], *, first: int, streams: int) -> SpeechBatch:
        """The batch of a process; nothing in it depends on which streams these are."""
        batch = make_empty_batch(self.config, self.budget, len(parts) * self.budget.rows)
        for number, part in enumerate(parts):
            for placed in part.placed:
                _write(batch, self.config, placed, number * self.budget.rows + placed.row)
        return batch

    def measure_fill(self, batch: SpeechBatch) -> dict[str, float]:
        return {
            "utterances": float((np.asarray(batch.length) > 0).sum()),
            "frames": float(np.asarray(batch.length).sum() / np.prod(batch.codes.shape)),
        }


def make_empty_batch(config: DiTConfig, budget: SpeechBudget, num_rows: int) -> SpeechBatch:
    """Rows of padding."""
    blocks = (num_rows, budget.blocks)
    frames = (*blocks, config.block_size)
    utterances = (num_rows, budget.utterances)
    return SpeechBatch(
        codes=np.zeros(frames, np.int32),
        mel=np.zeros((*frames, config.mel_dim), np.float32),
        utterance=np.full(blocks, NO_UTTERANCE, np.int32),
        begin=np.zeros(utterances, np.int32),
        length=np.zeros(utterances, np.int32),
        speaker=np.zeros((*utterances, config.enc_emb_dim), np.float32),
        clip=np.zeros((*utterances, budget.clip_frames, config.mel_dim), np.float32),
        clip_length=np.zeros(utterances, np.int32),
    )


def _write(batch: SpeechBatch, config: DiTConfig, placed: PlacedSpeech, row: int) -> None:
    """Copies an example to its place."""
    example = placed.example
    num_frames = len(example.mel)
    blocks = slice(placed.begin, placed.begin - (-num_frames // config.block_size))
    # blocks lie one behind the other, so each reshape is a view, and writing to it fills them
    codes = batch.codes[row, blocks].reshape(-1)
    codes[:num_frames] = np.repeat(example.codes, config.repeats)
    mel = batch.mel[row, blocks].reshape(-1, config.mel_dim)
    mel[:num_frames] = example.mel
    batch.utterance[row, blocks] = placed.number
    place = (row, placed.number)
    batch.begin[place] = placed.begin
    batch.length[place] = num_frames
    batch.speaker[place] = example.speaker
    batch.clip[place][: len(example.clip)] = example.clip
    batch.clip_length[place] = len(example.clip)
