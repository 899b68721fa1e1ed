"""TMRoPE, the time-aligned position ids of Qwen2.5-Omni (paper section 2.2; reference ``get_rope_index``).

Every token has three ids: time, height and width. Text and sound count up on all three at once, one id each 40 ms
of sound. A picture's cells share one time and carry their row and column. A video's cells carry the time of their
frame, and a video with its sound is interleaved, two seconds of picture, then two of sound.

The host describes a row as segments (``Text``, ``Grid``, ``Interleaved``), resolves them to a table of spans, and a
jitted function expands the table to ids. Every quirk of the reference is kept, since the released weights learnt them:

* the id after a segment follows the maximum of *that segment*, not of all that came before;
* the chunk counter of the interleave moves once a split, so a grid over two seconds long drifts and splits in a frame;
* the two begin tokens of a video with sound share one id, and so do its two end tokens;
* padding has id 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from omni_jax.batch import Array, Spans, bucket
from omni_jax.config import ThinkerConfig


@dataclass(frozen=True)
class Text:
    """Tokens that count up one by one: text, begin and end marks, sound that stands alone."""

    length: int


@dataclass(frozen=True)
class Grid:
    """A picture (one frame) or a video without sound, in merged cells; its marks are text."""

    frames: int
    height: int
    width: int
    seconds: float = 1.0  # from one frame to the next

    @property
    def length(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Interleaved:
    """A video with its sound, and the two begin and two end marks around them."""

    grid: Grid
    audio: int  # tokens of sound

    @property
    def length(self) -> int:
        return self.grid.length + self.audio + 4


Segment: TypeAlias = Text | Grid | Interleaved


@dataclass(frozen=True)
class Chunk:
    """A stretch of an interleaved video: tokens ``begin`` to ``end`` of its picture or of its sound."""

    is_audio: bool
    begin: int
    end: int


def _chunks(times: Sequence[int], step: int) -> list[tuple[int, int]]:
    """Splits a rising list of times about every ``step`` (reference ``get_chunked_index``)."""
    out, begin, counter = [], 0, 1
    for i, time in enumerate(times):
        if time >= counter * step:
            out.append((begin, i))
            begin = i
            counter += 1
    return [*out, (begin, len(times))]


def _frame_times(grid: Grid, ids_per_second: int) -> np.ndarray:
    """The time id of each frame, rounded as the reference rounds: float32, left to right, cut off. [frames]"""
    times = np.arange(grid.frames, dtype=np.float32) * np.float32(grid.seconds) * np.float32(ids_per_second)
    return times.astype(np.int32)


def interleave(segment: Interleaved, config: ThinkerConfig) -> list[Chunk]:
    """The order of a video's picture and sound tokens, used for the tokens and for their ids alike."""
    cells = segment.grid.height * segment.grid.width
    times = np.repeat(_frame_times(segment.grid, config.position_id_per_seconds), cells)
    video = _chunks(times.tolist(), config.chunk_ids)
    audio = _chunks(range(segment.audio), config.chunk_ids)
    order = []
    for i in range(max(len(video), len(audio))):
        order += [Chunk(False, *video[i])] if i < len(video) else []
        order += [Chunk(True, *audio[i])] if i < len(audio) else []
    return [chunk for chunk in order if chunk.end > chunk.begin]


@dataclass(frozen=True)
class Span:
    """One row of the table of ``omni_jax.batch.Spans``, before it is padded and stacked."""

    begin: int
    start: int
    height: int = 0
    width: int = 0
    skip: int = 0
    seconds: float = 0.0


def resolve(segments: Iterable[Segment], config: ThinkerConfig, begin: int = 0, start: int = 0) -> list[Span]:
    """Resolves segments to spans.

    Args:
      segments: in the order of their tokens.
      config: gives the ids a second and the length of a chunk.
      begin: text position of the first token.
      start: position id of the first token; a dialogue that goes on passes the next free id.
    """
    spans: list[Span] = []
    for segment in segments:
        if isinstance(segment, Text):
            if segment.length:
                spans.append(Span(begin, start))
                start += segment.length
        elif isinstance(segment, Grid):
            spans.append(_grid_span(segment, begin, start, 0))
            start = _after(segment, start, 0, segment.length, config)
        else:
            inner, start = _resolve_interleaved(segment, config, begin, start)
            spans += inner
        begin += segment.length
    return spans


def _grid_span(grid: Grid, begin: int, start: int, skip: int) -> Span:
    return Span(begin, start, grid.height, grid.width, skip, grid.seconds)


def _after(grid: Grid, start: int, first: int, end: int, config: ThinkerConfig) -> int:
    """The id after cells ``first`` to ``end`` of a grid that starts at ``start``: their own maximum and one."""
    cell = np.arange(first, end)
    within = cell % (grid.height * grid.width)
    time = _frame_times(grid, config.position_id_per_seconds)[cell[-1] // (grid.height * grid.width)]
    return start + 1 + int(max(time, (within // grid.width).max(), (within % grid.width).max()))


def _resolve_interleaved(segment: Interleaved, config: ThinkerConfig, begin: int, start: int) -> tuple[list[Span], int]:
    spans = [Span(begin, start), Span(begin + 1, start)]
    begin, base, after = begin + 2, start + 1, start + 1
    for chunk in interleave(segment, config):
        if chunk.is_audio:
            spans.append(Span(begin, base + chunk.begin))
            after = base + chunk.end
        else:
            spans.append(_grid_span(segment.grid, begin, base, chunk.begin))
            after = _after(segment.grid, base, chunk.begin, chunk.end, config)
        begin += chunk.end - chunk.begin
    return [*spans, Span(begin, after), Span(begin + 1, after)], after + 1


def cut(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """The spans of text positions ``begin`` to ``end``, counted from ``begin``.

    One that goes on from before keeps its true beginning, which is then below 0.
    """
    ends = [span.begin for span in spans[1:]] + [end]
    own = [s for s, after in zip(spans, ends, strict=False) if s.begin < end and after > begin]
    return [dataclasses.replace(span, begin=span.begin - begin) for span in own]


def stack(rows: Sequence[Sequence[Span]], length: int, width: int | None = None) -> Spans:
    """Stacks the spans of each row into a table of ``width``, bucketed if None; unused ones begin at ``length``, S."""
    width = bucket(max((len(row) for row in rows), default=1), smallest=4) if width is None else width
    unused = Span(length, 0)
    padded = [[*row, *[unused] * (width - len(row))] for row in rows]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([[getattr(span, name) for span in row] for row in padded], dtype)

    whole = {name: column(name, np.int32) for name in ("begin", "start", "height", "width", "skip")}
    return Spans(**whole, seconds=column("seconds", np.float32))


def position_ids(
    spans: Spans, segment_ids: Int[Array, "B S"], ids_per_second: int = 25
) -> tuple[Int[jax.Array, "3 B S"], Int[jax.Array, " B"]]:
    """Expands the table; pure and jittable.

    Returns:
      The ids (time, height, width) of every position, 1 where there is padding, and for each row the delta: the id of a
      token decoded later is its index among the row's real tokens plus the delta.
    """
    real = segment_ids != 0
    position = jnp.arange(segment_ids.shape[1])
    span = jnp.sum(spans.begin[:, None, :] <= position[None, :, None], axis=-1) - 1
    span = jnp.maximum(span, 0)

    def of(values: Array) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(values), span, axis=1)

    offset = position[None, :] - of(spans.begin)
    height, width, start = of(spans.height), of(spans.width), of(spans.start)
    is_text = height == 0
    cell = of(spans.skip) + offset
    per_frame = jnp.maximum(height * width, 1)
    frame = (cell // per_frame).astype(jnp.float32)
    time = (frame * of(spans.seconds) * jnp.float32(ids_per_second)).astype(jnp.int32)
    row = cell % per_frame // jnp.maximum(width, 1)
    column = cell % per_frame % jnp.maximum(width, 1)
    ids = start + jnp.stack([jnp.where(is_text, offset, axis) for axis in (time, row, column)])
    ids = jnp.where(real, ids, 1).astype(jnp.int32)
    largest = jnp.max(jnp.where(real, ids, -1), axis=(0, 2))
    return ids, largest + 1 - jnp.sum(real, axis=1)
