"""Examples into batches of fixed shapes: rows of text, blocks of sound and canvases of windows, each with its budget.

Nothing is cut and nothing leaks: an example's tokens see each other alone (segment ids), its position ids start at 0,
and its frames see themselves alone on a canvas. So it has the loss and the gradient that it has alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from omni_jax.batch import PADDING, AudioBlocks, OmniBatch, Spans, TrainBatch, VisionFrames
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Example
from omni_jax.errors import InputError


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
        """The share of one stream."""
        rows = config.rows // config.streams
        media = rows * config.audio_blocks, rows * config.canvases
        return cls(rows, config.tokens, config.spans, *media, config.windows)

    def check(self, example: Example) -> None:
        """Raises InputError if the example would not even fit alone, saying which budget is too small."""
        spans, frames = example.spans.begin.shape[1], len(example.windows)
        for needed, limit, what in (
            (len(example.tokens), self.tokens, "tokens, over the {} of a row (data.tokens)"),
            (spans, self.spans, "runs of position ids, over the {} of a row (data.spans)"),
            (example.blocks, self.blocks, "blocks of two seconds of sound, over the {} of a step (data.audio_blocks)"),
            (max(example.windows, default=0), self.windows, "windows in a frame, over the {} of a canvas "
             "(data.windows); make pictures smaller with data.max_pixels, videos with data.video_max_pixels"),
        ):  # fmt: skip
            if needed > limit:
                raise InputError(f"it takes {needed} {what.format(limit)}")
        if _place_frames(example.windows, [self.windows] * self.canvases) is None:
            raise InputError(
                f"it takes {frames} frames of up to {max(example.windows)} windows, more than fit on {self.canvases} "
                f"canvases of {self.windows} (data.canvases, data.windows); see data.fps and data.video_max_pixels too"
            )


def _place_frames(windows: Sequence[int] | np.ndarray, room: list[int]) -> list[tuple[int, int]] | None:
    """The first canvas with room for each frame, and the room it had; None if one finds none.

    ``room`` is changed to what is left.
    """
    places = []
    for needed in windows:
        canvas = next((i for i, left in enumerate(room) if left >= needed), None)
        if canvas is None:
            return None
        places.append((canvas, room[canvas]))
        room[canvas] -= int(needed)
    return places


@dataclass(frozen=True)
class Placed:
    """An example, and where it stands in its stream's part of a batch."""

    example: Example
    row: int
    begin: int  # position in the row
    span: int  # in the row's table
    segment: int  # id
    block: int  # first of its own
    canvases: Sequence[tuple[int, int]]  # of each frame: the canvas, and its first window there


class Part:
    """A stream's part of a batch in the making."""

    def __init__(self, budget: Budget) -> None:
        self.placed: list[Placed] = []
        self._budget = budget
        self._tokens, self._spans = [0] * budget.rows, [0] * budget.rows  # used in each row
        self._segments = [0] * budget.rows
        self._blocks = 0
        self._room = [budget.windows] * budget.canvases

    @property
    def full(self) -> bool:
        return all(used == self._budget.tokens for used in self._tokens)

    def place(self, example: Example) -> bool:
        """Puts an example into the fullest row that it fits in; False if it fits in none, or its media do not."""
        budget, length, spans = self._budget, len(example.tokens), example.spans.begin.shape[1]
        fitting = [
            i
            for i in range(budget.rows)
            if self._tokens[i] + length <= budget.tokens and self._spans[i] + spans <= budget.spans
        ]
        room = self._room.copy()
        canvases = _place_frames(example.windows, room)
        if not fitting or canvases is None or self._blocks + example.blocks > budget.blocks:
            return False
        row = max(fitting, key=lambda i: self._tokens[i])
        self._segments[row] += 1
        first = [(canvas, budget.windows - left) for canvas, left in canvases]
        self.placed.append(
            Placed(example, row, self._tokens[row], self._spans[row], self._segments[row], self._blocks, first)
        )
        self._tokens[row] += length
        self._spans[row] += spans
        self._blocks += example.blocks
        self._room = room
        return True


def assemble(parts: Sequence[Part], budget: Budget, config: OmniConfig, *, first: int, streams: int) -> TrainBatch:
    """Writes the batch of a process.

    Args:
      parts: of its streams, in order.
      budget: of each of them.
      config: gives the sizes of blocks and windows.
      first: number of the first of its streams.
      streams: of all processes; their batches make up the batch of a step, one after the other on the leading axis,
        and ``media_index`` counts the features of all of them.
    """
    audio, vision = config.thinker_config.audio_config, config.thinker_config.vision_config
    per_canvas = budget.windows * vision.window_cells**2
    sound_of_all = streams * budget.blocks * audio.block_tokens
    shape = (len(parts) * budget.rows, budget.tokens)
    text = _Text.empty(shape, budget.spans, config.thinker_config.pad_token_id)
    blocks = _empty_blocks(len(parts) * budget.blocks, config)
    canvases = _empty_canvases((len(parts) * budget.canvases, budget.windows), config)
    frames_on = np.zeros(len(parts) * budget.canvases, np.int32)
    for i, part in enumerate(parts):
        for placed in part.placed:
            own = placed.block + i * budget.blocks
            _copy_blocks(blocks, placed.example, own)
            on = [(canvas + i * budget.canvases, window) for canvas, window in placed.canvases]
            _copy_frames(canvases, frames_on, placed.example, on)
            begins = [(own + first * budget.blocks + k) * audio.block_tokens for k in range(placed.example.blocks)]
            begins += [
                sound_of_all + (canvas + first * budget.canvases) * per_canvas + window * vision.window_cells**2
                for canvas, window in on
            ]
            text.write(placed, placed.row + i * budget.rows, np.array([*begins, 0]))
    return text.batch(blocks if budget.blocks else None, (canvases,) if budget.canvases else ())


@dataclass(frozen=True)
class _Text:
    """The rows of text of a batch in the making."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    media_index: np.ndarray
    spans: Spans
    targets: np.ndarray
    weights: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, int], spans: int, pad: int) -> _Text:
        rows, length = shape
        table = (rows, spans)
        zeros = [np.zeros(table, np.int32) for _ in range(4)]
        return cls(
            tokens=np.full(shape, pad, np.int32),
            segment_ids=np.full(shape, PADDING, np.int32),
            media_index=np.full(shape, -1, np.int32),
            spans=Spans(np.full(table, length, np.int32), *zeros, seconds=np.zeros(table, np.float32)),
            targets=np.full(shape, pad, np.int32),
            weights=np.zeros(shape, np.float32),
        )

    def write(self, placed: Placed, row: int, begins: np.ndarray) -> None:
        """Writes an example; ``begins`` says where the features of each of its units begin."""
        example = placed.example
        end = placed.begin + len(example.tokens)
        own, before = (row, slice(placed.begin, end)), (row, slice(placed.begin, end - 1))
        self.tokens[own] = example.tokens
        self.segment_ids[own] = placed.segment
        self.media_index[own] = np.where(example.unit < 0, -1, begins[example.unit] + example.feature)
        self.targets[before], self.weights[before] = example.tokens[1:], example.weights[1:]
        runs = (row, slice(placed.span, placed.span + example.spans.begin.shape[1]))
        for name in ("start", "height", "width", "skip", "seconds"):
            getattr(self.spans, name)[runs] = getattr(example.spans, name)[0]
        np.asarray(self.spans.begin)[runs] = example.spans.begin[0] + placed.begin

    def batch(self, audio: AudioBlocks | None, vision: tuple[VisionFrames, ...]) -> TrainBatch:
        inputs = OmniBatch(self.tokens, self.segment_ids, self.media_index, self.spans, audio, vision)
        return TrainBatch(inputs, self.targets, self.weights)


def _empty_blocks(count: int, config: OmniConfig) -> AudioBlocks:
    sizes = config.thinker_config.audio_config
    mel = np.zeros((count, sizes.block_frames, sizes.num_mel_bins), np.float32)
    return AudioBlocks(mel, np.zeros(count, np.int32))


def _empty_canvases(shape: tuple[int, int], config: OmniConfig) -> VisionFrames:
    sizes = config.thinker_config.vision_config
    flat = (*shape, (sizes.window_cells * sizes.spatial_merge_size) ** 2)
    row, column, valid = (np.zeros(flat, np.int32) for _ in range(3))
    return VisionFrames(np.zeros((*flat, sizes.patch_dim), np.float32), row, column, valid)


def _copy_blocks(blocks: AudioBlocks, example: Example, begin: int) -> None:
    if example.audio is not None:
        own = slice(begin, begin + example.blocks)
        np.asarray(blocks.mel)[own], np.asarray(blocks.length)[own] = example.audio.mel, example.audio.length


def _copy_frames(
    canvases: VisionFrames, frames_on: np.ndarray, example: Example, places: Sequence[tuple[int, int]]
) -> None:
    """Copies each frame to its canvas and its first window there, numbering the frames of a canvas from 1."""
    frames = ((group, f) for group in example.vision for f in range(len(group.patches)))
    for (group, f), (canvas, window), count in zip(frames, places, example.windows, strict=True):
        frames_on[canvas] += 1
        own = (canvas, slice(window, window + count))
        for name in ("patches", "row", "column"):
            getattr(canvases, name)[own] = getattr(group, name)[f, :count]
        np.asarray(canvases.valid)[own] = group.valid[f, :count] * frames_on[canvas]


@dataclass(frozen=True)
class Fill:
    """How much of a batch is real: how many examples, and shares from 0 to 1."""

    examples: int
    tokens: float
    learnt: float  # positions with a loss
    audio_blocks: float
    windows: float
    patches: float


def fill(batch: TrainBatch) -> Fill:
    """Counts what a batch of numpy arrays holds."""
    segments, audio, vision = np.asarray(batch.inputs.segment_ids), batch.inputs.audio, batch.inputs.vision
    valid = np.asarray(vision[0].valid) > 0 if vision else np.zeros((1, 1, 1), bool)
    return Fill(
        examples=int(segments.max(axis=1).sum()),
        tokens=float((segments != PADDING).mean()),
        learnt=float((np.asarray(batch.weights) > 0).mean()),
        audio_blocks=0.0 if audio is None else float((np.asarray(audio.length) > 0).mean()),
        windows=float(valid.any(-1).mean()),
        patches=float(valid.mean()),
    )
