"""Stretches of sound into batches of fixed shapes, one in each row.

Letters: B rows, S frames of a segment, W frames of a row (2 S - 1 and the context on either side), M mel bins,
N samples of a row without the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flax import struct
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.data.segment_examples import FRAME_SAMPLES, PrepareSegments, SegmentExample
from omni_jax.data.single_packing import SinglePart


@struct.dataclass
class SegmentBatch:
    """Sound out of which a segment is cut; zeros behind its end."""

    mel: Float[Array, "B W M"] = struct.field(metadata={"logical_axes": ("batch", None, None)})
    samples: Float[Array, "B N"] = struct.field(metadata={"logical_axes": ("batch", None)})
    # frames at which a segment can begin, from the first that is no context on; 0 in a row of padding
    places: Int[Array, " B"] = struct.field(metadata={"logical_axes": ("batch",)})


@dataclass(frozen=True)
class SegmentPacking:
    """Sound into ``SegmentBatch``.

    Attributes:
      prepare: reads rows.
      rows: of a stream's part of a batch.
      mel_dim: mel bins.
    """

    prepare: PrepareSegments
    rows: int
    mel_dim: int

    def new_part(self) -> SinglePart[SegmentExample]:
        return SinglePart(self.rows)

    def assemble(self, parts: Sequence[SinglePart[SegmentExample]], *, first: int, streams: int) -> SegmentBatch:
        """The batch of a process; nothing in it depends on which streams these are."""
        prepare = self.prepare
        batch = make_empty_batch(len(parts) * self.rows, prepare.segment, prepare.context, self.mel_dim)
        for number, part in enumerate(parts):
            for row, example in enumerate(part.examples, start=number * self.rows):
                batch.mel[row, : len(example.mel)] = example.mel
                batch.samples[row, : len(example.samples)] = example.samples
                batch.places[row] = example.places
        return batch

    def measure_fill(self, batch: SegmentBatch) -> dict[str, float]:
        return {"segments": float((np.asarray(batch.places) > 0).sum())}


def make_empty_batch(num_rows: int, segment: int, context: int, mel_dim: int) -> SegmentBatch:
    """Rows of padding."""
    # a segment can begin at no more places than it has frames
    num_frames = 2 * segment - 1
    return SegmentBatch(
        mel=np.zeros((num_rows, num_frames + 2 * context, mel_dim), np.float32),
        samples=np.zeros((num_rows, num_frames * FRAME_SAMPLES), np.float32),
        places=np.zeros(num_rows, np.int32),
    )
