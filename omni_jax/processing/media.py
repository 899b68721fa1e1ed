"""Decoding: sound and video with PyAV, pictures with Pillow.

A file is read whole or refused: one that ends before what its header promises, or within a packet, is an error. Formats
that are made to be cut anywhere promise nothing (MPEG-TS, MP3 without a Xing header). Every limit is checked on what
the header says before anything large is decoded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image, ImageOps

from omni_jax.errors import InputError
from omni_jax.processing import audio, vision
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.sources import Source, is_located, locate_source
from omni_jax.processing.vision import PixelSettings

MOST_IMAGE_PIXELS = 80_000_000  # of a picture, before it is made smaller
MOST_FRAME_PIXELS = 8192 * 4320  # of a video's frame
MOST_CHANNELS = 8  # of an array of sound

# what ffmpeg may take a file for; playlists, which make it open other files, are not among them
_FORMATS = (
    "3g2,3gp,aac,ac3,aiff,amr,asf,au,avi,caf,eac3,flac,flv,gif,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp3,mp4,mpeg,"
    "mpegts,mpegvideo,ogg,w64,wav,webm,wv"
)
# formats whose header says how long the file is, so that a missing end shows
_KNOW_THEIR_LENGTH = {"wav", "w64", "aiff", "flac", "mov", "matroska", "avi", "au", "caf"}
_SLACK = 0.1  # seconds that a header may be wrong by
_MP3_SLACK = 512  # bytes that one may be wrong by; about a frame


@dataclass(frozen=True)
class Track:
    """What demuxing tells of a stream, without decoding it."""

    times: np.ndarray  # seconds at which its packets show or sound, in order; float64 [packets]
    end: float  # seconds at which the last of them ends


def read_image(source: Any, *, allow_urls: bool = False) -> Image.Image:
    """A picture in RGB, upright; what is transparent becomes white. Of an animation, the first frame.

    Args:
      source: what ``sources.locate_source`` takes, a Pillow image, or uint8 [height, width] or [height, width, 1, 3 or
        4].
      allow_urls: whether to fetch from the web.

    Raises:
      InputError: if it is not a picture, is cut off, or is too large to be decoded safely.
    """
    if isinstance(source, Image.Image):
        return _rgb(source)
    if isinstance(source, np.ndarray):
        return _rgb(_image_of_array(source))
    with locate_source(source, allow_urls=allow_urls).open() as file:
        try:
            picture = Image.open(file)
            _check_pixels(*picture.size, MOST_IMAGE_PIXELS)
            picture.load()
        except Image.DecompressionBombError as e:
            raise InputError(f"it has more pixels than the limit of {MOST_IMAGE_PIXELS}: {e}") from e
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError) as e:
            raise InputError(f"not a picture that can be read: {e}") from e
    return _rgb(picture)


def _check_pixels(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise InputError(f"{width} x {height} pixels are over the limit of {limit}; make it smaller")


def _image_of_array(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape[2:] if pixels.ndim == 3 else (1,)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or shape[0] not in (1, 3, 4):
        given = f"{pixels.dtype} {list(pixels.shape)}"
        raise InputError(f"an array must be uint8 [height, width] or [height, width, 1, 3 or 4], got {given}")
    _check_pixels(pixels.shape[1], pixels.shape[0], MOST_IMAGE_PIXELS)
    return Image.fromarray(pixels[..., 0] if shape == (1,) and pixels.ndim == 3 else pixels)


def _rgb(picture: Image.Image) -> Image.Image:
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"a picture of mode {picture.mode} has no fixed range of brightness; save it as 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, (255, 255, 255))
        white.paste(picture, mask=picture.getchannel("A"))
        return white
    return picture.convert("RGB")


@contextmanager
def _opened(source: Source) -> Iterator[InputContainer]:
    """An open file; whatever goes wrong inside while it is read is an InputError."""
    with source.open() as file:
        try:
            with av.open(file, "r", options={"format_whitelist": _FORMATS}) as container:
                yield container
        except av.error.FFmpegError as e:
            raise InputError(f"cannot decode it: {e.strerror} (is it cut off, or not sound or video at all?)") from e


def probe(source: Source) -> dict[str, Track]:
    """Demuxes a file and tells of its first video and audio streams, those of them that hold anything.

    Raises:
      InputError: if the file cannot be read to the end that its header promises.
    """
    with _opened(source) as container:
        streams = [stream for kind in ("video", "audio") if (stream := _first(container, kind)) is not None]
        if not streams:
            raise InputError(f"it holds neither sound nor video (format {container.format.name})")
        times: dict[int, list[tuple[float, float]]] = {stream.index: [] for stream in streams}
        for packet in container.demux(streams):
            if packet.is_corrupt and not _is_streamed_wav(source):
                raise InputError("it is cut off or damaged: a packet is incomplete")
            if packet.size and not packet.is_discard:
                base = packet.time_base or 0
                begin = float((packet.pts if packet.pts is not None else packet.dts or 0) * base)
                times[packet.stream_index].append((begin, begin + float((packet.duration or 0) * base)))
        tracks = {s.type: _track(times[s.index]) for s in streams if times[s.index]}
        _check_end(container, tracks)
        for stream in streams:
            _check_length_tag(stream, tracks)
        if container.format.name in _TAILS:
            _TAILS[container.format.name](source)
    return tracks


def _first(container: InputContainer, kind: str) -> Any:
    """The first stream of a kind; a cover picture is not a video."""
    streams = [s for s in container.streams if s.type == kind]
    if kind == "video":
        streams = [s for s in streams if not s.disposition & Disposition.attached_pic]
    return streams[0] if streams else None


def _track(packets: list[tuple[float, float]]) -> Track:
    times = np.sort([begin for begin, _ in packets])
    # a packet may not say how long it lasts; then the next would have come after about the usual time
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    return Track(times, max(end if end > begin else begin + usual for begin, end in packets))


def _check_end(container: InputContainer, tracks: Mapping[str, Track]) -> None:
    if container.duration is None or not _KNOW_THEIR_LENGTH & set(container.format.name.split(",")):
        return
    promised = (container.duration + (container.start_time or 0)) / av.time_base
    _check_seconds(max((track.end for track in tracks.values()), default=0.0), promised)


def _check_length_tag(stream: Any, tracks: Mapping[str, Track]) -> None:
    """Matroska has a tag for each of its streams, as hours:minutes:seconds."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))
    if tag and stream.type in tracks:
        hours, minutes, seconds = map(float, tag.groups())
        _check_seconds(tracks[stream.type].end, hours * 3600 + minutes * 60 + seconds)


def _check_seconds(found: float, promised: float) -> None:
    if found + _SLACK < promised:
        raise InputError(f"it is cut off: its header promises {promised:.2f} s, but it ends after {found:.2f} s")


def _check_ogg_end(source: Source) -> None:
    """The last page of an Ogg file must be whole: 27 bytes, a table of the sizes of its pieces, and the pieces."""
    with source.open() as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - (1 << 17)))  # a page is under 64 KiB
        tail = file.read()
    page = tail.rfind(b"OggS")
    table = tail[page + 27 : page + 27 + tail[page + 26]] if page + 26 < len(tail) else b""
    if page + 26 >= len(tail) or page + 27 + tail[page + 26] + sum(table) > len(tail):
        raise InputError("it is cut off: its last page is incomplete")


def _is_streamed_wav(source: Source) -> bool:
    """Whether a WAV file was written without knowing its length: its size is nought, or as large as can be."""
    with source.open() as file:
        head = file.read(8)
    size = int.from_bytes(head[4:], "little")
    return head[:4] == b"RIFF" and (size == 0 or size >= (1 << 31) - 64)


def _check_mp3_end(source: Source) -> None:
    """Compares the bytes that a Xing or Info header promises with those that are there; many files have no such header.

    The header stands in the first frame: its name, four bytes of flags, then each number that a flag announces.
    """
    with source.open() as file:
        head = file.read(10)
        begin = 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        begin = begin if head[:3] == b"ID3" else 0
        file.seek(begin)
        frame, size = file.read(200), file.seek(0, 2) - begin
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    flags = int.from_bytes(frame[place + 4 : place + 8]) if place >= 0 else 0
    if flags & 2:
        number = place + 8 + 4 * (flags & 1)
        promised = int.from_bytes(frame[number : number + 4])
        if size + _MP3_SLACK < promised:
            raise InputError(f"it is cut off: its header promises {promised} bytes of sound, but it holds {size}")


_TAILS = {"mp3": _check_mp3_end, "ogg": _check_ogg_end}


def read_audio(
    source: Any, settings: MelSettings, *, begin: float = 0.0, end: float = math.inf, allow_urls: bool = False
) -> np.ndarray:
    """Sound, mixed to one channel and resampled.

    Args:
      source: what ``sources.locate_source`` takes; of a video, its sound.
      settings: the sampling rate, and the longest sound that is taken.
      begin: seconds from the start of the file.
      end: seconds from the start of the file; what comes later is not read.
      allow_urls: whether to fetch from the web.

    Returns:
      float32 [n], at ``settings.sampling_rate``.

    Raises:
      InputError: if there is no sound, it cannot be read whole, or the range is too long.
    """
    source = locate_source(source, allow_urls=allow_urls)
    tracks = probe(source)
    if "audio" not in tracks:
        raise InputError("it has no sound")
    length = tracks["audio"].end - tracks["audio"].times[0]
    if begin >= length > 0:
        raise InputError(f"the range begins at {begin:g} s, but the sound ends after {length:.2f} s")
    if min(length, end) - begin > settings.max_seconds + _SLACK:  # the exact length is only known once it is decoded
        raise audio.too_long(min(length, end) - begin, settings)
    samples, rate = _decode_audio(source, begin, end, settings)
    return audio.resample(samples, rate, settings.sampling_rate)


def _decode_audio(source: Source, begin: float, end: float, settings: MelSettings) -> tuple[np.ndarray, int]:
    """Mono float32 [n] of a range, and its rate."""
    pieces, rate, position, taken = [], 0, 0, 0
    with _opened(source) as container:
        for frame in container.decode(_first(container, "audio")):
            if frame.is_corrupt or rate not in (0, frame.sample_rate):
                raise InputError("its sound is damaged" if frame.is_corrupt else "its sampling rate changes midway")
            rate = frame.sample_rate
            mono = _mono(frame)
            first = max(0, round(begin * rate) - position)
            last = max(0, round(min(end, 1e9) * rate) - position)
            pieces.append(mono[first:last])
            position, taken = position + len(mono), taken + len(pieces[-1])
            if taken > (settings.max_seconds + _SLACK) * rate:  # its header did not tell
                raise audio.too_long(taken / rate, settings)
            if last < len(mono):
                break
    if not taken:
        raise InputError("it holds no samples of sound in this range")
    return np.concatenate(pieces), rate


def _mono(frame: av.AudioFrame) -> np.ndarray:
    """The mean over the channels of a frame; float32 [n]."""
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    return _unit(samples).mean(axis=0, dtype=np.float32)


def _unit(samples: np.ndarray) -> np.ndarray:
    """Whole numbers of any width to float32 in -1 to 1."""
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    if np.issubdtype(samples.dtype, np.signedinteger):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)


def array_audio(
    samples: np.ndarray, rate: int, settings: MelSettings, *, begin: float = 0.0, end: float = math.inf
) -> np.ndarray:
    """Sound that is samples already, mixed and resampled as ``read_audio`` does.

    Args:
      samples: float in -1 to 1, or whole numbers over their type's range; [n], [channels, n] or [n, channels].
      rate: samples a second.
      settings: the sampling rate that is wanted.
      begin: seconds from the start.
      end: seconds from the start.

    Raises:
      InputError: if it is not sound, or nothing of it lies in the range.
    """
    kind = samples.dtype
    if samples.ndim == 2 and min(samples.shape) <= MOST_CHANNELS:
        samples = _unit(samples).mean(axis=int(np.argmin(samples.shape)))
    if samples.ndim != 1 or not np.issubdtype(kind, np.number) or np.issubdtype(kind, np.complexfloating):
        raise InputError(f"an array of sound must be numbers [n] or [n, channels], got {kind} {list(samples.shape)}")
    samples = _unit(samples)[round(begin * rate) : round(min(end, 1e9) * rate)]
    if not len(samples):
        raise InputError("the array holds no samples in this range")
    if not np.isfinite(samples).all():
        raise InputError("the array holds NaN or infinity")
    return audio.resample(samples, rate, settings.sampling_rate)


@dataclass(frozen=True)
class Video:
    """The frames of a video that are looked at; they are decoded one by one as they are asked for."""

    frames: Iterator[Image.Image]
    count: int
    fps: float  # of these frames
    has_audio: bool


def read_video(source: Any, settings: PixelSettings, options: Mapping[str, Any], *, allow_urls: bool = False) -> Video:
    """Chooses the frames of a video.

    Args:
      source: what ``sources.locate_source`` takes; or a list of frames, each what ``read_image`` takes; or uint8
        [frames, height, width, 3]. Frames in a list are all taken, at ``fps`` or two a second.
      settings: how many frames to take.
      options: may carry ``fps`` or ``nframes``, and ``video_start`` and ``video_end`` in seconds.
      allow_urls: whether to fetch from the web.

    Raises:
      InputError: if it holds no video, cannot be read whole, or is too large; partly only as frames are asked for.
    """
    if not is_located(source):
        return _listed_video(source, settings, options, allow_urls)
    source = locate_source(source, allow_urls=allow_urls)
    tracks = probe(source)
    if "video" not in tracks:
        raise InputError("it holds no frames of video")
    times = tracks["video"].times - tracks["video"].times[0]
    with _opened(source) as container:
        stream = _first(container, "video")
        _check_pixels(stream.codec_context.width, stream.codec_context.height, MOST_FRAME_PIXELS)
        native = _native_fps(times, float(stream.average_rate or 0))
    begin, end = options.get("video_start", 0.0), options.get("video_end", math.inf)
    inside = np.flatnonzero((times >= begin) & (times <= end))
    if not len(inside):
        raise InputError(f"no frame lies in the range {begin:g} to {end:g} s; the last is at {times[-1]:.2f} s")
    count = vision.smart_nframes(len(inside), native, settings, options)
    chosen = inside[vision.frame_indices(len(inside), count)]
    frames = _decode_frames(source, chosen)
    return Video(frames, count, count / len(inside) * native, "audio" in tracks)


def _native_fps(times: np.ndarray, stated: float) -> float:
    """Frames a second: what the header states, unless the times of the frames are against it by over two frames."""
    span = float(times[-1] - times[0])
    measured = (len(times) - 1) / span if span > 0 else 0.0
    agrees = stated > 0 and abs((len(times) - 1) / stated - span) <= 2 / stated + 0.001 * span
    fps = stated if agrees or not measured else measured
    if not 0 < fps < 1000:
        raise InputError(f"its frames come at {fps:g} a second, which cannot be; re-encode it")
    return fps


def _decode_frames(source: Source, chosen: np.ndarray) -> Iterator[Image.Image]:
    """Decodes up to the last frame that is chosen, and gives the chosen ones."""
    wanted, done = chosen.tolist(), 0
    with _opened(source) as container:
        stream = _first(container, "video")
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if i == wanted[done]:
                if frame.is_corrupt:
                    raise InputError(f"frame {i} is damaged")
                picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
                # the file says how far the picture is to be turned, counted against the clock as Pillow does
                yield picture.rotate(frame.rotation, expand=True) if frame.rotation % 360 else picture
                done += 1
            if done == len(wanted):
                return
    raise InputError(f"it is cut off or damaged: frame {wanted[done]} of {wanted[-1] + 1} does not decode")


def _listed_video(frames: Any, settings: PixelSettings, options: Mapping[str, Any], allow_urls: bool) -> Video:
    if isinstance(frames, np.ndarray) and frames.ndim == 4:
        frames = list(frames)
    if not isinstance(frames, Sequence):
        raise InputError(f"a video must be a path, a URL, bytes, or a list of frames, got {type(frames).__name__}")
    if not frames:
        raise InputError("the list of frames is empty")
    for name in ("nframes", "video_start", "video_end"):
        if name in options:
            raise InputError(f"{name} chooses among the frames of a file; of a list of frames all are taken")
    pictures = _pictures(frames, allow_urls)
    return Video(pictures, len(frames), options.get("fps", settings.fps), False)


def _pictures(frames: Sequence[Any], allow_urls: bool) -> Iterator[Image.Image]:
    size = None
    for i, frame in enumerate(frames):
        try:
            picture = read_image(frame, allow_urls=allow_urls)
        except InputError as e:
            raise InputError(f"frame {i}: {e}") from e
        size = size or picture.size
        if picture.size != size:
            raise InputError(f"frame {i} has {picture.size} pixels, the first has {size}; frames must be of one size")
        yield picture
