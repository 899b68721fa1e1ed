"""Preference pairs of spoken answers: rows to examples with two answers each, and batches of them.

The answers of a pair share the dialogue, so the Thinker reads it once, and its media are encoded once; each answer is
an utterance of the Talker's row.

Letters: B rows, N pairs of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Bool, Float

from omni_jax.batch import Array
from omni_jax.data.rows import row_values
from omni_jax.data.sources import Row
from omni_jax.data.spoken_examples import PrepareSpoken, SpokenExample
from omni_jax.data.spoken_packing import SpokenBatch, SpokenPacking, SpokenPart
from omni_jax.data.spoken_rows import ANSWERS, read_reference


@struct.dataclass
class PairBatch:
    """What one step of preference training is trained on; utterances 2n and 2n + 1 of a row are its n-th pair."""

    spoken: SpokenBatch
    # log-probability of the better and of the other answer by the reference
    reference: Float[Array, "B N 2"] = struct.field(metadata={"logical_axes": ("batch", None, None)})
    is_pair: Bool[Array, "B N"] = struct.field(metadata={"logical_axes": ("batch", None)})  # False: padding


@dataclass(frozen=True)
class PreparePairs(PrepareSpoken):
    """Reads a row and its media.

    Attributes:
      max_length_gap: how many more codes the longer answer may have, as a share of the shorter one's.
      reference: fingerprint of the model whose log-probabilities rows must have; None: none are read.
    """

    max_length_gap: float = 0.5
    reference: str | None = None

    def example(self, row: Row) -> SpokenExample:
        """Of a row.

        Raises:
          InputError: if it is not what it should be.
          TooLongError: if it is longer than a row of the batch.
          WrongCodecError: if its codes are another codec's.
          WrongReferenceError: if its log-probabilities are another model's.
        """
        values = row_values(row)
        speech = self._reader.read_pair(values, self.max_length_gap)
        example = self._make(row, speech)
        if self.reference is None:
            return example
        found = read_reference(values, self.reference)
        return dataclasses.replace(example, reference=found)


@dataclass(frozen=True)
class PairPacking(SpokenPacking):
    """Preference pairs into ``PairBatch``; see ``SpokenPacking``."""

    def assemble(self, parts: Sequence[SpokenPart], *, first: int, streams: int) -> PairBatch:
        spoken = super().assemble(parts, first=first, streams=streams)
        num_pairs = self.budget.utterances // len(ANSWERS)
        shape = (len(spoken.codes), num_pairs)
        reference = np.zeros((*shape, len(ANSWERS)), np.float32)
        is_pair = np.zeros(shape, bool)
        for number, part in enumerate(parts):
            for placed in part.placed:
                place = (number * self.budget.dialogues.rows + placed.row, placed.utterance // len(ANSWERS))
                reference[place] = placed.example.reference
                is_pair[place] = True
        return PairBatch(spoken, reference, is_pair)

    def measure_fill(self, batch: PairBatch) -> dict[str, float]:
        return {**super().measure_fill(batch.spoken), "pairs": float(np.asarray(batch.is_pair).sum())}
