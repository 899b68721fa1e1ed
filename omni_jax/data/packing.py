"""Examples into batches of fixed shapes: rows of text, blocks of sound and canvases of windows, each with its budget.

Nothing is truncated and nothing leaks: an example's tokens attend to each other alone (segment ids), its position ids
start at 0, and the patches of a frame attend to those of their own frame alone. So an example has the loss and the
gradient that it has alone.

Letters as in ``omni_jax.batch``: B rows, S text positions, N spans, A audio blocks, F canvases, W windows of a canvas,
P patches of a window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.typing import DTypeLike

from omni_jax.batch import NO_FEATURE, PADDING, AudioBlocks, OmniBatch, Spans, TrainBatch, VisionFrames
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Example, Prepare
from omni_jax.errors import InputError
from omni_jax.processing.media_workers import isolate
from omni_jax.processing.processor import Processor


class CanvasPlace(NamedTuple):
    """Where a frame lies."""

    canvas: int
    window: int  # the first of its own


@dataclass(frozen=True)
class Budget:
    """What a stream may put into a step."""

    rows: int
    tokens: int  # in a row
    spans: int  # in a row
    blocks: int
    canvases: int
    windows: int  # on a canvas

    @classmethod
    def of(cls, config: DataConfig) -> Budget:
        """The budget of one stream."""
        # budgets of media are given for a row, and the rows of a stream share theirs
        rows = config.rows // config.streams
        return cls(
            rows=rows,
            tokens=config.tokens,
            spans=config.spans,
            blocks=rows * config.audio_blocks,
            canvases=rows * config.canvases,
            windows=config.windows,
        )

    def check(self, example: Example) -> None:
        """Raises InputError if the example would not even fit alone, saying which budget is too small."""
        widest_frame = max(example.windows, default=0)
        _check_budget(len(example.tokens), self.tokens, "tokens", "of a row (data.tokens)")
        _check_budget(example.num_spans, self.spans, "spans of position ids", "of a row (data.spans)")
        _check_budget(
            example.num_blocks, self.blocks, "blocks of two seconds of sound", "of a step (data.audio_blocks)"
        )
        _check_budget(
            widest_frame,
            self.windows,
            "windows in a frame",
            "of a canvas (data.windows); make pictures smaller with data.max_pixels, videos with data.video_max_pixels",
        )
        # each frame fits on a canvas; whether all of them fit together shows when they are placed
        if _place_frames(example.windows, [0] * self.canvases, self.windows) is None:
            raise InputError(
                f"it takes {len(example.windows)} frames of up to {widest_frame} windows, more than fit on "
                f"{self.canvases} canvases of {self.windows} (data.canvases, data.windows); see data.fps and "
                "data.video_max_pixels too"
            )


def _check_budget(needed: int, limit: int, what: str, where: str) -> None:
    if needed > limit:
        raise InputError(f"it takes {needed} {what}, over the {limit} {where}")


def _place_frames(windows: Sequence[int] | np.ndarray, used: list[int], capacity: int) -> list[CanvasPlace] | None:
    """The first canvas with enough free windows for each frame; None if a frame finds none.

    Args:
      windows: of each frame.
      used: windows of each canvas that are taken; those of the frames are added.
      capacity: windows of a canvas.
    """
    places = []
    for needed in windows:
        canvas = _find_canvas(needed, used, capacity)
        if canvas is None:
            return None
        places.append(CanvasPlace(canvas, used[canvas]))
        used[canvas] += int(needed)
    return places


def _find_canvas(needed: int, used: Sequence[int], capacity: int) -> int | None:
    """The first canvas with ``needed`` free windows."""
    for i, taken in enumerate(used):
        if taken + needed <= capacity:
            return i
    return None


@dataclass(frozen=True)
class PlacedExample:
    """An example, and where it stands in its stream's part of a batch."""

    example: Example
    row: int
    begin: int  # position in the row
    span: int  # first of its own in the row's table
    segment: int  # id
    block: int  # first of its own
    frames: Sequence[CanvasPlace]


class Part:
    """A stream's part of a batch in the making."""

    def __init__(self, budget: Budget) -> None:
        self.placed: list[PlacedExample] = []
        self._budget = budget
        # used so far, in each row
        self._tokens = [0] * budget.rows
        self._spans = [0] * budget.rows
        self._segments = [0] * budget.rows
        # used so far, in all rows together
        self._blocks = 0
        self._windows = [0] * budget.canvases

    @property
    def full(self) -> bool:
        return all(used == self._budget.tokens for used in self._tokens)

    @property
    def names(self) -> list[str]:
        """Of the rows whose examples were placed."""
        return [placed.example.name for placed in self.placed]

    def place(self, example: Example, row: int | None = None) -> bool:
        """Puts an example into a row; False if it does not fit, or its media do not.

        Args:
          example: it.
          row: which; None: the fullest that it fits in, for the emptier ones are left to longer examples.
        """
        # a copy, so that an example that does not fit leaves nothing behind
        windows = self._windows.copy()
        frames = _place_frames(example.windows, windows, self._budget.windows)
        rows = self.rows_with_room([example])
        if row is None:
            row = next(iter(rows), None)
        if row not in rows or frames is None or self._blocks + example.num_blocks > self._budget.blocks:
            return False
        assert row is not None

        # segments of a row count from 1; 0 is padding
        self._segments[row] += 1
        self.placed.append(
            PlacedExample(
                example,
                row=row,
                begin=self._tokens[row],
                span=self._spans[row],
                segment=self._segments[row],
                block=self._blocks,
                frames=frames,
            )
        )
        self._tokens[row] += len(example.tokens)
        self._spans[row] += example.num_spans
        self._blocks += example.num_blocks
        self._windows = windows
        return True

    def rows_with_room(self, examples: Sequence[Example]) -> list[int]:
        """The rows with room for the tokens and spans of some examples together, the fullest first."""
        num_tokens = sum(len(example.tokens) for example in examples)
        num_spans = sum(example.num_spans for example in examples)
        fitting = []
        for row, (tokens, spans) in enumerate(zip(self._tokens, self._spans, strict=True)):
            if tokens + num_tokens <= self._budget.tokens and spans + num_spans <= self._budget.spans:
                fitting.append(row)
        return sorted(fitting, key=lambda row: -self._tokens[row])


def assemble(
    parts: Sequence[Part],
    budget: Budget,
    config: OmniConfig,
    *,
    first: int,
    streams: int,
    media_dtype: DTypeLike = np.float32,
) -> TrainBatch:
    """Writes the batch of a process.

    Args:
      parts: of its streams, in order.
      budget: of each of them.
      config: gives the sizes of blocks and windows.
      first: number of the first of its streams.
      streams: of all processes; their batches make up the batch of a step, one after the other on the leading axis,
        and ``media_index`` counts the features of all of them.
      media_dtype: of mel frames and patches. The encoders begin by rounding these to their own dtype, so rounding them
        here changes no number and ships half as much.
    """
    # the parts come one after the other on every leading axis: rows, blocks and canvases
    num_parts = len(parts)
    text = _TextArrays.create((num_parts * budget.rows, budget.tokens), budget.spans, config)
    examples = [placed.example for part in parts for placed in part.placed]
    has_sound = any(example.audio is not None for example in examples)
    has_frames = any(len(example.windows) > 0 for example in examples)
    blocks = _empty_blocks(num_parts * budget.blocks, config, media_dtype, has_sound)
    canvases = _Canvases.create((num_parts * budget.canvases, budget.windows), config, media_dtype, has_frames)
    features = _FeatureCounter(budget, config, streams)
    for i, part in enumerate(parts):
        # places in the arrays count from the first stream of this process, features from the first of all
        stream = first + i
        for placed in part.placed:
            _copy_blocks(blocks, placed.example, i * budget.blocks + placed.block)
            canvases.write(placed, i * budget.canvases)
            text.write(placed, i * budget.rows + placed.row, features.unit_starts(placed, stream))
    # without a budget there is no array, and so no encoder in the compiled step
    audio = blocks if budget.blocks else None
    vision = (canvases.frames,) if budget.canvases else ()
    inputs = OmniBatch(text.tokens, text.segment_ids, text.media_index, text.spans, audio, vision)
    return TrainBatch(inputs, text.targets, text.weights, text.source)


def processor_of_rows(config: DataConfig, processor: Processor, num_workers: int) -> Processor:
    """A processor with the sizes of media, and the access to them, that a configuration gives to rows.

    Args:
      config: it.
      processor: of the model.
      num_workers: processes that decode media, where the configuration isolates them.
    """
    processor = processor.with_pixels(**config.pixels).with_access(config.access)
    return isolate(processor, num_workers) if config.isolate_media else processor


@dataclass(frozen=True)
class OmniPacking:
    """Documents and dialogues into ``TrainBatch``.

    Attributes:
      prepare: reads rows.
      budget: of one stream.
      config: of the model.
      media_dtype: that its encoders compute in.
    """

    prepare: Prepare
    budget: Budget
    config: OmniConfig
    media_dtype: DTypeLike = np.float32

    @classmethod
    def create(
        cls, config: DataConfig, processor: Processor, num_streams: int, media_dtype: DTypeLike = np.float32
    ) -> OmniPacking:
        """With the budgets and the media of a configuration.

        Args:
          config: it.
          processor: reads the rows; from where it may fetch media, ``config`` says.
          num_streams: of this process.
          media_dtype: that the model's encoders compute in.
        """
        budget = Budget.of(config)
        processor = processor_of_rows(config, processor, max(config.workers, 1) * num_streams)
        prepare = Prepare(
            processor, config.tokens, budget.check, config.use_audio_in_video, config.media_root, config.too_long
        )
        return cls(prepare, budget, processor.config, media_dtype)

    def new_part(self) -> Part:
        return Part(self.budget)

    def assemble(self, parts: Sequence[Part], *, first: int, streams: int) -> TrainBatch:
        return assemble(parts, self.budget, self.config, first=first, streams=streams, media_dtype=self.media_dtype)

    def measure_fill(self, batch: TrainBatch) -> dict[str, float]:
        return dataclasses.asdict(fill(batch))


@dataclass(frozen=True)
class _FeatureCounter:
    """Counts the features of the batch of a step: first of the blocks of all streams, then of all their canvases."""

    budget: Budget
    config: OmniConfig
    streams: int

    def unit_starts(self, placed: PlacedExample, stream: int) -> np.ndarray:
        """Index of the first feature of each unit of an example: of its blocks, then of its frames. [units]"""
        c = self.config.thinker_config
        per_block = c.audio_config.block_tokens
        per_window = c.vision_config.window_cells**2
        # numbers of the blocks and of each frame's first window, counted over all streams
        blocks = np.arange(placed.example.num_blocks) + stream * self.budget.blocks + placed.block  # [blocks]
        windows = np.zeros(len(placed.frames), np.int64)  # [frames]
        for i, place in enumerate(placed.frames):
            canvas = stream * self.budget.canvases + place.canvas
            windows[i] = canvas * self.budget.windows + place.window
        # padding has features too, so the blocks of all streams count in full
        num_audio_features = self.streams * self.budget.blocks * per_block
        return np.concatenate([blocks * per_block, num_audio_features + windows * per_window])


@dataclass(frozen=True)
class _TextArrays:
    """The rows of text of a batch in the making."""

    tokens: np.ndarray  # [B, S], as all but ``spans``
    segment_ids: np.ndarray
    media_index: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    source: np.ndarray
    spans: Spans  # [B, N]

    @classmethod
    def create(cls, shape: tuple[int, int], num_spans: int, config: OmniConfig) -> _TextArrays:
        """Padding alone."""
        num_rows, length = shape
        pad_token = config.thinker_config.pad_token_id
        return cls(
            tokens=np.full(shape, pad_token, np.int32),
            segment_ids=np.full(shape, PADDING, np.int32),
            media_index=np.full(shape, NO_FEATURE, np.int32),
            targets=np.full(shape, pad_token, np.int32),
            weights=np.zeros(shape, np.float32),
            source=np.zeros(shape, np.int32),
            spans=empty_spans(num_rows, num_spans, length),
        )

    def write(self, placed: PlacedExample, row: int, unit_starts: np.ndarray) -> None:
        """Writes an example; ``unit_starts`` is the index of the first feature of each of its units."""
        example = placed.example
        end = placed.begin + len(example.tokens)
        own = (row, slice(placed.begin, end))
        self.tokens[own] = example.tokens
        self.segment_ids[own] = placed.segment
        self.source[own] = example.source
        # a slice is a view, which the mask then writes through
        has_feature = example.unit != NO_FEATURE  # [T]
        self.media_index[own][has_feature] = unit_starts[example.unit[has_feature]] + example.feature[has_feature]

        # a position predicts the token after it; the last token of an example predicts nothing
        predicting = (row, slice(placed.begin, end - 1))
        self.targets[predicting] = example.tokens[1:]
        self.weights[predicting] = example.weights[1:]

        copy_spans(self.spans, row, placed.span, example.spans, example.num_spans, placed.begin)


def empty_spans(num_rows: int, num_spans: int, length: int) -> Spans:
    """A table of spans, to be written, of rows of so many positions."""
    table = (num_rows, num_spans)
    return Spans(
        # a span that is not used begins after the last position, so that no position is in it
        begin=np.full(table, length, np.int32),
        start=np.zeros(table, np.int32),
        height=np.zeros(table, np.int32),
        width=np.zeros(table, np.int32),
        skip=np.zeros(table, np.int32),
        seconds=np.zeros(table, np.float32),
    )


def copy_spans(target: Spans, row: int, first: int, spans: Spans, count: int, begin: int) -> None:
    """Writes the first ``count`` spans of one row into the table of a batch.

    Args:
      target: the table.
      row: of it.
      first: column of it.
      spans: of a row alone, which begins at 0.
      count: how many of them.
      begin: position in ``row`` that they begin at instead.
    """
    own = (row, slice(first, first + count))
    # position ids count from the first token, so only the place of a span moves
    for name in ("start", "height", "width", "skip", "seconds"):
        getattr(target, name)[own] = getattr(spans, name)[0, :count]
    np.asarray(target.begin)[own] = spans.begin[0, :count] + begin


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, is_written: bool) -> np.ndarray:
    """Zeros to write into; or else a single one that is repeated, which ``is_repeated`` knows."""
    return np.zeros(shape, dtype) if is_written else np.broadcast_to(np.zeros((), dtype), shape)


def is_repeated(array: np.ndarray) -> bool:
    """Whether an array is one number in every place, and takes the memory of one."""
    return array.ndim > 0 and not any(array.strides)


def _empty_blocks(num_blocks: int, config: OmniConfig, dtype: DTypeLike, is_written: bool) -> AudioBlocks:
    sizes = config.thinker_config.audio_config
    mel = _zeros((num_blocks, sizes.block_frames, sizes.num_mel_bins), dtype, is_written)  # [A, T, M]
    # a block of length 0 is padding
    return AudioBlocks(mel, np.zeros(num_blocks, np.int32))


def _copy_blocks(blocks: AudioBlocks, example: Example, begin: int) -> None:
    if example.audio is None:
        return
    own = slice(begin, begin + example.num_blocks)
    np.asarray(blocks.mel)[own] = example.audio.mel
    np.asarray(blocks.length)[own] = example.audio.length


@dataclass(frozen=True)
class _Canvases:
    """The canvases of a batch in the making."""

    frames: VisionFrames
    num_frames: np.ndarray  # on each canvas so far

    @classmethod
    def create(cls, shape: tuple[int, int], config: OmniConfig, dtype: DTypeLike, is_written: bool) -> _Canvases:
        """Canvases of ``shape`` (canvases, windows) without frames; ``is_written``: whether any will come."""
        sizes = config.thinker_config.vision_config
        flat = (*shape, (sizes.window_cells * sizes.spatial_merge_size) ** 2)  # [F, W, P]
        frames = VisionFrames(
            patches=_zeros((*flat, sizes.patch_dim), dtype, is_written),
            row=_zeros(flat, np.int32, is_written),
            column=_zeros(flat, np.int32, is_written),
            valid=_zeros(flat, np.int32, is_written),
        )
        return cls(frames, np.zeros(shape[0], np.int32))

    def write(self, placed: PlacedExample, first_canvas: int) -> None:
        """Copies each frame to its place, numbering the frames of a canvas from 1."""
        sources = placed.example.frames()
        for source, place, num_windows in zip(sources, placed.frames, placed.example.windows, strict=True):
            canvas = first_canvas + place.canvas
            self.num_frames[canvas] += 1
            own = (canvas, slice(place.window, place.window + num_windows))
            # a frame of a group of larger ones ends in windows of padding, which are not copied
            for name in ("patches", "row", "column"):
                getattr(self.frames, name)[own] = getattr(source, name)[:num_windows]
            # ``valid`` is a bool in an example and the number of the frame on a canvas; patches of padding stay 0
            np.asarray(self.frames.valid)[own] = source.valid[:num_windows] * self.num_frames[canvas]


@dataclass(frozen=True)
class Fill:
    """How much of a batch is real: how many examples, and of everything else a share from 0 to 1."""

    examples: int
    tokens: float
    target_tokens: float  # positions with a loss
    audio_blocks: float
    windows: float
    patches: float


def fill(batch: TrainBatch) -> Fill:
    """Measures a batch of numpy arrays."""
    segment_ids = np.asarray(batch.inputs.segment_ids)  # [B, S]
    audio = batch.inputs.audio
    vision = batch.inputs.vision
    has_patch = np.asarray(vision[0].valid) > 0 if vision else np.zeros((1, 1, 1), bool)  # [F, W, P]
    return Fill(
        # segments count from 1 in each row, so the largest id is their number
        examples=int(segment_ids.max(axis=1).sum()),
        tokens=float((segment_ids != PADDING).mean()),
        target_tokens=float((np.asarray(batch.weights) > 0).mean()),
        audio_blocks=0.0 if audio is None else float((np.asarray(audio.length) > 0).mean()),
        windows=float(has_patch.any(-1).mean()),
        patches=float(has_patch.mean()),
    )
