"""Our position ids from the arguments of the reference's ``get_rope_index``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from omni_jax import mrope
from omni_jax.batch import Spans, bucket
from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.processing.layout import append_segment, audio_tokens
from omni_jax.segments import Grid, Interleaved, Segment, Text, interleave

_T = TypeVar("_T")
_position_ids = jax.jit(mrope.position_ids, static_argnames="ids_per_second")


def expand_table(
    spans: Spans, segment_ids: Int[np.ndarray, "B S"], ids_per_second: int = 25
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """Ids and deltas of a table of spans, padded to few shapes, so that little is compiled."""
    num_rows, length = segment_ids.shape
    more_rows = (0, bucket(num_rows, 4) - num_rows)
    more_positions = (0, bucket(length, 2048) - length)
    width = spans.begin.shape[1]
    more_spans = (0, bucket(width, 64) - width)
    columns = {}
    for name, table in vars(spans).items():
        unused = length + more_positions[1] if name == "begin" else 0
        columns[name] = np.pad(table, (more_rows, more_spans), constant_values=unused)
    wide = np.pad(np.asarray(segment_ids, np.int32), (more_rows, more_positions))
    ids, deltas = _position_ids(Spans(**columns), wide, ids_per_second=ids_per_second)
    return np.asarray(ids)[:, :num_rows, :length], np.asarray(deltas)[:num_rows]


def expand(
    rows: Sequence[Sequence[mrope.Span]], mask: Any, ids_per_second: int = 25
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """Ids and deltas of rows of spans, whose real positions a mask says. [B, S]"""
    mask = np.asarray(mask, np.int32)
    return expand_table(mrope.stack_spans(rows, mask.shape[1]), mask, ids_per_second)


def rope_index(
    inputs: Mapping[str, Any], config: ThinkerConfig
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """The same for tokens with the sizes of their media."""
    tokens = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs["attention_mask"])
    names = ("image_grid_thw", "video_grid_thw", "second_per_grids", "audio_seqlens")
    lengths = MediaLengths.of(*(inputs[name] for name in names))
    rows = []
    for ids, real in zip(tokens, mask, strict=True):
        own = ids[real == 1]
        segments = segments_from_tokens(own, lengths, config, use_audio_in_video=inputs["use_audio_in_video"])
        rows.append(mrope.resolve_spans(segments, config, begin=int(np.argmax(real))))
    return expand(rows, mask, config.position_id_per_seconds)


@dataclass
class MediaLengths:
    """The sizes of the media of a batch of rows that are tokens already, in order; reading a row consumes its part.

    These are what the reference's processor returns beside its ``input_ids``.
    """

    image_grids: Iterator[Sequence[int]] | None  # (t, rows, columns) in patches; None: the batch has no picture
    video_grids: Iterator[Sequence[int]] | None
    seconds_per_grid: Iterator[float]  # of each video
    audio_frames: Iterator[int]  # valid mel frames of each sound

    @classmethod
    def of(
        cls,
        image_grid_thw: Iterable[Sequence[int]] | None = None,
        video_grid_thw: Iterable[Sequence[int]] | None = None,
        second_per_grids: Iterable[float] | None = None,
        audio_seqlens: Iterable[int] | None = None,
    ) -> MediaLengths:
        """From the arguments of the reference's ``get_rope_index``."""
        images = None if image_grid_thw is None else iter(image_grid_thw)
        videos = None if video_grid_thw is None else iter(video_grid_thw)
        return cls(images, videos, iter(second_per_grids or ()), iter(audio_seqlens or ()))


def segments_from_tokens(
    tokens: Sequence[int], lengths: MediaLengths, config: ThinkerConfig, *, use_audio_in_video: bool = False
) -> tuple[Segment, ...]:
    """Reads the segments of a row whose placeholders are expanded, as the reference's ``get_rope_index`` does.

    Its quirk is kept: under ``use_audio_in_video`` a video without sound is not counted, and is laid out as text
    (docs/reference.md, 5.6c); without any grid the whole batch is text.

    Args:
      tokens: the real tokens of one row, without padding.
      lengths: sizes of the media of the batch; those of this row are taken from it.
      config: gives the special ids.
      use_audio_in_video: one flag for every video of the row, as in the reference.

    Raises:
      InputError: if the tokens are not what the sizes make them, or there are too few sizes.
    """
    if lengths.image_grids is None and lengths.video_grids is None:
        return (Text(len(tokens)),) if len(tokens) else ()
    reader = _Reader(list(map(int, tokens)), lengths, config)
    out: list[Segment] = []
    place = 0
    while place < len(reader.tokens):
        segment = reader.segment_at(place, use_audio_in_video)
        append_segment(out, segment)
        place += segment.length
    return tuple(out)


@dataclass
class _Reader:
    tokens: list[int]
    lengths: MediaLengths
    config: ThinkerConfig

    def segment_at(self, place: int, use_audio_in_video: bool) -> Segment:
        """The segment that begins at a token; the begin mark of media is a text of its own."""
        config = self.config
        here, before = self.tokens[place], self.tokens[place - 1] if place else -1
        following = self.tokens[place + 1] if place + 1 < len(self.tokens) else -1
        if here == config.vision_start_token_id and following == config.audio_start_token_id and use_audio_in_video:
            return self._interleaved(place)
        if here == config.audio_token_index and before == config.audio_start_token_id:
            n = audio_tokens(_next(self.lengths.audio_frames, "sound", place))
            return self._checked(place, Text(n), [here] * n, "a sound")
        if before == config.vision_start_token_id and here == config.image_token_index:
            grid = self._grid(self.lengths.image_grids, "image", 1.0, place)
            return self._checked(place, grid, [here] * grid.length, "an image")
        if before == config.vision_start_token_id and here == config.video_token_index and not use_audio_in_video:
            grid = self._video_grid(place)
            return self._checked(place, grid, [here] * grid.length, "a video")
        return Text(1)

    def _grid(self, grids: Iterator[Sequence[int]] | None, name: str, seconds: float, place: int) -> Grid:
        t, rows, columns = map(int, _next(grids or iter(()), name, place))
        merge = self.config.vision_config.spatial_merge_size
        return Grid(t, rows // merge, columns // merge, seconds)

    def _video_grid(self, place: int) -> Grid:
        seconds = float(_next(self.lengths.seconds_per_grid, "video's seconds per grid", place))
        return self._grid(self.lengths.video_grids, "video", seconds, place)

    def _interleaved(self, place: int) -> Segment:
        config, grid = self.config, self._video_grid(place)
        frames = _next(self.lengths.audio_frames, "sound", place)
        segment = Interleaved(grid, audio_tokens(frames))
        expected = [config.vision_start_token_id, config.audio_start_token_id]
        for chunk in interleave(segment, config):
            token = config.audio_token_index if chunk.is_audio else config.video_token_index
            expected += [token] * (chunk.end - chunk.begin)
        expected += [config.audio_end_token_id, config.vision_end_token_id]
        return self._checked(place, segment, expected, "a video with its sound")

    def _checked(self, place: int, segment: Segment, expected: list[int], name: str) -> Segment:
        if self.tokens[place : place + len(expected)] != expected:
            raise InputError(
                f"token {place}: {name} of this size takes {len(expected)} tokens ({segment}), but the row holds "
                "others; tokens, grids and lengths must come from the same processor call"
            )
        return segment


def _next(values: Iterator[_T], name: str, place: int) -> _T:
    for value in values:
        return value
    raise InputError(f"token {place}: the row holds one {name} more than there are sizes for")
