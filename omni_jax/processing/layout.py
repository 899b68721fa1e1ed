"""Where each token of a prompt comes from: its own embedding, or a feature of a sound, a picture or a video.

A chat template leaves one placeholder for each item of media. ``lay_out`` replaces it by as many tokens as the item has
features, remembers which feature each of them takes, and describes the sequence to ``omni_jax.mrope``.

T: tokens of a prompt.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError, TooLongError
from omni_jax.segments import Grid, Interleaved, Segment, Text, interleave

FRAMES_PER_SECOND = 100  # mel frames; the 40 ms of an audio token and the ids of TMRoPE are built on it

MediaKind: TypeAlias = Literal["audio", "image", "video"]


def audio_tokens(frames: int) -> int:
    """Tokens that ``frames`` mel frames become: a convolution of stride two, then a mean over pairs.

    docs/reference.md, 2.3.
    """
    after_convolution = (frames - 1) // 2 + 1
    return (after_convolution - 2) // 2 + 1


@dataclass(frozen=True)
class TokenBudget:
    """How many tokens a prompt may have, so that media over it are refused before they are made.

    Attributes:
      limit: tokens of the prompt.
      used: tokens of the media that come before.
    """

    limit: int
    used: int = 0

    def check(self, tokens: int) -> None:
        """Raises TooLongError if an item of so many tokens is over the limit, whatever else the prompt holds."""
        total = self.used + tokens
        if total > self.limit:
            raise TooLongError(
                f"with its {tokens} tokens the prompt has at least {total} tokens, over the limit of {self.limit}; let "
                "media take fewer (max_pixels, fps, nframes, a time range)"
            )


@dataclass(frozen=True)
class AudioInput:
    """One sound, or the sound of a video.

    Attributes:
      mel: float32 [frames, mel bins], valid frames only.
      num_bad_packets: of its file, that do not decode and are left out.
    """

    mel: np.ndarray
    num_bad_packets: int = 0

    @property
    def tokens(self) -> int:
        return audio_tokens(len(self.mel))

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of what the model hears."""
        return _digest(self.mel, "audio")

    @property
    def seconds(self) -> float:
        return len(self.mel) / FRAMES_PER_SECOND


@dataclass(frozen=True)
class VisionInput:
    """One picture, or the frames of one video.

    Attributes:
      patches: float32 [t * rows * columns, values of a patch], the four patches of a cell side by side.
      grid: (t, rows, columns), in patches.
      kind: "image" or "video".
      seconds_per_grid: from one of the t to the next; nothing reads it for a picture.
      num_bad_packets: of its file, that do not decode and are left out.
    """

    patches: np.ndarray
    grid: tuple[int, int, int]
    kind: Literal["image", "video"] = "image"
    seconds_per_grid: float = 1.0
    num_bad_packets: int = 0

    def cells(self, merge: int) -> Grid:
        """The grid of merged cells, each of which is a token."""
        t, rows, columns = self.grid
        return Grid(t, rows // merge, columns // merge, self.seconds_per_grid)

    @property
    def seconds(self) -> float:
        return self.grid[0] * self.seconds_per_grid if self.kind == "video" else 0.0

    @functools.cached_property
    def digest(self) -> bytes:
        """A hash of what the model sees."""
        return _digest(self.patches, f"{self.kind} {self.grid}")


def _digest(features: np.ndarray, about: str) -> bytes:
    digest = hashlib.blake2b(np.ascontiguousarray(features).data, digest_size=16)
    digest.update(f"{about} {features.shape} {features.dtype}".encode())
    return digest.digest()


Media: TypeAlias = AudioInput | VisionInput
# what one placeholder stands for; a pair is a video with its sound
Item: TypeAlias = Media | tuple[VisionInput, AudioInput]


@dataclass(frozen=True)
class Usage:
    """What a prompt is made of.

    Attributes:
      text, image, video, audio: tokens by kind; those of a video's sound count as audio.
      audio_seconds: of sounds and of the sound of videos.
      video_seconds: of videos.
      num_bad_packets: of media files, that do not decode and are left out.
      cached: tokens among them that had been prefilled for another request.
    """

    text: int = 0
    image: int = 0
    video: int = 0
    audio: int = 0
    audio_seconds: float = 0.0
    video_seconds: float = 0.0
    num_bad_packets: int = 0
    # not compared: what came before a request changes nothing of it
    cached: int = field(default=0, compare=False)

    @property
    def total(self) -> int:
        """Tokens of all kinds."""
        return self.text + self.image + self.video + self.audio


@dataclass(frozen=True)
class Prompt:
    """One dialogue, ready to be collated; its media placeholders are expanded.

    Attributes:
      tokens: int32 [T].
      segments: what position ids are made of.
      media: in order of appearance; the sound of a video follows it.
      media_item: int32 [T]: which of the media a position takes its feature from; -1: its own embedding.
      media_token: int32 [T]: which feature of that item, in time order or frame by frame, row by row.
      usage: what it is made of.
    """

    tokens: np.ndarray
    segments: tuple[Segment, ...]
    media: tuple[Media, ...]
    media_item: np.ndarray
    media_token: np.ndarray
    usage: Usage

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        total = self.tokens.nbytes + self.media_item.nbytes + self.media_token.nbytes
        for item in self.media:
            features = item.mel if isinstance(item, AudioInput) else item.patches
            total += features.nbytes
        return total


def lay_out(ids: Sequence[int], items: Sequence[Item], config: ThinkerConfig) -> Prompt:
    """Expands the placeholders of a tokenised template.

    Args:
      ids: a placeholder (``audio_token_index`` and so on) for each item, between the begin and end tokens of its kind.
      items: in the order of their placeholders.
      config: gives the special ids and the rule by which a video is interleaved with its sound (docs/reference.md, 5).

    Raises:
      InputError: if the placeholders and the items do not pair up, or an id is outside of the vocabulary.
    """
    # a tokenizer from anywhere gives whatever ids it likes, and an embedding that is not there is no error to JAX
    vocab_size = config.text_config.vocab_size
    if len(ids) and not 0 <= min(ids) <= max(ids) < vocab_size:
        raise InputError(f"the tokenizer gives token {max(ids)}, but the model's vocabulary has {vocab_size}")
    builder = _PromptBuilder(config)
    num_read = 0  # ids that are laid out already
    for place, item in zip(_find_placeholders(ids, items, config), items, strict=True):
        if isinstance(item, tuple):
            # the reference has both begin tokens before picture and sound and both end tokens behind them, so those
            # that the template wrote around the placeholder are replaced with it
            _check_surroundings(ids, place, config)
            builder.add_text(ids[num_read : place - 1])
            builder.add_interleaved(*item)
            num_read = place + 2
        else:
            builder.add_text(ids[num_read:place])
            builder.add_media(item)
            num_read = place + 1
    builder.add_text(ids[num_read:])
    return builder.build()


def media_tokens(media: Media, config: ThinkerConfig) -> int:
    """How many tokens an item takes, its begin and end tokens not counted."""
    if isinstance(media, AudioInput):
        return media.tokens
    return media.cells(config.vision_config.spatial_merge_size).length


def append_segment(segments: list[Segment], segment: Segment) -> None:
    """Adds a segment; texts that follow each other become one."""
    if isinstance(segment, Text):
        if not segment.length:
            return
        # ids count up across the seam; a span less is a smaller table
        if segments and isinstance(segments[-1], Text):
            segment = Text(segments.pop().length + segment.length)
    segments.append(segment)


@dataclass
class _PromptBuilder:
    """A prompt that is laid out from its beginning to its end."""

    config: ThinkerConfig
    tokens: list[np.ndarray] = field(default_factory=list)
    media_item: list[np.ndarray] = field(default_factory=list)
    media_token: list[np.ndarray] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)

    def add_text(self, ids: Sequence[int]) -> None:
        self._add_tokens(np.asarray(ids, np.int32))
        append_segment(self.segments, Text(len(ids)))

    def add_media(self, item: Media) -> None:
        """One item that stands alone."""
        config = self.config
        self.media.append(item)
        if isinstance(item, AudioInput):
            # sound that stands alone has the position ids of text
            self._add_features(config.audio_token_index, item, 0, item.tokens)
            append_segment(self.segments, Text(item.tokens))
            return
        grid = item.cells(config.vision_config.spatial_merge_size)
        token = config.image_token_index if item.kind == "image" else config.video_token_index
        self._add_features(token, item, 0, grid.length)
        append_segment(self.segments, grid)

    def add_interleaved(self, video: VisionInput, sound: AudioInput) -> None:
        """A video and its sound in turns, with the begin and end tokens of both around them."""
        config = self.config
        self.media += [video, sound]
        grid = video.cells(config.vision_config.spatial_merge_size)
        segment = Interleaved(grid, sound.tokens)
        # tokens and position ids follow the same chunks, so they cannot drift apart
        self._add_tokens(np.array([config.vision_start_token_id, config.audio_start_token_id]))
        for chunk in interleave(segment, config):
            if chunk.is_audio:
                self._add_features(config.audio_token_index, sound, chunk.begin, chunk.end)
            else:
                self._add_features(config.video_token_index, video, chunk.begin, chunk.end)
        self._add_tokens(np.array([config.audio_end_token_id, config.vision_end_token_id]))
        append_segment(self.segments, segment)

    def build(self) -> Prompt:
        num_tokens = sum(map(len, self.tokens))
        return Prompt(
            tokens=_concatenate(self.tokens),  # [T]
            segments=tuple(self.segments),
            media=tuple(self.media),
            media_item=_concatenate(self.media_item),  # [T]
            media_token=_concatenate(self.media_token),  # [T]
            usage=_count_usage(self.media, num_tokens, self.config),
        )

    def _add_tokens(self, ids: np.ndarray) -> None:
        """Tokens that take their own embedding."""
        self.tokens.append(ids)
        self.media_item.append(np.full(len(ids), -1))
        self.media_token.append(np.zeros(len(ids)))

    def _add_features(self, token: int, item: Media, begin: int, end: int) -> None:
        """Placeholders of some features of one of the last two items."""
        # a video and its sound are both added before the features of either
        number = len(self.media) - 1
        if item is not self.media[-1]:
            number -= 1
        length = end - begin
        self.tokens.append(np.full(length, token))
        self.media_item.append(np.full(length, number))
        self.media_token.append(np.arange(begin, end))


def _concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """int32 [T]; there may be no parts."""
    return np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)


def _count_usage(media: Sequence[Media], num_tokens: int, config: ThinkerConfig) -> Usage:
    tokens = {"image": 0, "video": 0, "audio": 0}
    seconds = {"image": 0.0, "video": 0.0, "audio": 0.0}
    num_bad_packets = 0
    for item in media:
        kind = _kind_of(item)
        tokens[kind] += media_tokens(item, config)
        seconds[kind] += item.seconds
        num_bad_packets += item.num_bad_packets
    return Usage(
        # the begin and end tokens of media are text: they have embeddings of their own
        text=num_tokens - sum(tokens.values()),
        **tokens,
        audio_seconds=seconds["audio"],
        video_seconds=seconds["video"],
        num_bad_packets=num_bad_packets,
    )


def _kind_of(item: Item) -> MediaKind:
    if isinstance(item, tuple):
        return item[0].kind
    return "audio" if isinstance(item, AudioInput) else item.kind


def _find_placeholders(ids: Sequence[int], items: Sequence[Item], config: ThinkerConfig) -> list[int]:
    """Where the placeholder of each item stands."""
    kinds: dict[int, MediaKind] = {
        config.audio_token_index: "audio",
        config.image_token_index: "image",
        config.video_token_index: "video",
    }
    places = [i for i, token in enumerate(ids) if token in kinds]
    found = [kinds[ids[i]] for i in places]
    wanted = [_kind_of(item) for item in items]
    # a template of another model, or one that passes over a part, would give a medium's features to another
    if found != wanted:
        raise InputError(f"the chat template wrote placeholders for {found}, but the messages carry {wanted}")
    return places


def _check_surroundings(ids: Sequence[int], place: int, config: ThinkerConfig) -> None:
    """The begin and end tokens of a video with sound are replaced together with its placeholder."""
    before = ids[place - 1] if place else -1
    after = ids[place + 1] if place + 1 < len(ids) else -1
    if (before, after) != (config.vision_start_token_id, config.vision_end_token_id):
        raise InputError("the chat template must put a video with sound between a begin and an end token")
