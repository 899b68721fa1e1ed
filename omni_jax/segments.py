"""What a message holds, as TMRoPE sees it: text, pictures, videos, and videos whose picture and sound are interleaved.

The tokens of a prompt are laid out by this, and so are their position ids (``omni_jax.mrope``). Nothing here needs JAX,
so that a process which only decodes media starts fast and stays small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, TypeAlias

import numpy as np

from omni_jax.config import ThinkerConfig

# tokens around an interleaved video: the begin tokens of picture and sound, and their end tokens
NUM_EDGE_TOKENS = 2


@dataclass(frozen=True)
class Text:
    """Tokens that count up one by one: text, begin and end tokens of media, sound that stands alone."""

    length: int


@dataclass(frozen=True)
class Grid:
    """A picture (one frame) or a video without sound, in merged cells; its begin and end tokens are text."""

    frames: int
    height: int
    width: int
    seconds: float = 1.0  # from one frame to the next

    @property
    def length(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True)
class Interleaved:
    """A video with its sound, and the two begin and two end tokens around them."""

    grid: Grid
    audio: int  # tokens of sound

    @property
    def length(self) -> int:
        return self.grid.length + self.audio + 2 * NUM_EDGE_TOKENS


Segment: TypeAlias = Text | Grid | Interleaved


@dataclass(frozen=True)
class Chunk:
    """A chunk of an interleaved video: tokens ``begin`` to ``end`` of its picture or of its sound."""

    is_audio: bool
    begin: int
    end: int


class _Interval(NamedTuple):
    begin: int
    end: int


def _split_times(times: Sequence[int], step: int) -> list[_Interval]:
    """Splits a rising list of times about every ``step`` ids (reference ``get_chunked_index``)."""
    intervals = []
    begin = 0
    num_chunks = 1
    for i, time in enumerate(times):
        # only one split for each time, however far it is behind the last: the drift of the reference
        if time >= num_chunks * step:
            intervals.append(_Interval(begin, i))
            begin = i
            num_chunks += 1
    intervals.append(_Interval(begin, len(times)))
    return intervals


def frame_times(grid: Grid, ids_per_second: int) -> np.ndarray:
    """The time id of each frame. [frames]

    The reference multiplies float32 numbers from left to right and truncates; any other order moves some ids by one.
    """
    times = np.arange(grid.frames, dtype=np.float32) * np.float32(grid.seconds) * np.float32(ids_per_second)
    return times.astype(np.int32)


def interleave(segment: Interleaved, config: ThinkerConfig) -> list[Chunk]:
    """The order of a video's picture and sound tokens; the tokens and their ids are both laid out by it."""
    cells_per_frame = segment.grid.height * segment.grid.width
    cell_times = np.repeat(frame_times(segment.grid, config.position_id_per_seconds), cells_per_frame)
    video = _split_times(cell_times.tolist(), config.chunk_ids)
    audio = _split_times(range(segment.audio), config.chunk_ids)
    chunks = []
    for video_interval, audio_interval in zip_longest(video, audio):
        if video_interval is not None:
            chunks.append(Chunk(False, *video_interval))
        if audio_interval is not None:
            chunks.append(Chunk(True, *audio_interval))
    # without sound, or without pictures, there is one chunk of them, and it is empty
    return [chunk for chunk in chunks if chunk.end > chunk.begin]
