"""Sound and video as the model takes them: a file is opened once and gives its tracks.

Times count from the beginning of the file, which is where the first of its tracks begins. What is read, and when a file
counts as cut off, is in docs/media.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing import audio
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.containers import EXACT_SLACK, ContainerInfo, open_media, read_info
from omni_jax.processing.decoding import FrameCollector, SoundCollector, decode_tracks, scale_samples
from omni_jax.processing.images import read_image
from omni_jax.processing.sources import Source, is_located, locate_source
from omni_jax.processing.vision import FrameChoice, PixelSettings, choose_frames

MAX_CHANNELS = 8  # of an array of sound

Resize: TypeAlias = Callable[[Image.Image, int], Image.Image]  # of one frame of so many


@dataclass(frozen=True)
class Sound:
    """The sound of a file.

    Attributes:
      samples: float32 [n], mono.
      num_bad_packets: how many were damaged and are left out.
    """

    samples: np.ndarray
    num_bad_packets: int = 0


@dataclass(frozen=True)
class Video:
    """The frames of a video that are looked at, and its sound.

    Attributes:
      frames: in RGB, upright; of a list of pictures they are read as they are asked for.
      count: how many they are.
      fps: of these frames.
      has_audio: whether the file has sound, whether or not it was asked for.
      sound: None if it was not asked for, or there is none in the range.
      num_bad_packets: how many packets of pictures were damaged and are left out.
    """

    frames: Iterable[Image.Image]
    count: int
    fps: float
    has_audio: bool
    sound: Sound | None = None
    num_bad_packets: int = 0


def check_media(source: Source) -> None:
    """Looks whether a file is media: a picture that decodes, or a file with a track of sound or pictures.

    Raises:
      InputError: if it is neither.
    """
    try:
        read_image(source)
        return
    except InputError:
        pass
    try:
        with open_media(source) as file:
            read_info(file)
    except InputError as e:
        raise InputError(f"it is neither a picture, a sound nor a video: {e}") from e


def read_video(
    source: Any,
    settings: PixelSettings,
    options: Mapping[str, Any],
    *,
    mel: MelSettings | None = None,
    resize: Resize | None = None,
) -> Video:
    """Reads the frames of a video that are looked at, and its sound.

    Args:
      source: what ``sources.locate_source`` takes; or a list of frames, each what ``read_image`` takes; or uint8
        [frames, height, width, 3]. Frames in a list are all taken, at ``fps`` or two a second.
      settings: how many frames to take.
      options: may carry ``fps`` or ``nframes``, and ``video_start`` and ``video_end`` in seconds.
      mel: to read the sound too; its sampling rate, and the longest sound that is taken.
      resize: what is done with each frame as it is decoded, given how many there will be; None: they are kept in full.

    Raises:
      InputError: if it holds no video, is cut off or damaged, or is too large.
    """
    if not is_located(source):
        return _list_video(source, settings, options, resize)
    with open_media(locate_source(source)) as file:
        info = read_info(file)
        if not info.has("video"):
            raise InputError("it holds no frames of video")
        begin = options.get("video_start", 0.0)
        end = options.get("video_end", math.inf)
        sound = None
        # one pass decodes both tracks
        if mel is not None and info.has("audio"):
            sound = _sound_collector(info, begin, end, mel)
        frames, choice = _decode_video(file, info, sound, settings, options, resize)
        # at a variable rate a frame may be looked at more than once
        kept = [frames.kept[i] for i in choice.indices.tolist()]
    samples = None if sound is None else _finish_sound(sound)
    return Video(kept, len(kept), choice.fps, info.has("audio"), samples, frames.num_bad)


def read_sound(source: Any, settings: MelSettings, *, begin: float = 0.0, end: float = math.inf) -> Sound:
    """Sound, mixed to one channel and resampled, where its time stamps say: with silence before it and in gaps.

    Args:
      source: what ``sources.locate_source`` takes; of a video, its sound.
      settings: the sampling rate, and the longest sound that is taken.
      begin: seconds from the start of the file.
      end: seconds from the start of the file; what comes later is not read.

    Returns:
      At ``settings.sampling_rate``.

    Raises:
      InputError: if there is no sound, it is cut off or damaged, or the range is too long or holds none.
    """
    with open_media(locate_source(source)) as file:
        info = read_info(file)
        if not info.has("audio"):
            raise InputError("it has no sound")
        # a raw stream without durations seems to end at 0, which is no reason to refuse a range of it
        seconds = info.tracks["audio"].end - info.start
        if begin >= seconds > 0:
            raise InputError(f"the range begins at {begin:g} s, but the sound ends after {seconds:.2f} s")
        collector = _sound_collector(info, begin, end, settings)
        decode_tracks(file, info, [collector])
    sound = _finish_sound(collector)
    if sound is None:
        raise InputError("it holds no samples of sound in this range")
    return sound


def read_audio(source: Any, settings: MelSettings, *, begin: float = 0.0, end: float = math.inf) -> np.ndarray:
    """The samples of ``read_sound``, float32 [n]."""
    return read_sound(source, settings, begin=begin, end=end).samples


def _sound_collector(info: ContainerInfo, begin: float, end: float, settings: MelSettings) -> SoundCollector:
    """Refuses a range that is too long before anything is decoded; the exact length is only known after it."""
    track = info.tracks["audio"]
    seconds = min(track.end - info.start, end) - begin
    if seconds > settings.max_seconds + EXACT_SLACK:
        raise audio.too_long(seconds, settings)
    return SoundCollector(track, info.start + begin, info.start + end, settings)


def _finish_sound(collector: SoundCollector) -> Sound | None:
    samples = collector.assemble()
    # a range without sound; whether that is an error depends on what was asked for
    if not len(samples):
        return None
    resampled = audio.resample(samples, collector.rate, collector.settings.sampling_rate)
    # formats of floats can hold anything, and resampling spreads it
    if not np.isfinite(resampled).all():
        raise InputError("its sound holds NaN, infinity, or samples too large for float32")
    return Sound(resampled, collector.num_bad)


def _decode_video(
    file: BinaryIO,
    info: ContainerInfo,
    sound: SoundCollector | None,
    settings: PixelSettings,
    options: Mapping[str, Any],
    resize: Resize | None,
) -> tuple[FrameCollector, FrameChoice]:
    """Decodes the frames that are chosen, and the sound beside them.

    Frames are chosen by the time stamps of packets first. Where the decoder gives other frames than there are packets
    (hidden frames of VP8, leading frames without a reference), they are chosen again by the decoder's and decoded anew.
    """
    track = info.tracks["video"]
    # packets before the first frame that decodes show nothing, such as those before the first key frame of a cut
    times = track.times[track.times >= track.start - 1e-6]
    choice = choose_frames(times - info.start, track.frame_rate, settings, options)
    frames = _frame_collector(info, choice, options, resize)
    decode_tracks(file, info, [frames] if sound is None else [frames, sound])
    decoded = np.array(frames.times)  # [frames], seconds
    if frames.finished:  # the range ends before the file, and what comes later was not decoded
        decoded = np.concatenate([decoded, times[times > frames.end]])
    if len(decoded) == len(times) and np.abs(decoded - times).max(initial=0.0) < 1e-6:
        return frames, choice
    if not frames.times:
        raise InputError("it holds no frames of video that decode in this range")
    # decoders give frames in order, but damaged files may have stamps that go back
    choice = choose_frames(np.sort(decoded) - info.start, track.frame_rate, settings, options)
    frames = _frame_collector(info, choice, options, resize)
    # the sound was collected in the first pass
    decode_tracks(file, info, [frames])
    return frames, choice


def _frame_collector(
    info: ContainerInfo, choice: FrameChoice, options: Mapping[str, Any], resize: Resize | None
) -> FrameCollector:
    count = len(choice.indices)

    # each frame becomes small as it is decoded: hundreds of them in full would fill the memory
    def convert(frame: Image.Image) -> Image.Image:
        return frame if resize is None else resize(frame, count)

    end = info.start + options.get("video_end", math.inf)
    return FrameCollector(info.tracks["video"], set(choice.indices.tolist()), convert, end)


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
    # sound has more samples than channels, so the shorter axis is that of the channels
    if samples.ndim == 2 and min(samples.shape) <= MAX_CHANNELS:
        channel_axis = int(np.argmin(samples.shape))
        samples = scale_samples(samples).mean(axis=channel_axis)
    if samples.ndim != 1 or not np.issubdtype(kind, np.number) or np.issubdtype(kind, np.complexfloating):
        raise InputError(f"an array of sound must be numbers [n] or [n, channels], got {kind} {list(samples.shape)}")
    # the range is cut in the array's own rate, before it is scaled and resampled
    first = round(min(begin * rate, len(samples)))
    last = round(min(end * rate, len(samples)))
    samples = scale_samples(samples)[first:last]
    if not len(samples):
        raise InputError("the array holds no samples in this range")
    if not np.isfinite(samples).all():
        raise InputError("the array holds NaN or infinity")
    resampled = audio.resample(samples, rate, settings.sampling_rate)
    if not np.isfinite(resampled).all():
        raise InputError("the array holds samples too large to be resampled in float32")
    return resampled


def _list_video(frames: Any, settings: PixelSettings, options: Mapping[str, Any], resize: Resize | None) -> Video:
    # [frames, height, width, channels]; what shape and type each frame must have, read_image checks
    if isinstance(frames, np.ndarray) and frames.ndim == 4:
        frames = list(frames)
    if not isinstance(frames, Sequence):
        raise InputError(f"a video must be a path, a URL, bytes, or a list of frames, got {type(frames).__name__}")
    if not frames:
        raise InputError("the list of frames is empty")
    for name in ("nframes", "video_start", "video_end"):
        if name in options:
            raise InputError(f"{name} chooses among the frames of a file; of a list of frames all are taken")
    count = len(frames)
    pictures = _read_pictures(frames)
    if resize is not None:
        pictures = (resize(picture, count) for picture in pictures)
    return Video(pictures, count, options.get("fps", settings.fps), False)


def _read_pictures(frames: Sequence[Any]) -> Iterator[Image.Image]:
    size = None
    for i, frame in enumerate(frames):
        try:
            picture = read_image(frame)
        except InputError as e:
            raise InputError(f"frame {i}: {e}") from e
        size = size or picture.size
        if picture.size != size:
            raise InputError(f"frame {i} has {picture.size} pixels, the first has {size}; frames must be of one size")
        yield picture
