"""OmniBatch: the one value that crosses from data to model, typed and of fixed, bucketed shapes.

Letters: B rows, S text positions, N spans, A audio blocks, T mel frames of a block, M mel bins, F frames of pictures
and videos, W windows of a frame, P patches of a window, C values of a patch.

Leaves are numpy arrays when the host has made them and JAX arrays inside a jitted function. Each field declares the
logical axes of its array (``omni_jax.sharding.RULES``) where it is defined, as a parameter of a model does: axes are
never guessed from shapes, since two of them may have equal sizes.
"""

from __future__ import annotations

import bisect
import dataclasses
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jax.tree_util import GetAttrKey, KeyPath, SequenceKey
from jaxtyping import Bool, Float, Int

Array: TypeAlias = jax.Array | np.ndarray
Tree = TypeVar("Tree")

PADDING = 0  # the segment id of padding
NO_FEATURE = -1  # the media index of a position that takes the embedding of its own token

_AXES = "logical_axes"


def _axes(*names: str | None) -> dict[str, Any]:
    """The metadata of a field: the logical axes of its array; None: an axis that lies in full on every device."""
    return {_AXES: names}


# positions of text may be sharded; blocks and frames are sharded as the rows that they belong to
_TEXT = _axes("batch", "sequence")
_ROWS = _axes("batch")
_ROWS_2D = _axes("batch", None)
_ROWS_3D = _axes("batch", None, None)
_ROWS_4D = _axes("batch", None, None, None)


@struct.dataclass
class Spans:
    """TMRoPE in a small table: each row's runs of tokens whose position ids follow one rule.

    A span with ``height == 0`` counts up from ``start``. Any other span holds merged cells of frames of
    ``height x width``, beginning with cell ``skip`` of its picture or video; the ids of a cell are ``start`` plus its
    time, row and column.
    Unused rows of the table begin at S.
    """

    begin: Int[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # first text position
    start: Int[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # position id that the ids are counted from
    height: Int[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # merged cells in a column of a frame; 0: no picture
    width: Int[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # merged cells in a row of a frame
    skip: Int[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # cells of the video before this span
    seconds: Float[Array, "B N"] = struct.field(metadata=_ROWS_2D)  # from one frame to the next


@struct.dataclass
class AudioBlocks:
    """Sound, cut into blocks of two seconds. Blocks lie on the devices of the rows that they belong to."""

    mel: Float[Array, "A T M"] = struct.field(metadata=_ROWS_3D)  # log-mel, zero after the block's length
    length: Int[Array, " A"] = struct.field(metadata=_ROWS)  # valid mel frames; 0: padding


@struct.dataclass
class VisionFrames:
    """Frames of about one size, each cut into windows; four patches in a row are one merged cell.

    Each of the W entries of a frame holds a whole window, or several of those at its edges, which are smaller. A patch
    attends to those of its window, which follows from ``row`` and ``column``.

    A frame here is what the encoder calls one: ``temporal_patch_size`` pictures deep. In training, where shapes are
    fixed, several small frames share a canvas, each in entries of its own; then ``valid`` numbers the frames of a
    canvas from 1, and patches of equal number attend to each other.
    """

    patches: Float[Array, "F W P C"] = struct.field(metadata=_ROWS_4D)
    row: Int[Array, "F W P"] = struct.field(metadata=_ROWS_3D)  # of the patch in its frame
    column: Int[Array, "F W P"] = struct.field(metadata=_ROWS_3D)
    valid: Bool[Array, "F W P"] | Int[Array, "F W P"] = struct.field(metadata=_ROWS_3D)  # False or 0: padding


@struct.dataclass
class OmniBatch:
    """What the Thinker reads.

    The features that the encoders make stand in one list: the tokens of the audio blocks in order, then the merged
    cells of each group of frames in order. ``media_index`` says which of them a text position takes.
    """

    tokens: Int[Array, "B S"] = struct.field(metadata=_TEXT)
    segment_ids: Int[Array, "B S"] = struct.field(metadata=_TEXT)  # positions of equal id attend to each other
    media_index: Int[Array, "B S"] = struct.field(metadata=_TEXT)  # into the list of features, or NO_FEATURE
    spans: Spans
    audio: AudioBlocks | None = None
    vision: tuple[VisionFrames, ...] = ()

    @property
    def mask(self) -> Bool[Array, "B S"]:
        """True where a token is real."""
        return self.segment_ids != PADDING


@struct.dataclass
class TrainBatch:
    """What one step trains on. Several examples share a row; each is a segment, and its position ids start at 0."""

    inputs: OmniBatch
    targets: Int[Array, "B S"] = struct.field(metadata=_TEXT)  # the next token of the example
    weights: Float[Array, "B S"] = struct.field(metadata=_TEXT)  # of the loss; 0: not a target
    source: Int[Array, "B S"] = struct.field(metadata=_TEXT)  # of the example's row, from 0; 0 where there is padding


def batch_axes(batch: Tree) -> Tree:
    """The logical axes of every array of a batch.

    Args:
      batch: an instance of a dataclass of this module; its leaves may be abstract.

    Returns:
      The same structure with a ``PartitionSpec`` of logical names for each leaf
      (``omni_jax.sharding.logical_sharding`` lays them over a mesh).
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _declared_axes(batch, path), batch)


def _declared_axes(batch: Any, path: KeyPath) -> PartitionSpec:
    # from the batch down to the dataclass that has the array: through fields, and through the groups of frames
    node = batch
    for key in path[:-1]:
        if isinstance(key, SequenceKey):
            node = node[key.idx]
        else:
            assert isinstance(key, GetAttrKey)
            node = getattr(node, key.name)
    assert isinstance(path[-1], GetAttrKey)
    fields = {field.name: field for field in dataclasses.fields(node)}
    return PartitionSpec(*fields[path[-1].name].metadata[_AXES])


# 1, 2, 3, 4, 6, 8, 12, ...: a length is at most a third shorter than its bucket; up to 2**40 units, beyond any length
_BUCKET_LADDER = sorted({1, *(k << i for k in (2, 3) for i in range(40))})


def bucket(n: int, smallest: int = 1) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... times ``smallest`` that is at least ``n``.

    Every length that becomes part of a shape is rounded up by this, so that few shapes are ever compiled; at most a
    third of a bucket is padding.
    """
    if n < 0:
        raise ValueError(f"a length cannot be {n}")
    units = -(-n // smallest)
    return smallest * _BUCKET_LADDER[bisect.bisect_left(_BUCKET_LADDER, units)]


# above 16 the steps are half as large, for large pictures cost the most: 20, 24, 28, 32, 40, ...
_WINDOW_LADDER = [n for n in _BUCKET_LADDER if n < 16] + [k << i for i in range(2, 40) for k in (4, 5, 6, 7)]


def bucket_windows(n: int) -> int:
    """The size that the windows of a frame are rounded up to; above 16 at most a fifth of it is padding."""
    return _WINDOW_LADDER[bisect.bisect_left(_WINDOW_LADDER, n)]
