"""From packets to frames: one pass over a file decodes its pictures and its sound, each on the file's clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

import av
import av.error
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing import audio
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.containers import (
    EXACT_SLACK,
    MAX_FRAME_PIXELS,
    ContainerInfo,
    Track,
    check_bad_packets,
    check_sound,
    open_container,
)
from omni_jax.processing.images import check_pixels, to_rgb

_MARGIN = 1.0  # seconds decoded on both sides of a range: time stamps of packets are not quite those of frames
_MAX_SHIFT = 0.1  # seconds by which sound may differ from its time stamps before it is moved, as ffmpeg has it

# how the columns of a display matrix, which say where x and y of a stored picture go, turn and mirror it
_ORIENTATIONS: dict[tuple[int, int, int, int], Image.Transpose | None] = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns against the clock
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


@dataclass
class FrameCollector:
    """Takes the frames of a video as they are decoded, and keeps those that were chosen.

    Attributes:
      track: that they are of.
      chosen: which of the frames are kept, counted from the first that decodes.
      convert: from an upright picture in RGB to what is kept.
      end: seconds on the file's clock; the first frame behind it ends the track.
      times: seconds at which each frame that was decoded shows.
      kept: what ``convert`` gave, by the frame's number.
      num_bad: packets and frames that were damaged.
      finished: whether no more frames are wanted.
    """

    track: Track
    chosen: Collection[int]
    convert: Callable[[Image.Image], Image.Image]
    end: float
    times: list[float] = field(default_factory=list)
    kept: dict[int, Image.Image] = field(default_factory=dict)
    num_bad: int = 0
    finished: bool = False

    def add(self, frame: Any) -> None:
        if self.finished:
            return
        # the decoder has made up a part of the picture: it is left out, as if its packet had not decoded
        if frame.is_corrupt:
            self.num_bad += 1
            return
        # of each frame, for some codecs may change the size on the way
        check_pixels(frame.width, frame.height, MAX_FRAME_PIXELS)
        time = self._next_time() if frame.time is None else float(frame.time)
        if time > self.end:
            self.finished = True
            return
        # most frames are passed over; only those that are looked at are converted and take memory
        if len(self.times) in self.chosen:
            self.kept[len(self.times)] = self.convert(image_of_frame(frame))
        self.times.append(time)

    def _next_time(self) -> float:
        """Where a frame without a time stamp shows."""
        return self.times[-1] + self.track.interval if self.times else self.track.start


@dataclass
class SoundCollector:
    """Takes the sound of a file as it is decoded, mixed to one channel.

    Attributes:
      track: that it is of.
      begin: seconds on the file's clock.
      end: seconds on the file's clock; sound outside of the range is dropped.
      settings: gives the longest sound that is taken.
      rate: samples a second; 0 before the first frame.
      pieces: each with the seconds at which it sounds; float32 [n].
      num_bad: packets and frames that were damaged.
      finished: whether no more frames are wanted.
    """

    track: Track
    begin: float
    end: float
    settings: MelSettings
    rate: int = 0
    pieces: list[tuple[float, np.ndarray]] = field(default_factory=list)
    num_bad: int = 0
    finished: bool = False
    _next: float = -math.inf
    _num_samples: int = 0

    def add(self, frame: Any) -> None:
        if self.finished:
            return
        if frame.is_corrupt:
            self.num_bad += 1
            return
        if self.rate not in (0, frame.sample_rate):
            raise InputError(f"its sampling rate changes midway, from {self.rate} to {frame.sample_rate}")
        # of each frame, and before it becomes an array: a header may say something else
        check_sound(frame.sample_rate, frame.layout.nb_channels)
        self.rate = frame.sample_rate
        num_samples = frame.samples
        # sound without a time stamp goes on where the last piece has ended
        fallback = self.track.start if self._next == -math.inf else self._next
        time = fallback if frame.time is None else float(frame.time)
        self._next = time + num_samples / self.rate
        if time > self.end + _MARGIN:
            self.finished = True
        elif self._next >= self.begin - _MARGIN:
            self._num_samples += num_samples
            # time stamps of packets were checked before, but packets may hold more sound than they say
            if self._num_samples > (self.settings.max_seconds + 2 * _MARGIN + EXACT_SLACK) * self.rate:
                raise audio.too_long(self._num_samples / self.rate, self.settings)
            self.pieces.append((time, mix_frame(frame)))

    def assemble(self) -> np.ndarray:
        """The sound of the range on its own clock, with silence before it and in gaps; float32 [n], maybe empty."""
        wanted = self.rate * min(self.end - self.begin, self.settings.max_seconds + 2 * _MARGIN)
        if not self.pieces:
            # sound that begins after the range is silent in it
            return np.zeros(round(wanted) if self.finished else 0, np.float32)
        # samples from the beginning of the range to the first piece; below 0 if that piece begins before the range
        first = self.pieces[0][0]
        lead = round((first - self.begin) * self.rate)
        # before the silence is made: a time stamp may lie hours off
        self._check_length(min(lead, round(wanted)))
        # by its own count of samples sound is exact; time stamps may be rounded to milliseconds
        out: list[np.ndarray] = [np.zeros(max(lead, 0), np.float32)]
        num_samples = 0  # since ``first``
        for time, samples in self.pieces:
            # how far the time stamp is ahead of the samples; where it lags, pieces simply follow each other
            gap = round((time - first) * self.rate) - num_samples
            if gap > _MAX_SHIFT * self.rate:
                self._check_length(lead + num_samples + gap)
                out.append(np.zeros(gap, np.float32))
                num_samples += gap
            out.append(samples)
            num_samples += len(samples)
        # the margins on both sides of the range go
        sound = np.concatenate(out)[max(-lead, 0) :]
        num_wanted = min((self.end - self.begin) * self.rate, len(sound))
        sound = sound[: round(num_wanted)]
        self._check_length(len(sound))
        return sound

    def _check_length(self, num_samples: int) -> None:
        seconds = num_samples / self.rate
        if seconds > self.settings.max_seconds + EXACT_SLACK:
            raise audio.too_long(seconds, self.settings)


Collector: TypeAlias = FrameCollector | SoundCollector


def decode_tracks(file: BinaryIO, info: ContainerInfo, collectors: Sequence[Collector]) -> None:
    """Decodes an open file from its beginning until every collector has what it wants.

    Raises:
      InputError: if a track is cut off or damaged, see ``containers``, or a collector refuses it.
    """
    with open_container(file) as container:
        by_stream = {collector.track.index: collector for collector in collectors}
        streams = [container.streams[index] for index in by_stream]
        # whole frames in parallel, too; by default PyAV has threads for the slices of one frame alone. Streams that are
        # not taken may have no decoder
        for stream in streams:
            if stream.type == "video":
                stream.codec_context.thread_type = "AUTO"
        last_is_bad = dict.fromkeys(by_stream, False)
        for packet in container.demux(streams):
            collector = by_stream[packet.stream.index]
            if collector.finished:
                continue
            # a bad packet is left out; whether the track goes on shows later
            try:
                for frame in packet.decode():
                    collector.add(frame)
                # the empty packet at the end says nothing about the one before it
                if packet.size:
                    last_is_bad[packet.stream.index] = False
            except av.error.FFmpegError:
                collector.num_bad += 1
                last_is_bad[packet.stream.index] = True
            # a range may end long before its file does
            if all(c.finished for c in collectors):
                break
    for index, collector in by_stream.items():
        track = collector.track
        check_bad_packets(collector.num_bad, track.num_packets, track.kind)
        if last_is_bad[index] and not info.ends_anywhere:
            raise InputError(f"it is cut off: the last packet of its {track.kind} does not decode")


def image_of_frame(frame: Any) -> Image.Image:
    """A frame as the file wants it shown: RGB on white, turned and mirrored."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    if has_alpha:
        picture = to_rgb(Image.fromarray(frame.to_ndarray(format="rgba")))
    else:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    # phones store pictures as the sensor stands, and say beside them how they are to be shown
    matrix = frame.side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is None:
        return picture
    operation = _ORIENTATIONS[_orientation(bytes(matrix))]
    return picture if operation is None else picture.transpose(operation)


def _orientation(matrix: bytes) -> tuple[int, int, int, int]:
    """The nearest of the eight ways to turn and mirror a picture, as the signs of a matrix [2, 2].

    A display matrix is int32 [3, 3], where (x, y) goes to (a x + c y, b x + d y) and a, b, c and d stand at 0, 1, 3, 4.
    """
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    # fixed-point numbers: which pair is larger says whether sides change places, and signs say what is mirrored
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def mix_frame(frame: Any) -> np.ndarray:
    """The mean over the channels of a frame of sound; float32 [n]."""
    samples = frame.to_ndarray()  # [channels, n] if planar, else [1, n * channels]
    if not frame.format.is_planar:
        samples = samples.reshape(-1, frame.layout.nb_channels).T
    # formats of floats can hold anything; what is not finite is refused once the sound is whole
    with np.errstate(over="ignore", invalid="ignore"):
        return scale_samples(samples).mean(axis=0, dtype=np.float32)


def scale_samples(samples: np.ndarray) -> np.ndarray:
    """Samples of any width as float32 in -1 to 1."""
    # bytes are unsigned, with silence in the middle
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    # by the lowest number, whose absolute value is a power of two: -1 is reached, and 1 almost
    if np.issubdtype(samples.dtype, np.signedinteger):
        return (samples / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    return samples.astype(np.float32)
