"""Small good files of every format that is read: what mutants of media are made of."""

from __future__ import annotations

import io
import re
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal

import av
import numpy as np
from PIL import Image

SIZE = (40, 32)  # pixels of pictures
FRAME_SIZE = (64, 48)  # pixels of frames; some encoders take none smaller
NUM_FRAMES = 6
SAMPLE_SECONDS = 0.2
_RATE = 16_000  # Hz
_ORIENTATION = 0x0112  # the tag of EXIF


def draw_picture(mode: str = "RGB", size: tuple[int, int] = SIZE, shift: int = 0) -> Image.Image:
    """A gradient; with an alpha channel, transparent on one side."""
    width, height = size
    rows, columns = np.mgrid[0:height, 0:width]  # [height, width] each
    pixels = np.stack([columns * 6 + shift, rows * 7, rows + columns + shift, columns * 6], -1).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def make_pictures() -> dict[str, bytes]:
    """Pictures in each format and in many of their variants, by name; the format is what stands before the dash."""
    exif = Image.Exif()
    exif[_ORIENTATION] = 6
    frames = [draw_picture("RGB", shift=40 * number) for number in range(3)]
    animated: dict[str, Any] = dict(save_all=True, append_images=frames[1:], duration=100)
    wide = Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE[1], SIZE[0]))
    variants: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *((f"PNG-{mode}", draw_picture(mode), {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("PNG-16", wide, {}),
        ("PNG-animated", frames[0], animated),
        ("PNG-exif", frames[0], dict(exif=exif)),
        ("PNG-transparent", draw_picture("P"), dict(transparency=3)),
        *((f"JPEG-{mode}", draw_picture(mode), dict(exif=exif)) for mode in ("L", "RGB", "CMYK")),
        ("JPEG-progressive", frames[0], dict(progressive=True, quality=50)),
        ("MPO-frames", frames[0], dict(save_all=True, append_images=frames[1:])),
        ("WEBP-lossy", frames[0], dict(exif=exif)),
        ("WEBP-lossless", draw_picture("RGBA"), dict(lossless=True)),
        ("WEBP-animated", frames[0], animated),
        ("GIF-one", draw_picture("P"), dict(transparency=1)),
        ("GIF-animated", frames[0], animated),
        *((f"BMP-{mode}", draw_picture(mode), {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
        *((f"PPM-{mode}", draw_picture(mode), {}) for mode in ("1", "L", "RGB")),
        *((f"JPEG2000-{mode}", draw_picture(mode), {}) for mode in ("L", "RGB", "RGBA")),
        ("AVIF-RGB", frames[0], {}),
        ("AVIF-animated", frames[0], animated),
        ("TIFF-raw", draw_picture("RGBA"), {}),
        ("TIFF-16", wide, {}),
        ("TIFF-CMYK", draw_picture("CMYK"), dict(compression="tiff_lzw")),
        ("TIFF-pages", frames[0], dict(save_all=True, append_images=frames[1:])),
        ("TIFF-group4", draw_picture("1"), dict(compression="group4")),
        *((f"TIFF-{name}", frames[0], dict(compression=name)) for name in ("tiff_adobe_deflate", "packbits", "jpeg")),
    ]
    written = {}
    for name, picture, options in variants:
        file = io.BytesIO()
        # copies, because saving leaves settings of its format in a picture
        options = {
            key: [item.copy() for item in value] if key == "append_images" else value for key, value in options.items()
        }
        picture.copy().save(file, name.partition("-")[0], **options)
        written[name] = _without_dates(file.getvalue()) if name == "AVIF-animated" else file.getvalue()
    written["PPM-text"] = b"P3\n# a comment\n3 2\n255\n" + b"255 0 0  0 255 0  0 0 255\n" * 2
    return written


def _without_dates(data: bytes) -> bytes:
    """An animation of AVIF without when it was made, which stands behind version and flags of three boxes."""
    return re.sub(
        rb"(mvhd|tkhd|mdhd)\x01(...).{16}", lambda box: box[1] + b"\x01" + box[2] + bytes(16), data, flags=re.DOTALL
    )


def make_wav(samples: np.ndarray, width: int) -> bytes:
    """A WAV file of whole numbers of ``width`` bytes."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(2 if samples.ndim == 2 else 1)
        out.setsampwidth(width)
        out.setframerate(_RATE)
        out.writeframes(samples.tobytes())
    return file.getvalue()


# of each file: the format, the encoder of its pictures, and that of its sound
_FORMATS: dict[str, tuple[str, str | None, str | None]] = {
    "wav-float": ("wav", None, "pcm_f32le"),
    "wav-24": ("wav", None, "pcm_s24le"),
    "wav-adpcm": ("wav", None, "adpcm_ms"),
    "w64": ("w64", None, "pcm_s16le"),
    "aiff": ("aiff", None, "pcm_s16be"),
    "caf": ("caf", None, "pcm_s16le"),
    "au": ("au", None, "pcm_mulaw"),
    "flac": ("flac", None, "flac"),
    "mp3": ("mp3", None, "mp3"),
    "ogg-opus": ("ogg", None, "libopus"),
    "ogg-flac": ("ogg", None, "flac"),
    "m4a": ("ipod", None, "aac"),
    "aac": ("adts", None, "aac"),
    "ac3": ("ac3", None, "ac3"),
    "wv": ("wv", None, "wavpack"),
    "mp4-h264": ("mp4", "libx264", "aac"),
    "mp4-mpeg4": ("mp4", "mpeg4", "aac"),
    "mov-mjpeg": ("mov", "mjpeg", "pcm_s16le"),
    "webm-vp8": ("webm", "libvpx", "libopus"),
    "webm-vp9": ("webm", "libvpx-vp9", "libopus"),
    "mkv-ffv1": ("matroska", "ffv1", "flac"),
    "mkv-h264": ("matroska", "libx264", "ac3"),
    "avi-mpeg4": ("avi", "mpeg4", "mp3"),
    "avi-raw": ("avi", "rawvideo", "pcm_s16le"),
    "flv": ("flv", "flv", None),
    "mpegts": ("mpegts", "mpeg2video", "mp2"),
    "asf": ("asf", "wmv2", "wmav2"),
    "gif": ("gif", "gif", None),
    "ivf": ("ivf", "libvpx", None),
    "h264": ("h264", "libx264", None),
}
_RATES = {"libopus": 48_000, "ac3": 48_000, "wmav2": 44_100}  # of encoders that do not take 16 kHz
# with its other presets, what libx264 writes depends on memory that it has not set
_CODEC_OPTIONS = {"libx264": {"preset": "superfast"}}
_PIXEL_FORMATS = {"mjpeg": "yuvj420p", "gif": "rgb8", "rawvideo": "bgr24"}


def make_media() -> dict[str, bytes]:
    """Sounds and videos, by name; encoders that this build of FFmpeg lacks are left out."""
    tone = np.sin(np.arange(round(SAMPLE_SECONDS * _RATE)) / 7) * 0.5
    files = {
        "wav-16": make_wav((tone * 32767).astype(np.int16), 2),
        "wav-stereo": make_wav((np.stack([tone, -tone], 1) * 32767).astype(np.int16), 2),
        "wav-8": make_wav((tone * 127 + 128).astype(np.uint8), 1),
    }
    for name, (kind, picture_codec, sound_codec) in _FORMATS.items():
        codecs = [codec for codec in (picture_codec, sound_codec) if codec is not None]
        if all(codec in av.codecs_available for codec in codecs):
            files[name] = encode_media(kind, picture_codec, sound_codec, tone)
    return files


def encode_media(kind: str, picture_codec: str | None, sound_codec: str | None, tone: np.ndarray) -> bytes:
    """A file of one or two tracks.

    Args:
      kind: the format as FFmpeg names it.
      picture_codec: an encoder of FFmpeg's.
      sound_codec: likewise.
      tone: float [n], at 16 kHz.
    """
    file = io.BytesIO()
    # without random numbers and dates, so that the same bytes come out
    with av.open(file, "w", format=kind, options={"fflags": "+bitexact"}) as container:
        streams: list[tuple[Any, Callable[[Any], Sequence[Any]]]] = []
        if picture_codec is not None:
            stream: Any = container.add_stream(picture_codec, rate=10, options=_CODEC_OPTIONS.get(picture_codec))
            stream.width, stream.height = FRAME_SIZE
            stream.pix_fmt = _PIXEL_FORMATS.get(picture_codec, "yuv420p")
            stream.codec_context.thread_count = 1  # so that the same bytes come out
            streams.append((stream, _make_frames))
        if sound_codec is not None:
            stream = container.add_stream(sound_codec, rate=_RATES.get(sound_codec, _RATE))
            stream.bit_rate = 64_000
            streams.append((stream, lambda encoder: _make_sound(encoder, tone)))
        for stream, make in streams:
            for frame in make(stream.codec_context):
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return file.getvalue()


def _make_frames(encoder: Any) -> list[av.VideoFrame]:
    frames = []
    for number in range(NUM_FRAMES):
        frame = av.VideoFrame.from_image(draw_picture("RGB", FRAME_SIZE, 20 * number)).reformat(format=encoder.pix_fmt)
        frame.pts = number
        frame.time_base = Fraction(1, 10)
        frames.append(frame)
    return frames


def _make_sound(encoder: Any, tone: np.ndarray) -> list[av.AudioFrame]:
    samples = (tone * 32767).astype(np.int16)[None]  # [1, n]
    frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    frame.sample_rate = _RATE
    frame.pts = 0
    encoder.open(strict=False)
    resampler = av.AudioResampler(encoder.format, encoder.layout, encoder.rate, encoder.frame_size or None)
    return [*resampler.resample(frame), *resampler.resample(None)]


def kind_of(name: str) -> Literal["audio", "video"]:
    """What a file of ``make_media`` is read as."""
    return "video" if name in _FORMATS and _FORMATS[name][1] is not None else "audio"
