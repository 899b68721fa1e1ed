"""TMRoPE, the time-aligned position ids of Qwen2.5-Omni (paper section 2.2; reference ``get_rope_index``).

Every token has three ids: time, height and width. Text and sound count up on all three at once, one id each 40 ms of
sound. The merged cells of a picture share one time and carry their row and column. The cells of a video carry the time
of their frame, and a video with its sound is interleaved in chunks: two seconds of picture, then two of sound.

Three terms, from the outside in. A *segment* is what a message holds: text, a picture, a video, a video with its sound
(``omni_jax.segments``). A *chunk* is the picture or the sound of about two seconds of such a video. A *span* is a run
of tokens whose ids follow one rule; ``resolve_spans`` turns segments into spans, and ``position_ids``, which is jitted,
expands a table of spans to ids.

Every quirk of the reference is kept, since the published weights were trained with them (docs/reference.md, 5):

* the id after a segment follows the maximum of *that segment*, not of all that came before;
* the counter of chunks moves once a split, so a grid over two seconds long drifts and splits within a frame;
* the two begin tokens of a video with sound share one id, and so do its two end tokens;
* padding has id 1.

Letters: B rows, S text positions, N spans of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from omni_jax.batch import PADDING, Array, Spans, bucket
from omni_jax.config import ThinkerConfig
from omni_jax.segments import NUM_EDGE_TOKENS, Chunk, Grid, Interleaved, Segment, Text, frame_times, interleave

PADDING_ID = 1  # the position id of padding, in the reference too


@dataclass(frozen=True)
class Span:
    """One entry of the table ``omni_jax.batch.Spans``, which explains the fields, before it is padded and stacked."""

    begin: int
    start: int
    height: int = 0
    width: int = 0
    skip: int = 0
    seconds: float = 0.0


def resolve_spans(segments: Iterable[Segment], config: ThinkerConfig, begin: int = 0, start: int = 0) -> list[Span]:
    """Resolves segments to spans.

    Args:
      segments: in the order of their tokens.
      config: gives the ids of a second and of a chunk.
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
            # on all axes: what follows a picture starts behind its largest id
            start = _next_id(segment, start, Chunk(False, 0, segment.length), config)
        else:
            inner, start = _resolve_interleaved(segment, config, begin, start)
            spans += inner
        begin += segment.length
    return spans


def _grid_span(grid: Grid, begin: int, start: int, skip: int) -> Span:
    return Span(begin, start, grid.height, grid.width, skip, grid.seconds)


def _next_id(grid: Grid, start: int, chunk: Chunk, config: ThinkerConfig) -> int:
    """The id after some cells of a grid whose ids are counted from ``start``: one more than the largest of these."""
    cells = np.arange(chunk.begin, chunk.end)
    cells_per_frame = grid.height * grid.width
    row, column = np.divmod(cells % cells_per_frame, grid.width)
    last_time = frame_times(grid, config.position_id_per_seconds)[cells[-1] // cells_per_frame]
    return start + 1 + int(max(last_time, row.max(), column.max()))


def _resolve_interleaved(segment: Interleaved, config: ThinkerConfig, begin: int, start: int) -> tuple[list[Span], int]:
    """The spans of a video with its sound, and the id after it."""
    # both begin tokens have the same id
    spans = [Span(begin, start), Span(begin + 1, start)]
    begin += NUM_EDGE_TOKENS
    # pictures and sound count from one id, right behind the begin tokens
    first_id = start + 1
    next_id = first_id
    for chunk in interleave(segment, config):
        if chunk.is_audio:
            spans.append(Span(begin, first_id + chunk.begin))
            next_id = first_id + chunk.end
        else:
            spans.append(_grid_span(segment.grid, begin, first_id, chunk.begin))
            next_id = _next_id(segment.grid, first_id, chunk, config)
        begin += chunk.end - chunk.begin
    # and so have both end tokens
    spans += [Span(begin, next_id), Span(begin + 1, next_id)]
    return spans, next_id + 1


def cut_spans(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """The spans of text positions ``begin`` to ``end``, counted from ``begin``.

    A span that goes on from before keeps its true beginning, which is then below 0.
    """
    inside = []
    for i, span in enumerate(spans):
        # a span has no length of its own: it ends where the next one begins
        span_end = spans[i + 1].begin if i + 1 < len(spans) else end
        if span.begin < end and span_end > begin:
            inside.append(dataclasses.replace(span, begin=span.begin - begin))
    return inside


def stack_spans(rows: Sequence[Sequence[Span]], length: int, width: int | None = None) -> Spans:
    """Stacks the spans of each row into a table of ``width`` columns.

    Args:
      rows: spans of each row.
      length: S; unused entries of the table begin there.
      width: N; the bucketed number of spans of the longest row if None.
    """
    if width is None:
        width = bucket(max((len(row) for row in rows), default=1), smallest=4)
    shape = (len(rows), width)
    columns = {}
    for field in dataclasses.fields(Span):
        dtype = np.float32 if field.name == "seconds" else np.int32
        # entries that are not used begin behind the row, so that no position is theirs
        column = np.full(shape, length if field.name == "begin" else 0, dtype)  # [B, N]
        for i, row in enumerate(rows):
            column[i, : len(row)] = [getattr(span, field.name) for span in row]
        columns[field.name] = column
    return Spans(**columns)


@jax.named_scope("position_ids")
def position_ids(
    spans: Spans, segment_ids: Int[Array, "B S"], ids_per_second: int = 25
) -> tuple[Int[jax.Array, "3 B S"], Int[jax.Array, " B"]]:
    """Expands a table of spans (reference ``get_rope_index``; docs/reference.md, 5); pure and jittable.

    Returns:
      The ids (time, height, width) of every position, 1 where there is padding, and for each row the delta: the id of a
      token decoded later is its index among the row's real tokens plus the delta.
    """
    is_token = segment_ids != PADDING  # [B, S]
    position = jnp.arange(segment_ids.shape[1])  # [S]
    # the span of a position is the last that begins at it or before: count those, [B, N, S] summed over N
    num_started = jnp.sum(spans.begin[:, :, None] <= position[None, None, :], axis=1)  # [B, S]
    span = jnp.maximum(num_started - 1, 0)

    def at_position(column: Array) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(column), span, axis=1)  # [B, N] -> [B, S]

    start = at_position(spans.start)
    height = at_position(spans.height)
    width = at_position(spans.width)
    offset = position[None, :] - at_position(spans.begin)  # [B, S], of a token in its span
    cell = at_position(spans.skip) + offset  # [B, S], of a token in its picture or video
    cells_per_frame = jnp.maximum(height * width, 1)
    frame = (cell // cells_per_frame).astype(jnp.float32)
    # float32, left to right, truncated: as the reference rounds
    time = (frame * at_position(spans.seconds) * jnp.float32(ids_per_second)).astype(jnp.int32)
    row = cell % cells_per_frame // jnp.maximum(width, 1)
    column = cell % cells_per_frame % jnp.maximum(width, 1)
    is_text = height == 0
    grid_ids = jnp.stack([time, row, column])  # [3, B, S]
    ids = start + jnp.where(is_text, offset, grid_ids)
    ids = jnp.where(is_token, ids, PADDING_ID).astype(jnp.int32)
    largest = jnp.max(jnp.where(is_token, ids, -1), axis=(0, 2))  # [B]
    return ids, largest + 1 - jnp.sum(is_token, axis=1)
