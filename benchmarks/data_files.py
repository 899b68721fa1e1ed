"""The media that ``bench.py data`` reads: a sound, a picture and two videos of usual sizes, made once a run."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image

RATE = 44_100
NAMES = {"sound, 20 s": "sound.wav", "picture, 1280 x 960": "picture.jpg"}
NAMES |= {"silent video, 10 s of 640 x 360": "silent.mp4", "video with sound, the same": "video.mp4"}


def write_media(folder: Path, seconds: tuple[int, int] = (20, 10), size: tuple[int, int] = (1280, 960)) -> None:
    """Writes them.

    Args:
      folder: to write them in.
      seconds: of the sound, and of the videos.
      size: width and height of the picture.
    """
    rng = np.random.default_rng(0)
    with av.open(folder / "sound.wav", "w") as file:
        sound = file.add_stream("pcm_s16le", rate=RATE, layout="stereo")
        _mux(file, sound, _sound(seconds[0], rng))
    Image.fromarray(_picture(*size, 0.0, rng)).save(folder / "picture.jpg", quality=90)
    for name in ("silent.mp4", "video.mp4"):
        with av.open(folder / name, "w") as file:
            pictures = file.add_stream("mpeg4", rate=25)
            pictures.width, pictures.height, pictures.pix_fmt = 640, 360, "yuv420p"
            heard = file.add_stream("aac", rate=RATE, layout="stereo") if name == "video.mp4" else None
            _mux(file, pictures, _pictures(25 * seconds[1], rng))
            if heard is not None:
                _mux(file, heard, _sound(seconds[1], rng))


def _mux(file: OutputContainer, stream: av.VideoStream | av.AudioStream, frames: Iterator) -> None:
    for frame in frames:
        file.mux(stream.encode(frame))
    file.mux(stream.encode(None))


def _sound(seconds: int, rng: np.random.Generator) -> Iterator[av.AudioFrame]:
    times = np.arange(seconds * RATE) / RATE
    wave = 0.3 * np.sin(2 * np.pi * 220 * times * (1 + 0.1 * np.sin(times))) + 0.02 * rng.standard_normal(len(times))
    samples = (32767 * np.stack([wave, 0.5 * wave], 1)).clip(-32768, 32767).astype(np.int16)
    for begin in range(0, len(samples), 1024):
        frame = av.AudioFrame.from_ndarray(samples[begin : begin + 1024].reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, begin, Fraction(1, RATE)
        yield frame


def _pictures(count: int, rng: np.random.Generator) -> Iterator[av.VideoFrame]:
    for i in range(count):
        yield av.VideoFrame.from_ndarray(_picture(640, 360, i / 25, rng), format="rgb24")


def _picture(width: int, height: int, time: float, rng: np.random.Generator) -> np.ndarray:
    """Waves that move, and a little noise, so that it does not compress to nothing."""
    x, y = np.arange(width) / width, np.arange(height)[:, None] / height
    waves = [np.sin(2 * np.pi * (a * x + b * y + time)) for a, b in ((3, 1), (1, 4), (5, 5))]
    return (128 + 100 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 1))).clip(0, 255).astype(np.uint8)
