"""OmniBatch: the one value that crosses from data to model, typed and of fixed, bucketed shapes.

Letters: B rows, S text positions, N spans, A audio blocks, F frames (of pictures and videos), W windows a frame,
P patches a window, C numbers a patch, T mel frames a block, M mel bins.

Leaves are numpy arrays when the host has made them and JAX arrays inside a jitted function.
"""

from __future__ import annotations

import bisect
from typing import TypeAlias

import jax
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array | np.ndarray

PADDING = 0  # the segment id of a position that holds nothing


@struct.dataclass
class Spans:
    """TMRoPE in a small table: each row's runs of tokens whose position ids follow one rule.

    A run with ``height == 0`` counts up from ``start``. Any other run holds the cells of frames ``height x width``,
    the first of them the ``skip``-th cell of its picture or video; a cell's ids are ``start`` plus its time, row and
    column.
    Unused rows of the table begin at S.
    """

    begin: Int[Array, "B N"]  # first text position of the run
    start: Int[Array, "B N"]  # position id that the run starts from
    height: Int[Array, "B N"]  # merged cells in a column of a frame; 0: no picture
    width: Int[Array, "B N"]  # merged cells in a row of a frame
    skip: Int[Array, "B N"]  # cells of the video that came before this run
    seconds: Float[Array, "B N"]  # time from one frame to the next


@struct.dataclass
class AudioBlocks:
    """Sound, cut into blocks of two seconds."""

    mel: Float[Array, "A T M"]  # log-mel, zero after the block's length
    length: Int[Array, " A"]  # valid mel frames of each block; 0: the block holds nothing


@struct.dataclass
class VisionFrames:
    """Frames of about one size, each cut into windows; four patches in a row are one merged cell.

    A frame here is what the encoder calls one: ``temporal_patch_size`` pictures deep. In training, where shapes are
    fixed, small frames share a row of windows, a canvas; then ``valid`` numbers the frames of a canvas from 1, and
    patches of equal number see each other.
    """

    patches: Float[Array, "F W P C"]
    row: Int[Array, "F W P"]  # of the patch in its frame
    column: Int[Array, "F W P"]
    valid: Bool[Array, "F W P"] | Int[Array, "F W P"]  # False or 0: nothing


@struct.dataclass
class OmniBatch:
    """What the Thinker reads.

    The features that the encoders make stand in one list: the audio blocks' tokens in order, then each group of
    frames' merged cells in order. ``media_index`` says which of them a text position takes.
    """

    tokens: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]  # 0: padding; positions of equal id see each other
    media_index: Int[Array, "B S"]  # into the list of features; -1: the token's own embedding
    spans: Spans
    audio: AudioBlocks | None = None
    vision: tuple[VisionFrames, ...] = ()

    @property
    def mask(self) -> Bool[Array, "B S"]:
        """True where a token is real."""
        return self.segment_ids != PADDING


@struct.dataclass
class TrainBatch:
    """What one step learns from. Several examples share a row; each is a segment, and its position ids start at 0."""

    inputs: OmniBatch
    targets: Int[Array, "B S"]  # the next token of the example
    weights: Float[Array, "B S"]  # of the loss at a position; 0: nothing is learnt there


def bucket(n: int, smallest: int = 1) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... times ``smallest`` that is at least ``n``.

    Every length that becomes part of a shape is rounded up by this, so that few shapes are ever compiled; at most a
    third of a bucket is padding.
    """
    if n < 0:
        raise ValueError(f"a length cannot be {n}")
    ladder = sorted({1, *(k << i for k in (2, 3) for i in range(40))})
    units = -(-n // smallest)
    return smallest * ladder[bisect.bisect_left(ladder, units)]
