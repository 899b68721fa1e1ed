"""Pictures and videos to patches (docs/reference.md, 2.4 and 2.5).

The references are ``Qwen2VLImageProcessor``, and the official utilities for the choice of frames and of their size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing.layout import TokenBudget, VisionInput

MAX_ASPECT_RATIO = 200  # longer side over shorter side
MAX_NATIVE_FPS = 1000.0
_MAX_JITTER_SECONDS = 0.1  # and half a frame, by which frames of a constant rate may be off
_MAX_LATE_SECONDS = 0.5  # by which pictures may begin after their file, and still count as beginning with it


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches; the numbers are those of the published ``preprocessor_config.json``.

    The file says nothing about videos; their budgets are those of the official utilities.
    """

    # of a picture; the reference's class has a far smaller default for the largest
    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    patch_size: int = 14  # pixels on a side
    temporal_patch_size: int = 2  # frames that one patch covers
    merge_size: int = 2  # patches on the side of a cell, which becomes one token
    # of red, green and blue, where pixels are 0 to 1
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    # budgets of videos
    video_min_pixels: int = 128 * 28 * 28  # a frame
    video_max_pixels: int = 768 * 28 * 28
    video_total_pixels: int = 90_316_800  # a video
    min_frames: int = 4
    max_frames: int = 768
    fps: float = 2.0  # frames that are looked at in a second

    @property
    def cell(self) -> int:
        """Pixels on the side of a merged cell."""
        return self.patch_size * self.merge_size

    def find_differences(self, changes: Mapping[str, float]) -> list[tuple[str, float, float]]:
        """Fields that would change, each with its new and its own value."""
        fields = [(name, value, getattr(self, name)) for name, value in changes.items()]
        return [(name, value, own) for name, value, own in fields if value != own]

    def with_changes(self, changes: Mapping[str, float]) -> PixelSettings:
        """The same with other values of some fields; a new maximum takes a higher minimum down with it."""
        changed = dataclasses.replace(self, **changes)
        return dataclasses.replace(
            changed,
            min_pixels=min(changed.min_pixels, changed.max_pixels),
            video_min_pixels=min(changed.video_min_pixels, changed.video_max_pixels),
            min_frames=min(changed.min_frames, changed.max_frames),
        )


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size nearest to a picture's, a multiple of a cell and within a budget of pixels, that about keeps its shape.

    Sides are rounded half to even, as the reference does.

    Raises:
      InputError: if the picture has no pixels, or is more than 200 times as long as wide.
    """
    if min(height, width) < 1:
        raise InputError(f"a picture of {width} x {height} pixels is empty")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise InputError(f"{width} x {height} pixels: one side is over {MAX_ASPECT_RATIO} times the other; crop it")
    # in cells; the budgets are compared with the rounded size
    rows = round(height / factor)
    columns = round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        # rounded down, so that the size is within the budget; a thin picture keeps a cell
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        # rounded up, for the same reason; sides that were rounded to nothing grow, too
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


def smart_nframes(total: int, native_fps: float, settings: PixelSettings, options: Mapping[str, Any]) -> int:
    """How many of ``total`` frames are looked at: about ``fps`` a second, within bounds and even, or what is asked for.

    Args:
      total: frames in the range of the video that is used.
      native_fps: of the video.
      settings: gives bounds and the default rate.
      options: may carry ``fps`` or ``nframes``.

    Raises:
      InputError: if there are too few frames.
    """
    if total < settings.temporal_patch_size:
        raise InputError(
            f"the video has {total} frames to look at; at least {settings.temporal_patch_size} are needed "
            "(send a single one as a picture)"
        )
    # frames are taken in pairs, as many as a patch covers
    factor = settings.temporal_patch_size
    if "nframes" in options:
        frames = round(options["nframes"] / factor) * factor
        max_frames = min(total, max(settings.max_frames, PixelSettings.max_frames)) // factor * factor
        if not factor <= frames <= max_frames:
            raise InputError(f"nframes is {options['nframes']}; this video allows {factor} to {max_frames}")
        return frames
    # a short video may have fewer frames than the minimum, so the number of its frames has the last word
    min_frames = math.ceil(settings.min_frames / factor) * factor
    max_frames = min(settings.max_frames, total) // factor * factor
    wanted = total / native_fps * options.get("fps", settings.fps)
    return int(min(max(wanted, min_frames), max_frames, total) // factor * factor)


def frame_indices(total: int, frames: int) -> np.ndarray:
    """Which ``frames`` of ``total`` are looked at, evenly spaced from the first to the last; int [frames].

    Computed in float32 from both ends, because ``torch.linspace`` of the official utilities is, and ties depend on it.
    """
    if frames == 1:
        return np.zeros(1, int)
    step = np.float32(total - 1) / np.float32(frames - 1)
    number = np.arange(frames, dtype=np.float32)  # [frames]
    last = np.float32(total - 1)
    # the first half is counted up from 0, the second down from the end
    points = np.where(number < frames // 2, step * number, last - step * (np.float32(frames - 1) - number))
    return points.round().astype(int)


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are looked at.

    Attributes:
      indices: of the frames, in order; at a variable rate one may be looked at more than once. int [n]
      fps: frames a second among those that were chosen.
    """

    indices: np.ndarray
    fps: float


def choose_frames(
    times: np.ndarray, stated_fps: float, settings: PixelSettings, options: Mapping[str, Any]
) -> FrameChoice:
    """Chooses frames by their time stamps.

    At a constant rate the choice, and the rate that ids are made of, are the official utilities': published weights
    were trained on them. At a variable rate, and where the pictures begin later than the file, frames are those nearest
    to an even grid of times, and the rate is the grid's.

    Args:
      times: seconds since the file's beginning at which each frame shows, in order; float64 [frames].
      stated_fps: frames a second as the file's header says; 0 if it does not.
      settings: gives bounds and the default rate.
      options: may carry ``fps`` or ``nframes``, ``video_start`` and ``video_end`` (seconds since the file's beginning).

    Raises:
      InputError: if no frame, or too few, lie in the range.
    """
    # the frames of the range
    begin = options.get("video_start", 0.0)
    end = options.get("video_end", math.inf)
    inside = np.flatnonzero((times >= begin) & (times <= end))
    if not len(inside):
        raise InputError(f"no frame lies in the range {begin:g} to {end:g} s; the last is at {times[-1]:.2f} s")
    shown = times[inside]
    is_late = times[0] > _MAX_LATE_SECONDS and begin < times[0]
    # the whole file decides first: a range of it has the same frames and ids as it has there
    rate = None if is_late else _constant_rate(times, stated_fps) or _constant_rate(shown, 0.0)
    if rate is not None:
        count = smart_nframes(len(inside), _check_rate(rate), settings, options)
        return FrameChoice(inside[frame_indices(len(inside), count)], count / len(inside) * rate)
    # no constant rate: the grid goes from the first frame to the last; where the pictures begin late, from the range's
    # beginning, so that their ids agree with the sound's
    first = begin if is_late else float(shown[0])
    mean_rate = max(len(inside) - 1, 1) / (float(shown[-1]) - first)
    count = smart_nframes(len(inside), _check_rate(mean_rate), settings, options)
    grid = np.linspace(first, shown[-1], count)
    nearest = _nearest_indices(shown, grid)
    return FrameChoice(inside[nearest], (count - 1) / float(grid[-1] - grid[0]))


def _constant_rate(times: np.ndarray, stated_fps: float) -> float | None:
    """Frames a second; None if some frame is far from where an even rate would have it.

    It is what the header states, unless the times are against that by over two frames.
    """
    span = float(times[-1] - times[0])
    intervals = len(times) - 1
    if span <= 0:
        return stated_fps or 1.0
    measured = intervals / span
    deviation = np.abs(times - times[0] - np.arange(len(times)) / measured)  # [frames], seconds
    if deviation.max() > max(0.5 / measured, _MAX_JITTER_SECONDS):
        return None
    # the header's number is the more exact one: time stamps of some containers are whole milliseconds
    agrees = stated_fps > 0 and abs(intervals / stated_fps - span) <= 2 / stated_fps + 0.001 * span
    return stated_fps if agrees else measured


def _check_rate(fps: float) -> float:
    if not 0 < fps < MAX_NATIVE_FPS:
        raise InputError(f"its frames come at {fps:g} a second, which cannot be; re-encode it")
    return fps


def _nearest_indices(times: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of each wanted time the nearest of ``times``, which are in order; the earlier one of two as near; int [n]."""
    after = np.searchsorted(times, wanted).clip(1, len(times) - 1)  # [n]
    is_nearer = times[after] - wanted < wanted - times[after - 1]  # [n]
    return np.where(is_nearer, after, after - 1)


class FrameResizer:
    """Brings the frames of a video to the size that the encoder takes, one by one."""

    def __init__(self, settings: PixelSettings, options: Mapping[str, Any], budget: TokenBudget | None = None) -> None:
        """``options`` may carry ``min_pixels`` and ``max_pixels`` of a frame; over ``budget`` none is resized."""
        self._settings = settings
        self._options = options
        self._budget = budget
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: Image.Image, count: int) -> Image.Image:
        """Resizes one of ``count`` frames in RGB; all get the size that follows from the first."""
        if self._size is None:
            # frames share a budget of pixels, in which an odd last one counts twice
            factor = self._settings.temporal_patch_size
            even_count = -(-count // factor) * factor
            self._size = video_size(frame.height, frame.width, even_count, self._settings, self._options)
            _check_tokens(even_count // factor, *self._size, self._settings, self._budget)
        height, width = self._size
        return frame.resize((width, height), Image.Resampling.BICUBIC)


def image_input(
    picture: Image.Image, settings: PixelSettings, options: Mapping[str, Any], budget: TokenBudget | None = None
) -> VisionInput:
    """A picture as the model takes it: the encoder sees it twice, as a video that does not move.

    Args:
      picture: in RGB.
      settings: the sizes.
      options: may carry ``min_pixels`` and ``max_pixels``.
      budget: of the prompt; without one, the picture may take any number of tokens.

    Raises:
      InputError: if it is too thin, ``min_pixels`` is over the model's maximum, or it is over the budget.
    """
    # what the published model takes, where the settings have less for pictures of which nothing is said
    ceiling = max(settings.max_pixels, PixelSettings.max_pixels)
    bounded = _limit_max_pixels(options, ceiling)
    low, high = _pixel_budget(bounded, settings.min_pixels, settings.max_pixels, ceiling)
    height, width = smart_resize(picture.height, picture.width, settings.cell, low, high)
    _check_tokens(1, height, width, settings, budget)
    resized = _resize(picture, height, width)  # [height, width, 3]
    frames = np.repeat(resized[None], settings.temporal_patch_size, axis=0)  # [2, height, width, 3]
    patches, grid = patchify(frames, settings)
    return VisionInput(patches, grid)


def video_input(
    frames: Iterable[Image.Image], count: int, fps: float, settings: PixelSettings, options: Mapping[str, Any]
) -> VisionInput:
    """A video as the model takes it.

    Args:
      frames: in RGB and of one size; each is resized as it comes, so that none is kept in full.
      count: how many there are; if odd, the last is shown twice.
      fps: frames a second among these frames.
      settings: the sizes and budgets.
      options: may carry ``min_pixels`` and ``max_pixels`` of a frame.
    """
    resize = FrameResizer(settings, options)
    return pack_frames([resize(frame, count) for frame in frames], fps, settings)


def pack_frames(
    frames: Sequence[Image.Image], fps: float, settings: PixelSettings, num_bad_packets: int = 0
) -> VisionInput:
    """Frames of a video that have their size already; if their number is odd, the last is shown twice.

    Args:
      frames: in RGB, as ``FrameResizer`` gives them.
      fps: frames a second among these frames.
      settings: the sizes.
      num_bad_packets: of the file, that do not decode and are left out.
    """
    factor = settings.temporal_patch_size
    pixels = [np.asarray(frame) for frame in frames]  # [height, width, 3] each
    pixels += [pixels[-1]] * (-len(pixels) % factor)
    patches, grid = patchify(np.stack(pixels), settings)
    # the true rate, and not that of the call, which the reference takes for all videos
    return VisionInput(patches, grid, "video", factor / fps, num_bad_packets)


def video_size(
    height: int, width: int, frames: int, settings: PixelSettings, options: Mapping[str, Any]
) -> tuple[int, int]:
    """The size of a video's frames: a frame's budget shrinks as there are more of them."""
    shared = settings.video_total_pixels / frames * settings.temporal_patch_size
    low = options.get("min_pixels", settings.video_min_pixels)
    # the minimum comes first, as in the official utilities: many frames that must be large share no budget
    high = max(min(settings.video_max_pixels, shared), int(low * 1.05))
    ceiling = max(settings.video_max_pixels, PixelSettings.video_max_pixels)
    low, high = _pixel_budget(_limit_max_pixels(options, high), low, high, ceiling)
    return smart_resize(height, width, settings.cell, low, high)


def _limit_max_pixels(options: Mapping[str, Any], high: float) -> Mapping[str, Any]:
    """The options with a ``max_pixels`` of at most ``high``, if they have one: larger ones ask for nothing more."""
    return {**options, "max_pixels": min(options["max_pixels"], high)} if "max_pixels" in options else options


def _pixel_budget(options: Mapping[str, Any], low: float, high: float, ceiling: float) -> tuple[float, float]:
    """Least and largest number of pixels; a bound that the user sets moves the default of the other out of its way.

    Args:
      options: may carry ``min_pixels`` and ``max_pixels``.
      low, high: without them.
      ceiling: that ``min_pixels`` may have.
    """
    if options.get("min_pixels", 0) > ceiling:
        raise InputError(
            f"min_pixels is {options['min_pixels']}; it must be at most {ceiling}, the most that the model takes"
        )
    if "min_pixels" in options and "max_pixels" in options and options["min_pixels"] > options["max_pixels"]:
        raise InputError(f"min_pixels {options['min_pixels']} is over max_pixels {options['max_pixels']}")
    if "max_pixels" in options:
        high = options["max_pixels"]
        return min(options.get("min_pixels", low), high), high
    low = options.get("min_pixels", low)
    return low, max(low, high)


def _check_tokens(num_grids: int, height: int, width: int, settings: PixelSettings, budget: TokenBudget | None) -> None:
    """Raises InputError if frames of this size, two in a grid, are over the budget."""
    if budget is not None:
        budget.check(num_grids * (height // settings.cell) * (width // settings.cell))


def _resize(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, settings: PixelSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cuts frames into patches, the four patches of a merged cell side by side.

    Args:
      frames: uint8 [n, height, width, 3], n even and the sides multiples of a cell.
      settings: the sizes, and what pixels are normalised by.

    Returns:
      float32 [t * rows * columns, 3 * 2 * 14 * 14] with a patch's values in the order channel, frame, row, column; and
      the grid (t, rows, columns) in patches.
    """
    # as the reference reshapes and transposes: patches of a cell are neighbours, channels come before frames in a patch
    n, height, width, _ = frames.shape
    deep = settings.temporal_patch_size
    patch = settings.patch_size
    merge = settings.merge_size
    grid = n // deep, height // patch, width // patch
    # [t, deep, cell rows, merge, patch, cell columns, merge, patch, 3]
    split = frames.reshape(grid[0], deep, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    ordered = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, cell row, cell column, row, column; channel, frame, y, x
    # [patches, 3, deep * patch * patch]
    ordered = ordered.reshape(math.prod(grid), 3, deep * patch**2)
    # one look-up a pixel is exact, and faster than arithmetic
    values = _normalized_levels(settings)  # [3, 256]
    out = np.empty(ordered.shape, np.float32)
    for channel in range(3):
        out[:, channel] = values[channel][ordered[:, channel]]
    return out.reshape(len(out), -1), grid


def _normalized_levels(settings: PixelSettings) -> np.ndarray:
    """What each level of a channel becomes, rounded where the reference rounds; float32 [3, 256]."""
    # the reference scales in float64 and normalises in float32
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)  # [256]
    mean = np.array(settings.image_mean, np.float32)
    std = np.array(settings.image_std, np.float32)
    return (levels - mean[:, None]) / std[:, None]
