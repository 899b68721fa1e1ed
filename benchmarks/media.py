"""The media that ``bench.py data`` reads: a sound, a picture and two videos of usual sizes, made once a run."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from PIL import Image

SAMPLE_RATE = 44_100
FRAME_RATE = 25
VIDEO_SIZE = (640, 360)
FILES = {
    "sound, 20 s": "sound.wav",
    "picture, 1280 x 960": "picture.jpg",
    "silent video, 10 s of 640 x 360": "silent.mp4",
    "video with sound, the same": "video.mp4",
}
WITH_SOUND = "video.mp4"


def write_media(
    folder: Path, sound_seconds: int = 20, video_seconds: int = 10, size: tuple[int, int] = (1280, 960)
) -> None:
    """Writes them.

    Args:
      folder: to write them in.
      sound_seconds: of the sound.
      video_seconds: of the videos.
      size: width and height of the picture.
    """
    rng = np.random.default_rng(0)
    # stereo at 44.1 kHz, so that mixing and resampling are part of the time
    with av.open(folder / "sound.wav", "w") as file:
        stream = file.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="stereo")
        _mux(file, stream, _make_audio_frames(sound_seconds, rng))
    Image.fromarray(_make_picture(*size, 0.0, rng)).save(folder / "picture.jpg", quality=90)
    for name in ("silent.mp4", WITH_SOUND):
        with av.open(folder / name, "w") as file:
            video = file.add_stream("mpeg4", rate=FRAME_RATE)
            video.width, video.height = VIDEO_SIZE
            video.pix_fmt = "yuv420p"
            # both streams before the first packet: the header lists them
            audio = None
            if name == WITH_SOUND:
                audio = file.add_stream("aac", rate=SAMPLE_RATE, layout="stereo")
            _mux(file, video, _make_video_frames(FRAME_RATE * video_seconds, rng))
            if audio is not None:
                _mux(file, audio, _make_audio_frames(video_seconds, rng))


def _mux(file: OutputContainer, stream: av.VideoStream | av.AudioStream, frames: Iterator) -> None:
    for frame in frames:
        file.mux(stream.encode(frame))
    # what the encoder has held back
    file.mux(stream.encode(None))


def _make_audio_frames(seconds: int, rng: np.random.Generator) -> Iterator[av.AudioFrame]:
    """A tone that glides, with a little noise, and half as loud on the right."""
    times = np.arange(seconds * SAMPLE_RATE) / SAMPLE_RATE
    tone = 0.3 * np.sin(2 * np.pi * 220 * times * (1 + 0.1 * np.sin(times)))
    left = tone + 0.02 * rng.standard_normal(len(times))
    stereo = np.stack([left, 0.5 * left], axis=1)  # [samples, 2]
    samples = (32767 * stereo).clip(-32768, 32767).astype(np.int16)
    # 1024 samples is what AAC takes at a time
    for start in range(0, len(samples), 1024):
        # s16 is not planar: left and right in turns, in one row
        packed = samples[start : start + 1024].reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="stereo")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = start
        frame.time_base = Fraction(1, SAMPLE_RATE)
        yield frame


def _make_video_frames(count: int, rng: np.random.Generator) -> Iterator[av.VideoFrame]:
    for i in range(count):
        yield av.VideoFrame.from_ndarray(_make_picture(*VIDEO_SIZE, i / FRAME_RATE, rng), format="rgb24")


def _make_picture(width: int, height: int, time: float, rng: np.random.Generator) -> np.ndarray:
    """Waves that move, and a little noise, so that it does not compress to nothing. uint8 [height, width, 3]"""
    x = np.arange(width) / width  # [width]
    y = np.arange(height)[:, None] / height  # [height, 1]
    # waves across and down a picture, of red, green and blue
    channels = []
    for across, down in ((3, 1), (1, 4), (5, 5)):
        channels.append(np.sin(2 * np.pi * (across * x + down * y + time)))
    noise = rng.normal(0, 4, (height, width, 1))
    return (128 + 100 * np.stack(channels, axis=-1) + noise).clip(0, 255).astype(np.uint8)
