"""Where each token of a prompt comes from: its own embedding, or a feature of a sound, a picture or a video.

A chat template leaves one placeholder for each item of media. ``lay_out`` replaces it by as many tokens as the item has
features, remembers which feature each of them takes, and describes the row to ``omni_jax.mrope``.
``segments_from_tokens`` reads the same description back from a row that somebody else has expanded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, TypeVar

import numpy as np

from omni_jax import mrope
from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError

FRAMES_PER_SECOND = 100  # mel frames; the 40 ms of an audio token and the ids of TMRoPE are built on it


def audio_tokens(frames: int) -> int:
    """Tokens that ``frames`` mel frames become: a convolution of stride two, then a mean over pairs (spec 2.3)."""
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


@dataclass(frozen=True)
class AudioInput:
    """One sound, or the sound of a video."""

    mel: np.ndarray  # float32 [frames, mel bins], valid frames only

    @property
    def tokens(self) -> int:
        return audio_tokens(len(self.mel))

    @property
    def seconds(self) -> float:
        return len(self.mel) / FRAMES_PER_SECOND


@dataclass(frozen=True)
class VisionInput:
    """One picture, or the frames of one video."""

    patches: np.ndarray  # float32 [t * rows * columns, numbers a patch], the four patches of a cell side by side
    grid: tuple[int, int, int]  # t, rows and columns, in patches
    kind: Literal["image", "video"] = "image"
    seconds_per_grid: float = 1.0  # from one of the t to the next; nothing reads it for a picture

    def cells(self, merge: int) -> mrope.Grid:
        """The grid of merged cells, each of which is a token."""
        t, rows, columns = self.grid
        return mrope.Grid(t, rows // merge, columns // merge, self.seconds_per_grid)

    @property
    def seconds(self) -> float:
        return self.grid[0] * self.seconds_per_grid if self.kind == "video" else 0.0


_T = TypeVar("_T")

Media: TypeAlias = AudioInput | VisionInput
Item: TypeAlias = (
    Media | tuple[VisionInput, AudioInput]
)  # what one placeholder stands for; a pair is a video with its sound


@dataclass(frozen=True)
class Usage:
    """What a prompt is made of: tokens by kind, and seconds."""

    text: int = 0
    image: int = 0
    video: int = 0
    audio: int = 0  # of sounds and of the sound of videos
    audio_seconds: float = 0.0
    video_seconds: float = 0.0

    @property
    def total(self) -> int:
        return self.text + self.image + self.video + self.audio


@dataclass(frozen=True)
class Prompt:
    """One dialogue, ready to be collated. T tokens, media placeholders expanded."""

    tokens: np.ndarray  # int32 [T]
    segments: tuple[mrope.Segment, ...]
    media: tuple[Media, ...]  # in order of appearance; the sound of a video follows it
    media_item: np.ndarray  # int32 [T]: which of the media a position takes its feature from; -1: its own embedding
    media_token: np.ndarray  # int32 [T]: which feature of that item, in time order or frame by frame, row by row
    usage: Usage

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class _Row:
    """A prompt in the making."""

    tokens: list[np.ndarray] = field(default_factory=list)
    item: list[np.ndarray] = field(default_factory=list)
    index: list[np.ndarray] = field(default_factory=list)
    segments: list[mrope.Segment] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)

    def text(self, ids: Sequence[int]) -> None:
        self._put(np.asarray(ids, np.int32), np.full(len(ids), -1), np.zeros(len(ids)))
        self.segment(mrope.Text(len(ids)))

    def features(self, token: int, item: int, begin: int, end: int) -> None:
        n = end - begin
        self._put(np.full(n, token), np.full(n, item), np.arange(begin, end))

    def mark(self, token: int) -> None:
        self.features(token, -1, 0, 1)

    def segment(self, segment: mrope.Segment) -> None:
        _append(self.segments, segment)

    def _put(self, tokens: np.ndarray, item: np.ndarray, index: np.ndarray) -> None:
        self.tokens.append(tokens.astype(np.int32))
        self.item.append(item.astype(np.int32))
        self.index.append(index.astype(np.int32))

    def prompt(self, config: ThinkerConfig) -> Prompt:
        def join(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.zeros(0, np.int32), *parts])

        usage = _usage(self.media, sum(map(len, self.tokens)), config)
        return Prompt(
            join(self.tokens), tuple(self.segments), tuple(self.media), join(self.item), join(self.index), usage
        )


def _append(segments: list[mrope.Segment], segment: mrope.Segment) -> None:
    """Adds a segment; texts that follow each other become one."""
    if isinstance(segment, mrope.Text):
        if not segment.length:
            return
        if segments and isinstance(segments[-1], mrope.Text):
            segment = mrope.Text(segments.pop().length + segment.length)
    segments.append(segment)


def media_tokens(media: Media, config: ThinkerConfig) -> int:
    """How many tokens an item takes, its marks not counted."""
    if isinstance(media, AudioInput):
        return media.tokens
    return media.cells(config.vision_config.spatial_merge_size).length


def _usage(media: Sequence[Media], total: int, config: ThinkerConfig) -> Usage:
    count = {"image": 0, "video": 0, "audio": 0}
    seconds = {"image": 0.0, "video": 0.0, "audio": 0.0}
    for item in media:
        kind = "audio" if isinstance(item, AudioInput) else item.kind
        count[kind] += media_tokens(item, config)
        seconds[kind] += item.seconds
    text = total - sum(count.values())
    return Usage(text, **count, audio_seconds=seconds["audio"], video_seconds=seconds["video"])


def lay_out(ids: Sequence[int], items: Sequence[Item], config: ThinkerConfig) -> Prompt:
    """Expands the placeholders of a tokenised template.

    Args:
      ids: a placeholder (``audio_token_index`` and so on) for each item, between the begin and end marks of its kind.
      items: in the order of their placeholders.
      config: gives the special ids and the rule by which a video is interleaved with its sound.

    Raises:
      InputError: if the placeholders and the items do not pair up.
    """
    places = _placeholders(ids, items, config)
    row, done = _Row(), 0
    for place, item in zip(places, items, strict=True):
        if isinstance(item, tuple):
            around = (ids[place - 1] if place else -1, ids[place + 1] if place + 1 < len(ids) else -1)
            if around != (config.vision_start_token_id, config.vision_end_token_id):
                raise InputError("the chat template must put a video with sound between a begin and an end mark")
            row.text(ids[done : place - 1])
            _lay_out_interleaved(row, *item, config)
            done = place + 2
        else:
            row.text(ids[done:place])
            _lay_out_plain(row, item, config)
            done = place + 1
    row.text(ids[done:])
    return row.prompt(config)


def _placeholders(ids: Sequence[int], items: Sequence[Item], config: ThinkerConfig) -> list[int]:
    """Where the placeholder of each item stands."""
    kinds = {
        config.audio_token_index: "audio",
        config.image_token_index: "image",
        config.video_token_index: "video",
    }
    places = [i for i, token in enumerate(ids) if token in kinds]
    found = [kinds[ids[i]] for i in places]
    wanted = ["audio" if isinstance(i, AudioInput) else i[0].kind if isinstance(i, tuple) else i.kind for i in items]
    if found != wanted:
        raise InputError(f"the chat template wrote placeholders for {found}, but the messages carry {wanted}")
    return places


def _lay_out_plain(row: _Row, item: Media, config: ThinkerConfig) -> None:
    row.media.append(item)
    number = len(row.media) - 1
    if isinstance(item, AudioInput):
        row.features(config.audio_token_index, number, 0, item.tokens)
        row.segment(mrope.Text(item.tokens))
        return
    grid = item.cells(config.vision_config.spatial_merge_size)
    token = config.image_token_index if item.kind == "image" else config.video_token_index
    row.features(token, number, 0, grid.length)
    row.segment(grid)


def _lay_out_interleaved(row: _Row, video: VisionInput, sound: AudioInput, config: ThinkerConfig) -> None:
    segment = mrope.Interleaved(video.cells(config.vision_config.spatial_merge_size), sound.tokens)
    row.media += [video, sound]
    row.mark(config.vision_start_token_id)
    row.mark(config.audio_start_token_id)
    for chunk in mrope.interleave(segment, config):
        token = config.audio_token_index if chunk.is_audio else config.video_token_index
        row.features(token, len(row.media) - (1 if chunk.is_audio else 2), chunk.begin, chunk.end)
    row.mark(config.audio_end_token_id)
    row.mark(config.vision_end_token_id)
    row.segment(segment)


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
) -> tuple[mrope.Segment, ...]:
    """Reads the segments of a row whose placeholders are expanded, as the reference's ``get_rope_index`` does.

    Its quirk is kept: under ``use_audio_in_video`` a video without sound is not counted, and is laid out as text (spec
    5.6c); without any grid the whole batch is text.

    Args:
      tokens: the real tokens of one row, without padding.
      lengths: sizes of the media of the batch; those of this row are taken from it.
      config: gives the special ids.
      use_audio_in_video: one flag for every video of the row, as in the reference.

    Raises:
      InputError: if the tokens are not what the sizes make them, or there are too few sizes.
    """
    if lengths.image_grids is None and lengths.video_grids is None:
        return (mrope.Text(len(tokens)),) if len(tokens) else ()
    reader = _Reader(list(map(int, tokens)), lengths, config)
    out: list[mrope.Segment] = []
    place = 0
    while place < len(reader.tokens):
        segment = reader.segment_at(place, use_audio_in_video)
        _append(out, segment)
        place += segment.length
    return tuple(out)


@dataclass
class _Reader:
    tokens: list[int]
    lengths: MediaLengths
    config: ThinkerConfig

    def segment_at(self, place: int, use_audio_in_video: bool) -> mrope.Segment:
        """The segment that begins at a token; the begin mark of media is a text of its own."""
        config = self.config
        here, before = self.tokens[place], self.tokens[place - 1] if place else -1
        following = self.tokens[place + 1] if place + 1 < len(self.tokens) else -1
        if here == config.vision_start_token_id and following == config.audio_start_token_id and use_audio_in_video:
            return self._interleaved(place)
        if here == config.audio_token_index and before == config.audio_start_token_id:
            n = audio_tokens(_next(self.lengths.audio_frames, "sound", place))
            return self._checked(place, mrope.Text(n), [here] * n, "a sound")
        if before == config.vision_start_token_id and here == config.image_token_index:
            grid = self._grid(self.lengths.image_grids, "image", 1.0, place)
            return self._checked(place, grid, [here] * grid.length, "an image")
        if before == config.vision_start_token_id and here == config.video_token_index and not use_audio_in_video:
            grid = self._video_grid(place)
            return self._checked(place, grid, [here] * grid.length, "a video")
        return mrope.Text(1)

    def _grid(self, grids: Iterator[Sequence[int]] | None, name: str, seconds: float, place: int) -> mrope.Grid:
        t, rows, columns = map(int, _next(grids or iter(()), name, place))
        merge = self.config.vision_config.spatial_merge_size
        return mrope.Grid(t, rows // merge, columns // merge, seconds)

    def _video_grid(self, place: int) -> mrope.Grid:
        seconds = float(_next(self.lengths.seconds_per_grid, "video's seconds per grid", place))
        return self._grid(self.lengths.video_grids, "video", seconds, place)

    def _interleaved(self, place: int) -> mrope.Segment:
        config, grid = self.config, self._video_grid(place)
        frames = _next(self.lengths.audio_frames, "sound", place)
        segment = mrope.Interleaved(grid, audio_tokens(frames))
        expected = [config.vision_start_token_id, config.audio_start_token_id]
        for chunk in mrope.interleave(segment, config):
            token = config.audio_token_index if chunk.is_audio else config.video_token_index
            expected += [token] * (chunk.end - chunk.begin)
        expected += [config.audio_end_token_id, config.vision_end_token_id]
        return self._checked(place, segment, expected, "a video with its sound")

    def _checked(self, place: int, segment: mrope.Segment, expected: list[int], name: str) -> mrope.Segment:
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
