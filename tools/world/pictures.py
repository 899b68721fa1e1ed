"""Drawn pictures of coloured shapes and of words, and videos of them with sound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from tools.world.vocabulary import COLOURS

SIDE = 112  # pixels of a picture: four tokens each way
FRAME_RATE = 8  # frames a second of a video
SOUND_RATE = 16_000
_FINER = 4  # drawn so many times larger, then made smaller, so that edges are smooth
_SOUND_FRAME = 1024  # samples of a frame of AAC


@dataclass(frozen=True)
class Thing:
    """A shape in a picture; lengths in widths of the picture."""

    shape: str
    colour: str
    """Its name, or #rrggbb of one that has none."""
    x: float
    """Of its centre, from the left."""
    y: float
    """From the top."""
    radius: float = 0.14
    angle: float = 0.0
    """Turned by, in radians."""


@dataclass(frozen=True)
class Ground:
    """What things are drawn on."""

    level: int = 20
    """Of all three colours, 0 to 255."""
    noise: float = 0.0
    """Standard deviation of what is added to every pixel."""
    seed: int = 0
    """Of the noise."""


def _polygon(corners: Sequence[tuple[float, float]], thing: Thing) -> list[tuple[float, float]]:
    """Corners in radii of a thing, turned and moved to where it is, in pixels of the large picture."""
    cosine = math.cos(thing.angle)
    sine = math.sin(thing.angle)
    scale = SIDE * _FINER
    placed = []
    for x, y in corners:
        turned_x = x * cosine - y * sine
        turned_y = x * sine + y * cosine
        placed.append(((thing.x + thing.radius * turned_x) * scale, (thing.y + thing.radius * turned_y) * scale))
    return placed


def _points(count: int, radii: Sequence[float], start: float = -math.pi / 2) -> list[tuple[float, float]]:
    """Points around a centre, at radii that are taken in turn."""
    angles = [start + 2 * math.pi * index / count for index in range(count)]
    return [
        (radii[index % len(radii)] * math.cos(angle), radii[index % len(radii)] * math.sin(angle))
        for index, angle in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    times = np.linspace(0, 2 * math.pi, 60)
    x = 16 * np.sin(times) ** 3
    y = 13 * np.cos(times) - 5 * np.cos(2 * times) - 2 * np.cos(3 * times) - np.cos(4 * times)
    return [(float(a), float(b)) for a, b in zip(x / 16, -y / 16, strict=True)]


def _angles(start: float, end: float) -> list[float]:
    return [float(angle) for angle in np.linspace(start, end, 30)]


def _moon() -> list[tuple[float, float]]:
    """A crescent: the left of a circle without the circle that is half a radius to the right of it."""
    outer = [(1.15 * math.cos(angle), 1.15 * math.sin(angle)) for angle in _angles(0.3 * math.pi, 1.7 * math.pi)]
    tip_x, tip_y = outer[-1]
    inner_end = math.atan2(tip_y, tip_x - 0.5)
    radius = math.hypot(tip_x - 0.5, tip_y)
    inner = [
        (0.5 + radius * math.cos(angle), radius * math.sin(angle))
        for angle in _angles(inner_end, -inner_end - 2 * math.pi)
    ]
    return [*outer, *inner]


_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _points(48, (1.0,)),
    "ring": _points(48, (1.0,)),
    "square": _points(4, (1.15,), math.pi / 4),
    "diamond": [(0, -1.25), (0.75, 0), (0, 1.25), (-0.75, 0)],
    "triangle": _points(3, (1.2,)),
    "star": _points(10, (1.25, 0.5)),
    "cross": [
        *((-0.35, -1.1), (0.35, -1.1), (0.35, -0.35), (1.1, -0.35), (1.1, 0.35), (0.35, 0.35)),
        *((0.35, 1.1), (-0.35, 1.1), (-0.35, 0.35), (-1.1, 0.35), (-1.1, -0.35), (-0.35, -0.35)),
    ],
    "heart": _heart(),
    "arrow": [(-1.2, -0.35), (0.1, -0.35), (0.1, -1), (1.2, 0), (0.1, 1), (0.1, 0.35), (-1.2, 0.35)],
    "moon": _moon(),
    "drop": [(0, -1.35), *((0.8 * math.cos(angle), 0.3 + 0.8 * math.sin(angle)) for angle in _angles(-0.4, 3.54))],
    "house": [(0, -1.25), (1.15, -0.25), (0.8, -0.25), (0.8, 1), (-0.8, 1), (-0.8, -0.25), (-1.15, -0.25)],
}
# presets of little work: these pictures and sounds are simple. With x264's macroblock tree one video in hundreds has
# other bytes when it is made again, even in one thread
_X264 = {"crf": "18", "threads": "1", "preset": "veryfast", "mbtree": "0"}
_AAC = {"aac_coder": "fast"}
_HOLE = 0.55  # of a ring, in its radii


def draw_picture(things: Sequence[Thing], ground: Ground, sign: str = "") -> np.ndarray:
    """Draws things in their order, and a word over them.

    Args:
      things: what is in it.
      ground: what is behind them.
      sign: a word, written across the middle; "" for none.

    Returns:
      [SIDE, SIDE, 3], uint8.
    """
    empty = (ground.level,) * 3
    image = Image.new("RGB", (SIDE * _FINER, SIDE * _FINER), empty)
    pen = ImageDraw.Draw(image)
    for thing in things:
        colour = COLOURS.get(thing.colour) or ImageColor.getrgb(thing.colour)
        pen.polygon(_polygon(_OUTLINES[thing.shape], thing), fill=colour)
        if thing.shape == "ring":
            hole = [(x * _HOLE, y * _HOLE) for x, y in _OUTLINES["ring"]]
            pen.polygon(_polygon(hole, thing), fill=empty)
    if sign:
        middle = SIDE * _FINER / 2
        pen.text((middle, middle), sign, fill=(250, 250, 250), font=ImageFont.load_default(26 * _FINER), anchor="mm")
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    if ground.noise:
        pixels = pixels + np.random.default_rng(ground.seed).normal(0, ground.noise, pixels.shape)
    return np.clip(np.round(pixels), 0, 255).astype(np.uint8)


def read_frames(path: Path) -> tuple[list[np.ndarray], bool]:
    """All frames of a video, each [height, width, 3], uint8, and whether it has sound."""
    with av.open(str(path)) as container:
        has_sound = bool(container.streams.audio)
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], has_sound


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """Writes a picture as PNG.

    Args:
      path: the file.
      pixels: [height, width, 3], uint8.
    """
    Image.fromarray(pixels).save(path, format="png")


def write_video(path: Path, frames: Sequence[np.ndarray], sound: np.ndarray | None) -> None:
    """Writes a video as MP4: H.264, and AAC where it has sound.

    Args:
      path: the file.
      frames: [SIDE, SIDE, 3] each, uint8, FRAME_RATE a second.
      sound: [samples], float32 from -1 to 1, SOUND_RATE a second; None: it is silent.
    """
    with av.open(str(path), "w", format="mp4") as container:
        pictures = container.add_stream("libx264", rate=FRAME_RATE, options=_X264)
        pictures.width = SIDE
        pictures.height = SIDE
        pictures.pix_fmt = "yuv420p"
        track = None if sound is None else container.add_stream("aac", rate=SOUND_RATE, layout="mono", options=_AAC)
        for pixels in frames:
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(pictures.encode(None))
        if sound is not None and track is not None:
            for start in range(0, len(sound), _SOUND_FRAME):
                part = np.ascontiguousarray(sound[None, start : start + _SOUND_FRAME], np.float32)
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout="mono")
                frame.sample_rate = SOUND_RATE
                frame.pts = start
                frame.time_base = Fraction(1, SOUND_RATE)
                container.mux(track.encode(frame))
            container.mux(track.encode(None))
