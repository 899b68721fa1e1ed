"""Files of sound and video: which of their tracks are taken, when these begin, and whether a file is cut off.

A file is cut off if something that it says it has is missing:

* its container is not closed: a box, a segment or a page ends after the file does;
* the last packet of a track is torn, or does not decode;
* a track ends before its own header says so. Headers that are counted in samples (WAV, FLAC, MP4 and their like) may be
  off by 0.1 s; those that a clock may have written (Matroska and WebM, FLV, ASF) by a second and a hundredth.

These are no signs of it: a clock that is a little off, a DURATION tag outside Matroska (a copy of another file's), a
file that does not begin at time 0, another track that is longer than those that are taken. Formats that are made to be
cut anywhere (MPEG-TS, raw AAC, MP3 without a Xing header) promise nothing.

A packet amid a track that does not decode is skipped and counted. Over two, and over one in a hundred, the file is
damaged.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO, Literal, TypeAlias

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition

from omni_jax.errors import InputError
from omni_jax.processing.container_bytes import check_header, check_tail, is_pcm_wav, is_streamed_wav
from omni_jax.processing.images import check_pixels
from omni_jax.processing.sources import Source

TrackKind: TypeAlias = Literal["video", "audio"]

# what ffmpeg may take a file for; playlists, which make it open other files, are not among them
CONTAINER_FORMATS = (
    "3g2,3gp,aac,ac3,aiff,amr,apng,asf,au,avi,caf,eac3,flac,flv,gif,h264,hevc,ivf,m4a,m4v,matroska,mj2,mov,mp3,mp4,"
    "mpeg,mpegts,mpegvideo,ogg,w64,wav,webm,webp_anim,wv"
)
# formats whose headers count samples or frames
_EXACT_LENGTH = {"wav", "w64", "aiff", "flac", "mov", "avi", "au", "caf", "gif"}
_CLOCK_LENGTH = {"matroska", "flv", "asf"}  # whose headers may come from a clock
# formats of packets in a row, without a header that says how many
_CUT_ANYWHERE = {"mpegts", "mpeg", "mpegvideo", "mp3", "aac", "ac3", "eac3", "amr", "h264", "hevc", "m4v"}
MAX_FRAME_PIXELS = 8192 * 4320
MAX_CHANNELS = 64  # of sound
SAMPLING_RATES = (1_000, 384_000)  # Hz, of sound
EXACT_SLACK = 0.1  # seconds that a header may be wrong by
_CLOCK_SLACK = 1.0  # seconds, and
_CLOCK_SLACK_SHARE = 0.01  # of the length that a clock has written
# tags are in any encoding, and none of them is worth a file; from 19 on PyAV has no other way, and no option
_TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# of the packets of a track; the larger of both
_MAX_BAD_PACKETS = 2
_MAX_BAD_SHARE = 0.01
_PCM_PROBE_BYTES = 2048


@dataclass(frozen=True)
class Track:
    """One track of a file, as demuxing shows it.

    Attributes:
      index: of its stream in the file.
      kind: "video" or "audio".
      start: seconds at which its first frame shows or sounds, on the file's clock.
      times: seconds at which its packets show or sound, each time once, in order; float64 [packets].
      end: seconds at which the last of them ends.
      interval: seconds from one packet to the next, the median.
      num_packets: how many there are.
      frame_rate: frames a second as the header says; 0 if it does not, and for sound.
    """

    index: int
    kind: TrackKind
    start: float
    times: np.ndarray
    end: float
    interval: float
    num_packets: int
    frame_rate: float = 0.0


@dataclass(frozen=True)
class ContainerInfo:
    """What is known of a file before its tracks are decoded.

    Attributes:
      tracks: at most one of a kind.
      start: seconds at which the first of them begins; times that callers give and get count from it.
      ends_anywhere: whether its last packet may be torn.
    """

    tracks: dict[TrackKind, Track]
    start: float
    ends_anywhere: bool

    def has(self, kind: TrackKind) -> bool:
        return kind in self.tracks


@contextmanager
def open_media(source: Source) -> Iterator[BinaryIO]:
    """Opens a file and checks its header; whatever a decoder raises inside is an InputError.

    Raises:
      InputError: if it is cut off, too large to be opened safely, or anything goes wrong while it is read.
    """
    with source.open() as file:
        try:
            check_header(file)
            yield file
        except InputError:
            raise
        except av.error.FFmpegError as e:
            # "Invalid data found" is all that ffmpeg says of most files
            raise InputError(f"cannot decode it: {e.strerror} (is it cut off, or not sound or video at all?)") from e
        except Exception as e:  # decoders raise whatever they like
            raise InputError(f"cannot decode it: {type(e).__name__}: {e}") from e


class _MediaFile:
    """A file as PyAV reads it, where only the first seek to where nothing can be is an exception.

    A damaged file may ask for many of them. PyAV keeps the last exception, and prints the traceback of every other.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._has_failed = False
        self.read = file.read
        self.tell = file.tell
        # the ending of a file's name is a hint at what it is; bytes have none
        self.name = getattr(file, "name", "<none>")

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):
            if not self._has_failed:
                self._has_failed = True
                raise
            return -errno.EINVAL


def open_container(file: BinaryIO) -> InputContainer:
    """A demuxer at the beginning of an open file, whose decoders make no frames that are far too large."""
    # ffmpeg looks for another codec within the samples of a WAV file, which takes ten times as long as all else
    probe_options = {"probesize": str(_PCM_PROBE_BYTES)} if is_pcm_wav(file) else {}
    file.seek(0)
    # a frame may be larger than its container says, and its memory is taken before it can be looked at; a quarter more,
    # because decoders round sides up
    decoder_options = {"max_pixels": str(MAX_FRAME_PIXELS * 5 // 4)}
    # without the list, ffmpeg guesses among all formats that it has, playlists of other files included; the options of
    # decoders are for those that look into the file as it is opened
    options = {"format_whitelist": CONTAINER_FORMATS, **decoder_options, **probe_options}
    container = av.open(_MediaFile(file), "r", options=options, **_TAG_OPTIONS)
    for video in container.streams.video:
        if video.codec_context is not None:
            video.codec_context.options = decoder_options
    return container


def read_info(file: BinaryIO) -> ContainerInfo:
    """Demuxes an open file to its end, and tells of the tracks that are taken of it.

    Raises:
      InputError: if the file is cut off, damaged, or holds neither sound nor video.
    """
    is_unending = is_streamed_wav(file)
    with open_container(file) as container:
        # one demuxer may serve several formats, and names them all: "mov,mp4,m4a,3gp,3g2,mj2"
        format_names = set(container.format.name.split(","))
        streams = _pick_streams(container)
        if not streams:
            raise InputError(f"it holds neither sound nor video (format {container.format.name})")
        for stream in streams:
            _check_stream(stream)
        ends_anywhere = bool(format_names & _CUT_ANYWHERE) or is_unending
        # demuxing costs little beside decoding, and headers alone do not show where a track really ends
        packets = _read_packets(container, streams)
        tracks: dict[TrackKind, Track] = {}
        for stream in streams:
            log = packets[stream.index]
            # an empty track beside another one does no harm
            if not log.begins:
                continue
            log.check(ends_anywhere)
            track = log.track(stream)
            _check_length(stream, track, format_names)
            tracks[track.kind] = track
        _check_file_length(container, tracks.values(), format_names)
        if not tracks:
            kinds = " and ".join(stream.type for stream in streams)
            raise InputError(f"it is cut off: its header promises {kinds}, but no packet of it is there")
        check_tail(file, container.format.name)
    return ContainerInfo(tracks, min(track.start for track in tracks.values()), ends_anywhere)


def check_bad_packets(num_bad: int, num_packets: int, kind: TrackKind) -> None:
    """Raises InputError if more packets than a slip do not decode."""
    if num_bad <= max(_MAX_BAD_PACKETS, _MAX_BAD_SHARE * num_packets):
        return
    # the decoder refuses such frames, and does not tell them from damage
    or_large = f", or its frames are over the limit of {MAX_FRAME_PIXELS} pixels" if kind == "video" else ""
    raise InputError(f"its {kind} is damaged{or_large}: {num_bad} of {num_packets} packets do not decode")


def check_sound(rate: int, channels: int) -> None:
    """Raises InputError for sound that nobody records: it would take memory and time without end."""
    low, high = SAMPLING_RATES
    if not low <= rate <= high:
        raise InputError(f"its sound has {rate} samples a second; it must have from {low} to {high}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise InputError(f"its sound has {channels} channels; it must have from 1 to {MAX_CHANNELS}")


def _pick_streams(container: InputContainer) -> list[Any]:
    """The streams that are taken, at most one of a kind."""
    streams = []
    for kind in ("video", "audio"):
        stream = _pick_stream(container, kind)
        if stream is not None:
            streams.append(stream)
    return streams


def _pick_stream(container: InputContainer, kind: str) -> Any:
    """The stream of a kind that is marked as the default, else the first; a cover picture is not a video."""
    streams = [s for s in container.streams if s.type == kind and not s.disposition & Disposition.attached_pic]
    for stream in streams:
        if stream.disposition & Disposition.default:
            return stream
    return streams[0] if streams else None


def _check_stream(stream: Any) -> None:
    """Checks before anything is decoded that there is a decoder, and that it is not asked for too much."""
    context = stream.codec_context
    if context is None:
        raise InputError(f"its {stream.type} is in a format that cannot be decoded")
    if stream.type == "video":
        check_pixels(context.width, context.height, MAX_FRAME_PIXELS)
    # some headers leave it to the frames, which are checked again
    elif context.sample_rate and context.layout.nb_channels:
        check_sound(context.sample_rate, context.layout.nb_channels)


@dataclass
class _PacketLog:
    """The packets of a stream as they pass; times are in seconds."""

    kind: TrackKind
    begins: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    start: float | None = None  # of the first frame that decodes
    num_corrupt: int = 0
    last_is_corrupt: bool = False

    def add(self, packet: av.Packet) -> None:
        # a demuxer ends each stream with an empty packet, which asks a decoder for what it holds back
        if not packet.size:
            return
        self.last_is_corrupt = packet.is_corrupt
        self.num_corrupt += packet.is_corrupt
        # needed to decode what follows, and never shown: what an edit list cuts off, or an encoder's delay
        if packet.is_discard:
            return
        base = packet.time_base or Fraction(0)
        ticks = packet.dts if packet.pts is None else packet.pts
        # raw streams have no clock: packets follow each other
        after_last = self.ends[-1] if self.ends else 0.0
        begin = after_last if ticks is None else float(ticks * base)
        self.begins.append(begin)
        self.ends.append(begin + float((packet.duration or 0) * base))

    def find_start(self, packet: av.Packet) -> None:
        """Decodes until the first frame has come: its time may differ from the packet's."""
        if self.start is not None:
            return
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            # whether the track is damaged is found out when all of it is decoded
            return
        for frame in frames:
            if frame.time is not None:
                self.start = frame.time
                return

    def check(self, ends_anywhere: bool) -> None:
        if self.last_is_corrupt and not ends_anywhere:
            raise InputError(f"it is cut off: the last packet of its {self.kind} is incomplete")
        check_bad_packets(self.num_corrupt, len(self.begins), self.kind)

    def track(self, stream: Any) -> Track:
        # packets come in the order of decoding, in which a frame that others are made from precedes them
        times = np.unique(self.begins)
        # a packet may not say how long it lasts; then the next would have come after about the usual time
        interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        last_end = -math.inf
        for begin, end in zip(self.begins, self.ends, strict=True):
            last_end = max(last_end, end if end > begin else begin + interval)
        start = float(times[0]) if self.start is None else self.start
        frame_rate = float(stream.average_rate or 0) if self.kind == "video" else 0.0
        return Track(stream.index, self.kind, start, times, last_end, interval, len(self.begins), frame_rate)


def _read_packets(container: InputContainer, streams: Sequence[Any]) -> dict[int, _PacketLog]:
    logs = {stream.index: _PacketLog(stream.type) for stream in streams}
    # packets of all streams in one pass, as they are interleaved in the file
    for packet in container.demux(streams):
        log = logs[packet.stream.index]
        log.add(packet)
        log.find_start(packet)
    return logs


def _check_length(stream: Any, track: Track, format_names: set[str]) -> None:
    """Compares the end of a track with what its own header says, see the top of the module."""
    if "matroska" in format_names:  # an end on the file's clock
        # only here: remuxers copy the tag into files of other formats, where it is that of another file
        _check_end(track.end, _parse_duration_tag(stream.metadata.get("DURATION", "")), clock=True)
    elif format_names & _EXACT_LENGTH and stream.duration is not None and stream.time_base is not None:
        _check_end(track.end - track.times[0], float(stream.duration * stream.time_base), clock=False)


def _check_file_length(container: InputContainer, tracks: Collection[Track], format_names: set[str]) -> None:
    """Compares the end of the last track with what the file's header says, where no other track can be meant."""
    # the header speaks of the longest track, which may be one that is not taken
    if container.duration is None or not format_names & _CLOCK_LENGTH or len(tracks) < len(container.streams):
        return
    end = max(track.end for track in tracks)
    if "matroska" not in format_names:  # whose header has an end, and no length
        end -= min(track.times[0] for track in tracks)
    _check_end(end, container.duration / av.time_base, clock=True)


def _check_end(found: float, promised: float | None, *, clock: bool) -> None:
    if promised is None:
        return
    slack = _CLOCK_SLACK + _CLOCK_SLACK_SHARE * promised if clock else EXACT_SLACK
    # a tag of hundreds of digits is infinite as a float, and promises nothing
    if math.isfinite(promised) and found + slack < promised:
        raise InputError(f"it is cut off: its header promises {promised:.2f} s, but it ends after {found:.2f} s")


def _parse_duration_tag(text: str) -> float | None:
    """Seconds of Matroska's ``hours:minutes:seconds``; None if it is no such tag."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", text)
    if tag is None:
        return None
    hours, minutes, seconds = map(float, tag.groups())
    return hours * 3600 + minutes * 60 + seconds
