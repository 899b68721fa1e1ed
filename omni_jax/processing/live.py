"""A prompt whose sound and pictures come while somebody still speaks, in pieces that can be prefilled at once.

Sound is cut into the blocks of the encoder, two seconds each, and pictures into windows as long. A piece is everything
of one such window. Tokens, position ids and the order of media are those that ``Processor`` gives to the same dialogue
once it is over; so are the features, but for the floor of the log-mel (``MelStream``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from omni_jax import mrope
from omni_jax.checks import check_int
from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings, MelStream, Resampler
from omni_jax.processing.chat import SAMPLING_RATES, Message, parse_messages
from omni_jax.processing.layout import AudioInput, Media, Prompt, Usage, VisionInput, audio_tokens, lay_out
from omni_jax.processing.prefill_plan import PromptPiece
from omni_jax.processing.processor import LiveKind, Processor
from omni_jax.processing.vision import PixelSettings, video_input, video_size
from omni_jax.segments import Grid, Interleaved, Text, interleave

_NO_GRID = Grid(0, 0, 0)
_TOLERANCE = 0.1  # of the time between two pictures: by so much one may come before its time


class LivePrompt:
    """A dialogue that ends in a message of the user's, which is heard or seen as it comes.

    The caller reads ``head``, then whatever ``audio`` and ``video`` return, then what ``end`` returns: together that is
    ``whole_prompt``. A sound, picture or text that cannot be taken is an InputError and changes nothing.

    Attributes:
      head: everything before the media.
    """

    def __init__(
        self,
        processor: Processor,
        messages: Sequence[Mapping[str, Any]] | Sequence[Message],
        *,
        audio: bool,
        video: bool,
        assume_fps: float | None = None,
    ):
        """Reads what comes before.

        Args:
          processor: of the checkpoint.
          messages: earlier ones, with a system prompt or without; maybe none.
          audio: whether sound is to come.
          video: whether pictures are to come; with sound too, they are one video.
          assume_fps: of videos in earlier messages, see ``Processor.__call__``.

        Raises:
          InputError: for messages that cannot be served, or if neither sound nor pictures are to come.
        """
        if not (audio or video):
            raise InputError("audio and video are both false; a dialogue without sound or pictures is for generate")
        # parse_messages refuses an empty list, which is in order here: the media are a message of their own
        none = isinstance(messages, list | tuple) and not messages
        self._processor = processor
        self._messages = () if none else parse_messages(messages)
        self._thinker = processor.config.thinker_config
        self._block = self._thinker.audio_config.block_frames
        self._kind: LiveKind = "video" if video else "audio"
        self._audio = _AudioInput(processor.settings.mel, self._block) if audio else None
        self._video = _VideoInput(processor.settings.pixels) if video else None
        self._window_ends = _window_ends(processor.settings.pixels, self._thinker) if video else []
        # everything up to the begin mark is known, and can be prefilled before anything comes
        before = processor.before_media(self._messages, self._kind, assume_fps=assume_fps)
        self.head = PromptPiece(before, mrope.resolve_spans(before.segments, self._thinker))
        # the position id of the begin mark
        self._start = mrope.resolve_spans((*before.segments, Text(1)), self._thinker)[-1].start
        # the text that was asked for last, with its ids; at first the shortest end that a prompt can have
        self._after_media: tuple[str, list[int]] = "", processor.after_media(self._messages, self._kind, "")
        self._min_tokens_after = len(self._after_media[1])
        # what the pieces so far hold: windows, tokens, frames of log-mel and grids of pictures
        self._window = 0
        self._num_tokens = 0
        self._frames = 0
        self._grids = 0
        self._check_room(0, _NO_GRID, self._min_tokens_after)

    def audio(self, samples: np.ndarray, rate: int) -> list[PromptPiece]:
        """Hears more, see ``LiveSession.audio``; returns the windows that are full now."""
        if self._audio is None:
            raise InputError("this dialogue takes no sound; begin it with audio=True")
        # whatever may be refused is refused before anything is taken, so that the sound can go on after an error
        self._audio.check(samples, rate)
        self._check_room(self._audio.frames_with(len(samples), rate), self._grid, self._min_tokens_after)
        self._audio.push(samples, rate)
        return self._take_full_windows()

    def video(self, picture: Any, seconds: float) -> list[PromptPiece]:
        """Sees more, see ``LiveSession.video``; returns the windows that are full now."""
        if self._video is None:
            raise InputError("this dialogue takes no pictures; begin it with video=True")
        image = self._processor.read_picture(picture)
        self._video.check(image, seconds)
        self._check_room(self._num_frames_so_far, self._video.grid_with(image, seconds), self._min_tokens_after)
        self._video.push(image, seconds)
        return self._take_full_windows()

    def whole_prompt(self, text: str) -> Prompt:
        """The prompt if it ended now: its tokens, segments and usage. Its media are left out, as they have been read.

        Args:
          text: that follows in the same message.

        Raises:
          InputError: if nothing was heard or seen, or there is no room for the text.
        """
        self._check_media()
        after = self._tokens_after(text)
        self._check_room(self._num_frames_so_far, self._grid, len(after))
        head = self.head.prompt
        part = self._lay_out_media(self._num_frames_so_far, self._grid, after)
        tokens = np.concatenate([head.tokens, part.tokens])  # [T]
        # no media, so no token takes a feature
        nowhere = np.full(len(tokens), -1, np.int32)
        first = np.zeros(len(tokens), np.int32)
        return Prompt(tokens, (*head.segments, *part.segments), (), nowhere, first, _add_usage(head.usage, part.usage))

    def end(self, text: str) -> list[PromptPiece]:
        """The rest of ``whole_prompt``, which it raises like; nothing can follow.

        It is one piece, but for the sound that resampling held back, which may fill a window now.
        """
        # for its errors alone, before the sound is closed
        self.whole_prompt(text)
        if self._audio is not None:
            self._audio.flush()
        full = self._take_full_windows()
        part = self._lay_out_media(self._num_frames_so_far, self._grid, self._tokens_after(text))
        sight = None if self._video is None else self._video.finish()
        return [*full, self._make_piece(part, len(part), sight, None if self._audio is None else self._audio.finish())]

    @property
    def _num_frames_so_far(self) -> int:
        return 0 if self._audio is None else self._audio.frames_with(0, 1)

    @property
    def _grid(self) -> Grid:
        return _NO_GRID if self._video is None else self._video.grid

    @property
    def _cells(self) -> int:
        """Tokens of a grid of pictures."""
        return self._grid.height * self._grid.width

    @property
    def _num_delimiters(self) -> int:
        """Before the media, and as many behind."""
        return 2 if self._audio is not None and self._video is not None else 1

    def _tokens_after(self, text: str) -> list[int]:
        """The ids behind the end mark."""
        if text != self._after_media[0]:
            self._after_media = text, self._processor.after_media(self._messages, self._kind, text)
        return self._after_media[1]

    def _check_media(self) -> None:
        if self._audio is not None and audio_tokens(self._num_frames_so_far) < 1:
            raise InputError(
                "nothing has been heard yet, or less than the 0.025 s that the model needs; go on with audio"
            )
        if self._video is not None and not self._grid.frames:
            raise InputError("nothing has been seen yet; go on with video")

    def _check_room(self, frames: int, grid: Grid, after: int) -> None:
        """Raises InputError if the prompt is longer than the context with this sound, these pictures and ids after."""
        # delimiters stand on both sides of the media
        length = len(self.head.prompt) + 2 * self._num_delimiters + audio_tokens(frames) + grid.length + after
        # one position of the context is left for a token of the reply
        limit = self._thinker.text_config.max_position_embeddings - 1
        if length > limit:
            raise InputError(
                f"the prompt would have {length} tokens, over the limit of {limit} ({len(self.head.prompt)} before the "
                f"media, {audio_tokens(frames)} audio, {grid.length} video, {after} after them); this was not taken; "
                "answer what has come, or begin again with less before it or smaller pictures"
            )

    def _take_full_windows(self) -> list[PromptPiece]:
        """The windows that are full and have not been read yet."""
        pieces = []
        while (piece := self._next_window()) is not None:
            pieces.append(piece)
        return pieces

    def _next_window(self) -> PromptPiece | None:
        """The next window, if the sound and the pictures of it are all there."""
        frames = self._frames
        grids = self._grids
        sound = None
        sight = None
        # nothing is taken from either before both are known to have all of the window
        if self._video is not None:
            grids = self._window_ends[self._window]
            if len(self._video.grids) < grids - self._grids:
                return None
        if self._audio is not None:
            if not self._audio.blocks:
                return None
            frames = frames + self._block
            sound = AudioInput(self._audio.blocks.pop(0))
        if self._video is not None:
            num_new = grids - self._grids
            sight = _concatenate_grids(self._video.grids[:num_new])
            del self._video.grids[:num_new]
        # as if the media ended here; the end tokens are left out of the piece, for more may come
        part = self._lay_out_media(frames, dataclasses.replace(self._grid, frames=grids), [])
        piece = self._make_piece(part, len(part) - self._num_delimiters, sight, sound)
        self._window = self._window + 1
        self._frames = frames
        self._grids = grids
        return piece

    def _lay_out_media(self, frames: int, grid: Grid, after: Sequence[int]) -> Prompt:
        """What follows the head, laid out as it would be if this were all; of the media there is only the size."""
        c = self._thinker
        merge = c.vision_config.spatial_merge_size
        # arrays of the right sizes that take no memory: one number, seen again and again
        nothing = np.float32(0)
        sound = AudioInput(np.broadcast_to(nothing, (frames, 1)))
        shape = (grid.frames, grid.height * merge, grid.width * merge)
        sight = VisionInput(np.broadcast_to(nothing, (math.prod(shape), 1)), shape, "video", grid.seconds)
        if self._video is None:
            ids = [c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id, *after]
            return lay_out(ids, [sound], c)
        ids = [c.vision_start_token_id, c.video_token_index, c.vision_end_token_id, *after]
        return lay_out(ids, [sight if self._audio is None else (sight, sound)], c)

    def _make_piece(self, part: Prompt, end: int, sight: VisionInput | None, sound: AudioInput | None) -> PromptPiece:
        """The tokens of a part from where the last piece ended, and what is new of the media."""
        new: list[Media] = []
        # of each of the part's media: its number in the piece, its features in earlier pieces
        numbers = []
        done = []
        for item in part.media:
            fresh = sound if isinstance(item, AudioInput) else sight
            numbers.append(len(new))
            done.append(audio_tokens(self._frames) if isinstance(item, AudioInput) else self._grids * self._cells)
            # only the media of this piece: what came before is in the cache already
            if fresh is not None:
                new.append(fresh)
        here = slice(self._num_tokens, end)
        own = part.media_item[self._num_tokens : end]  # [T]
        # spans of the whole part, of which this piece takes its own: ids go on where the last piece ended
        spans = mrope.resolve_spans(part.segments, self._thinker, start=self._start)
        piece = Prompt(
            tokens=part.tokens[here],
            segments=(),
            media=tuple(new),
            media_item=np.where(own < 0, -1, np.array(numbers)[own]).astype(np.int32),
            media_token=np.where(own < 0, 0, part.media_token[here] - np.array(done)[own]).astype(np.int32),
            usage=Usage(),
        )
        self._num_tokens = end
        return PromptPiece(piece, mrope.cut_spans(spans, here.start, end))


class _AudioInput:
    """Sound on its way to blocks of log-mel."""

    def __init__(self, settings: MelSettings, block: int):
        self.blocks: list[np.ndarray] = []  # that no piece holds yet
        self._settings = settings
        self._block = block
        self._mel = MelStream(settings, block)
        self._rate = 0
        self._taken = 0
        self._resampler: Resampler | None = None

    def frames_with(self, more: int, rate: int) -> int:
        """How many frames there were if the sound ended after so many more samples."""
        # as many samples as ``Resampler`` gives in all, and a frame for each hop that has begun
        samples = -(-(self._taken + more) * self._settings.sampling_rate // (self._rate or rate))
        return -(-samples // self._settings.hop_length)

    def check(self, samples: Any, rate: int) -> None:
        """Raises InputError unless this can follow what was heard before."""
        check_int("rate", rate, *SAMPLING_RATES, hint="samples a second")
        if self._rate not in (0, rate):
            raise InputError(f"rate is {rate}, but the sound began at {self._rate}; give all of it at one rate")
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype.kind != "f":
            given = type(samples).__name__
            if isinstance(samples, np.ndarray):
                given = f"{samples.dtype} {list(samples.shape)}"
            raise InputError(
                f"sound must be an array of floats [n] in -1 to 1, one channel, got {given}; divide int16 by 32768, "
                "and take the mean of several channels"
            )
        if not np.isfinite(samples).all():
            raise InputError("the samples hold NaN or infinity; they were not taken, the sound can go on")
        seconds = (self._taken + len(samples)) / rate
        most = self._settings.max_seconds
        if seconds > most:
            raise InputError(
                f"the sound would last {seconds:.2f} s, over the limit of {most:g} s; these samples were not taken; "
                "answer what has been heard"
            )

    def push(self, samples: np.ndarray, rate: int) -> None:
        # the first piece decides on the rate
        if self._resampler is None:
            self._rate = rate
            self._resampler = Resampler(rate, self._settings.sampling_rate)
        self._taken += len(samples)
        self.blocks += self._mel.push(self._resampler.push(samples))

    def flush(self) -> None:
        """Says that the sound has ended."""
        if self._resampler is not None:
            self.blocks += self._mel.push(self._resampler.finish())

    def finish(self) -> AudioInput | None:
        """After ``flush``: what no piece holds yet; None if no token comes of it."""
        mel = np.concatenate([*self.blocks, self._mel.finish()])
        rest = len(mel) % self._block  # of a last block; without a token of its own it changes nothing
        mel = mel if audio_tokens(rest) else mel[: len(mel) - rest]
        return AudioInput(mel) if len(mel) else None


class _VideoInput:
    """Pictures on their way to grids, at the rate that the model looks at; each stands until the next one comes."""

    def __init__(self, settings: PixelSettings):
        self.grids: list[VisionInput] = []  # of one grid each, that no piece holds yet
        self._settings = settings
        self._count = 0  # pictures so far, those that stand for several counted as often
        self._waiting: list[Image.Image] = []  # for the other pictures of their grid
        self._last: Image.Image | None = None
        self._seconds = 0.0

    @property
    def grid(self) -> Grid:
        """All that was seen; an odd last picture will be shown twice."""
        return _NO_GRID if self._last is None else self._grid_of(self._last, self._count)

    def grid_with(self, picture: Image.Image, seconds: float) -> Grid:
        """The same with one more."""
        return self._grid_of(picture, self._count_due(seconds))

    def check(self, picture: Image.Image, seconds: float) -> None:
        """Raises InputError unless this can follow what was seen before."""
        if not isinstance(seconds, int | float | np.number) or not 0 <= seconds < math.inf:
            raise InputError(f"seconds is {seconds!r}; it must be a number, 0 or more, counted from the beginning")
        if self._last is not None and seconds < self._seconds:
            raise InputError(f"a picture at {seconds:g} s follows one at {self._seconds:g} s; give them in order")
        if self._last is not None and picture.size != self._last.size:
            raise InputError(
                f"the picture has {picture.size} pixels, the first has {self._last.size}; all must be of one size"
            )
        most = self._settings.max_frames
        fps = self._settings.fps
        if self._count_due(seconds) > most:
            raise InputError(
                f"a picture at {seconds:g} s is over the limit of {most / fps:g} s ({most} pictures at {fps:g} a "
                "second); it was not taken; count seconds from the beginning, or answer what has been seen"
            )

    def push(self, picture: Image.Image, seconds: float) -> None:
        due = self._count_due(seconds)
        # pictures that were due before this one show what was seen last; where none came in time, this one
        before = self._last or picture
        for number in range(self._count, due):
            self._waiting.append(picture if number == due - 1 else before)
            if len(self._waiting) == self._settings.temporal_patch_size:
                self._make_grid()
        self._count = due
        self._last = picture
        self._seconds = seconds

    def finish(self) -> VisionInput | None:
        """What no piece holds yet."""
        # a grid needs two pictures; video_input shows an odd last one twice
        if self._waiting:
            self._make_grid()
        return _concatenate_grids(self.grids) if self.grids else None

    def _count_due(self, seconds: float) -> int:
        """How many pictures there are to be by this time, its own included."""
        return max(self._count, math.floor(seconds * self._settings.fps + _TOLERANCE) + 1)

    def _grid_of(self, picture: Image.Image, count: int) -> Grid:
        # a video's pictures share a budget of pixels, but nobody knows yet how many there will be; it is 115,200
        # tokens, which do not fit a context anyway
        deep = self._settings.temporal_patch_size
        cell = self._settings.cell
        height, width = video_size(picture.height, picture.width, deep, self._settings, {})
        return Grid(-(-count // deep), height // cell, width // cell, deep / self._settings.fps)

    def _make_grid(self) -> None:
        self.grids.append(video_input(self._waiting, len(self._waiting), self._settings.fps, self._settings, {}))
        self._waiting = []


def _concatenate_grids(grids: Sequence[VisionInput]) -> VisionInput:
    """One after the other, as one."""
    _, rows, columns = grids[0].grid
    num_grids = sum(grid.grid[0] for grid in grids)
    patches = np.concatenate([grid.patches for grid in grids])  # [patches, values of a patch]
    return dataclasses.replace(grids[0], patches=patches, grid=(num_grids, rows, columns))


def _window_ends(pixels: PixelSettings, config: ThinkerConfig) -> list[int]:
    """How many grids there are by the end of each window.

    Raises:
      InputError: if a grid is longer than a window; the reference then splits it, and that cannot be done live.
    """
    seconds = pixels.temporal_patch_size / pixels.fps
    if seconds > config.seconds_per_chunk:
        raise InputError(
            f"pictures are looked at {pixels.fps:g} times a second; while they come, it must be at least "
            f"{pixels.temporal_patch_size / config.seconds_per_chunk:g}"
        )
    # more grids than can ever come, each of a single cell, so that chunks end at numbers of grids
    most = pixels.max_frames // pixels.temporal_patch_size + 1
    chunks = interleave(Interleaved(Grid(most, 1, 1, seconds), 0), config)
    # the last one has no end
    return [chunk.end for chunk in chunks[:-1]] + [most + 1]


def _add_usage(a: Usage, b: Usage) -> Usage:
    sums = {}
    for field in dataclasses.fields(Usage):
        sums[field.name] = getattr(a, field.name) + getattr(b, field.name)
    return Usage(**sums)
