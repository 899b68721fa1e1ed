"""Pictures and videos to rows of patches (spec 2.4 and 2.5; reference ``Qwen2VLImageProcessor`` and the official
utilities' choice of frames and of their size)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing.layout import VisionInput

MOST_ELONGATED = 200  # longer side over shorter side


@dataclass(frozen=True)
class PixelSettings:
    """How pictures become patches; the numbers are those of the published ``preprocessor_config.json``.

    The file says nothing about videos; their budgets are those of the official utilities.
    """

    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    video_min_pixels: int = 128 * 28 * 28  # a frame
    video_max_pixels: int = 768 * 28 * 28
    video_total_pixels: int = 90_316_800  # a video
    min_frames: int = 4
    max_frames: int = 768
    fps: float = 2.0

    @property
    def cell(self) -> int:
        """Pixels on the side of a merged cell."""
        return self.patch_size * self.merge_size


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The size nearest to a picture's, in whole cells and within a budget of pixels, that about keeps its shape.

    Sides are rounded half to even, as the reference does.

    Raises:
      InputError: if the picture has no pixels, or is more than 200 times as long as wide.
    """
    if min(height, width) < 1:
        raise InputError(f"a picture of {width} x {height} pixels has nothing to see")
    if max(height, width) / min(height, width) > MOST_ELONGATED:
        raise InputError(f"{width} x {height} pixels: one side is over {MOST_ELONGATED} times the other; crop it")
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
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
        raise InputError(f"the video has {total} frames to look at; at least {settings.temporal_patch_size} are needed")
    factor = settings.temporal_patch_size
    if "nframes" in options:
        frames = round(options["nframes"] / factor) * factor
        if not factor <= frames <= total:
            raise InputError(
                f"nframes is {options['nframes']}; this video allows {factor} to {total // factor * factor}"
            )
        return frames
    fewest = math.ceil(settings.min_frames / factor) * factor
    most = min(settings.max_frames, total) // factor * factor
    wanted = total / native_fps * options.get("fps", settings.fps)
    return int(min(max(wanted, fewest), most, total) // factor * factor)


def frame_indices(total: int, frames: int) -> np.ndarray:
    """Which ``frames`` of ``total`` are looked at, evenly spaced from the first to the last; int [frames].

    Computed in float32 from both ends, because ``torch.linspace`` of the official utilities is, and ties depend on it.
    """
    if frames == 1:
        return np.zeros(1, int)
    step = np.float32(total - 1) / np.float32(frames - 1)
    number = np.arange(frames, dtype=np.float32)
    last = np.float32(total - 1)
    points = np.where(number < frames // 2, step * number, last - step * (np.float32(frames - 1) - number))
    return points.round().astype(int)


def image_input(picture: Image.Image, settings: PixelSettings, options: Mapping[str, Any]) -> VisionInput:
    """A picture as the model takes it: the encoder sees it twice, as a video that does not move.

    Args:
      picture: in RGB.
      settings: the sizes.
      options: may carry ``min_pixels`` and ``max_pixels``.
    """
    low, high = _budget(options, settings.min_pixels, settings.max_pixels)
    height, width = smart_resize(picture.height, picture.width, settings.cell, low, high)
    resized = _resize(picture, height, width)
    frames = np.repeat(resized[None], settings.temporal_patch_size, axis=0)
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
    factor = settings.temporal_patch_size
    resized, size = [], (0, 0)
    for frame in frames:
        if not resized:
            size = video_size(frame.height, frame.width, -(-count // factor) * factor, settings, options)
        resized.append(_resize(frame, *size))
    resized += [resized[-1]] * (-len(resized) % factor)
    patches, grid = patchify(np.stack(resized), settings)
    return VisionInput(patches, grid, "video", factor / fps)


def video_size(
    height: int, width: int, frames: int, settings: PixelSettings, options: Mapping[str, Any]
) -> tuple[int, int]:
    """The size of a video's frames: a frame's budget shrinks as there are more of them."""
    shared = settings.video_total_pixels / frames * settings.temporal_patch_size
    low = options.get("min_pixels", settings.video_min_pixels)
    most = max(min(settings.video_max_pixels, shared), int(low * 1.05))
    low, high = _budget({**options, "max_pixels": min(options.get("max_pixels", most), most)}, low, most)
    return smart_resize(height, width, settings.cell, low, high)


def _budget(options: Mapping[str, Any], low: float, high: float) -> tuple[float, float]:
    """The fewest and most pixels; a bound that the user gives moves the default of the other out of its way."""
    if "min_pixels" in options and "max_pixels" in options and options["min_pixels"] > options["max_pixels"]:
        raise InputError(f"min_pixels {options['min_pixels']} is over max_pixels {options['max_pixels']}")
    if "max_pixels" in options:
        high = options["max_pixels"]
        return min(options.get("min_pixels", low), high), high
    low = options.get("min_pixels", low)
    return low, max(low, high)


def _resize(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]"""
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def patchify(frames: np.ndarray, settings: PixelSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Cuts frames into patches, the four patches of a merged cell side by side.

    Args:
      frames: uint8 [n, height, width, 3], n even and the sides in whole cells.
      settings: the sizes, and what pixels are normalised by.

    Returns:
      float32 [t * rows * columns, 3 * 2 * 14 * 14] with a patch's numbers in the order channel, frame, row, column; and
      the grid (t, rows, columns) in patches.
    """
    n, height, width, _ = frames.shape
    deep, patch, merge = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    grid = n // deep, height // patch, width // patch
    split = frames.reshape(grid[0], deep, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3)
    ordered = split.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, cell row, cell column, row, column; channel, frame, y, x
    ordered = ordered.reshape(math.prod(grid), 3, deep * patch**2)
    values = _normalised(settings)
    out = np.empty(ordered.shape, np.float32)
    for channel in range(3):
        out[:, channel] = values[channel][ordered[:, channel]]
    return out.reshape(len(out), -1), grid


def _normalised(settings: PixelSettings) -> np.ndarray:
    """What each level of a channel becomes, rounded where the reference rounds; float32 [3, 256]."""
    levels = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = np.array(settings.image_mean, np.float32), np.array(settings.image_std, np.float32)
    return (levels - mean[:, None]) / std[:, None]
