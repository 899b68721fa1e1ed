"""What the bytes of a container say without a demuxer: whether its end is there, and how large its tables become.

ffmpeg reads a file that is cut off as far as it goes, and it trusts the tables of an MP4 file before it has seen the
samples. Both are checked here, on the few bytes that tell.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from omni_jax.errors import InputError

MAX_SAMPLES = 4_000_000  # entries of an MP4 file's tables: 18 hours of video at 60 frames a second
_MP3_SLACK = 512  # bytes that a Xing header may be wrong by; about a frame
_MP4_PARENTS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
_MP4_DATA = {b"moov", b"moof", b"mdat"}  # boxes that nothing can be missing from
_EBML_MAGIC = bytes.fromhex("1A45DFA3")
_SEGMENT_MAGIC = bytes.fromhex("18538067")
_SAMPLE_TAGS = {1, 3, 0xFFFE}  # of WAV: integers, floats, and either with a longer header


@dataclass(frozen=True)
class Box:
    """A box of an MP4 file: where its contents begin and end."""

    kind: bytes
    begin: int
    end: int


def check_header(file: BinaryIO) -> None:
    """Checks what can be checked before a demuxer may open the file.

    Raises:
      InputError: if the file ends within its container, or its tables describe more samples than are read.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head[:4] == _EBML_MAGIC:
        _check_matroska_end(file, size)
    # a first box may have any name; files of other formats that pass have none of the boxes that are checked
    elif _is_box_name(head[4:8]):
        _check_mp4(file, size)
    file.seek(0)


def check_tail(file: BinaryIO, format_name: str) -> None:
    """Checks that the end of a file is there, for formats whose demuxers do not.

    Raises:
      InputError: if it is cut off.
    """
    if format_name == "mp3":
        _check_mp3_end(file)
    elif format_name == "ogg":
        _check_ogg_end(file)
    elif format_name == "gif":
        _check_gif_end(file)


def is_streamed_wav(file: BinaryIO) -> bool:
    """Whether a WAV file was written without knowing its length: its size is 0, or as large as can be."""
    file.seek(0)
    head = file.read(8)
    size = int.from_bytes(head[4:], "little")
    # a program that cannot go back to its header leaves 0 there, or about the largest number of 31 or 32 bits; SoX
    # leaves a whole page less than that of 31
    return head[:4] == b"RIFF" and (size == 0 or size >= (1 << 31) - 4096)


def is_pcm_wav(file: BinaryIO) -> bool:
    """Whether the header of a WAV file comes first, as it does nearly always, and says that it holds plain samples."""
    file.seek(0)
    head = file.read(22)
    tag = int.from_bytes(head[20:], "little")
    return head[:4] == b"RIFF" and head[8:16] == b"WAVEfmt " and tag in _SAMPLE_TAGS


def _is_box_name(name: bytes) -> bool:
    # printable letters, and the copyright sign that QuickTime's boxes of text begin with
    return len(name) == 4 and all(32 <= byte < 127 or byte == 0xA9 for byte in name)


def _check_mp4(file: BinaryIO, size: int) -> None:
    """Every box must end within the file, and all tables together describe no more than MAX_SAMPLES samples.

    An entry of a few bytes can stand for billions of samples, and a demuxer makes a record of each.
    """
    samples = 0
    for box in _mp4_boxes(file, 0, size):
        # an unfinished box of another kind, such as padding, takes nothing away
        if box.end > size and box.kind in _MP4_DATA:
            raise InputError(
                f"it is cut off: its {box.kind.decode()} box ends at byte {box.end}, but the file holds {size}"
            )
        # its tables cannot be counted before they are inflated, to a size that nobody knows
        if box.kind == b"cmov":
            raise InputError("its header is compressed (cmov), which is not read; re-encode it")
        samples += _num_records(file, box)
        if samples > MAX_SAMPLES:
            raise InputError(
                f"its tables describe over {MAX_SAMPLES} samples, in a file of {size} bytes; cut it into pieces"
            )


def _mp4_boxes(file: BinaryIO, begin: int, end: int) -> Iterator[Box]:
    """All boxes from one byte to another, parents before their children; it stops where there is no box."""
    while begin + 8 <= end:
        file.seek(begin)
        head = file.read(16)
        length = int.from_bytes(head[:4])
        contents = begin + 8
        if length == 1:  # 64 bits follow
            length = int.from_bytes(head[8:16])
            contents = begin + 16
        elif length == 0:  # to the end
            length = end - begin
        kind = head[4:8]
        # a box holds at least its own header; a shorter one would be read again for ever
        if length < contents - begin or not _is_box_name(kind):
            return
        box = Box(kind, contents, begin + length)
        yield box
        # children are looked for within the file, however far their parent says that it goes
        if kind in _MP4_PARENTS:
            yield from _mp4_boxes(file, contents, min(box.end, end))
        begin = box.end


def _num_records(file: BinaryIO, box: Box) -> int:
    """How many records a demuxer makes of a track's tables, or of a run of a fragment."""
    if box.kind == b"trun":
        # version and flags, the number of samples
        return int.from_bytes(_read_at(file, box.begin, 8)[4:8])
    if box.kind != b"mdia":
        return 0
    sizes = 0
    times = _NO_ENTRIES
    offsets = _NO_ENTRIES
    is_sound = False
    for child in _mp4_boxes(file, box.begin, box.end):
        if child.kind == b"hdlr":
            # version and flags, four bytes of zeros, the kind of track
            is_sound = _read_at(file, child.begin, 12)[8:12] == b"soun"
        elif child.kind in (b"stsz", b"stz2"):
            # version and flags, the size of every sample, their number
            sizes = int.from_bytes(_read_at(file, child.begin, 12)[8:12])
        elif child.kind == b"stts":
            times = _read_entries(file, child)
        elif child.kind == b"ctts":
            offsets = _read_entries(file, child)
    # samples of plain PCM last one tick each; a demuxer takes them in chunks
    if is_sound and len(times) == 1 and times[0, 1] == 1:
        return 0
    # one table may claim more than another, and a demuxer trusts each
    return max(sizes, int(times[:, 0].sum()), int(offsets[:, 0].sum()))


_NO_ENTRIES = np.zeros((0, 2), np.int64)


def _read_entries(file: BinaryIO, box: Box) -> np.ndarray:
    """The entries of a table of times: how many samples, and their time each; int64 [entries, 2]."""
    # behind version, flags and the number of entries; the bytes that are there count, and not that number
    contents = _read_at(file, box.begin + 8, box.end - box.begin - 8)
    usable = len(contents) // 8 * 8
    return np.frombuffer(contents[:usable], ">u4").reshape(-1, 2).astype(np.int64)


def _read_at(file: BinaryIO, begin: int, num_bytes: int) -> bytes:
    file.seek(begin)
    return file.read(num_bytes)


def _check_matroska_end(file: BinaryIO, size: int) -> None:
    """The segment, which holds everything, says how many bytes it has, unless it was written as a stream."""
    # the EBML header comes first: its name, its size, its contents
    position = 4
    length, position = _read_ebml_size(file, position)
    position += length or 0
    if _read_at(file, position, 4) != _SEGMENT_MAGIC:
        return
    length, position = _read_ebml_size(file, position + 4)
    if length is not None and position + length > size:
        raise InputError(f"it is cut off: its header promises {position + length} bytes, but it holds {size}")


def _read_ebml_size(file: BinaryIO, position: int) -> tuple[int | None, int]:
    """A number of 1 to 8 bytes, the leading zeros of the first of which say how many; and where it ends.

    None if all of its bits are set: the size is not known.
    """
    head = _read_at(file, position, 8)
    # a first byte of zeros is not allowed; it is read as the longest number
    num_bytes = 9 - head[0].bit_length() if head and head[0] else 8
    bits = 7 * num_bytes
    value = int.from_bytes(head[:num_bytes]) & ((1 << bits) - 1)
    return (None if value == (1 << bits) - 1 else value), position + num_bytes


def _check_ogg_end(file: BinaryIO) -> None:
    """The last page of an Ogg file must be complete: 27 bytes, a table of the sizes of its pieces, and the pieces."""
    size = file.seek(0, os.SEEK_END)
    tail = _read_at(file, max(0, size - (1 << 17)), 1 << 17)  # a page is under 64 KiB
    page = tail.rfind(b"OggS")
    table_begin = page + 27
    if page < 0 or table_begin > len(tail):
        raise InputError("it is cut off: its last page is incomplete")
    # the last byte of the fixed part counts the pieces, and a byte for each says how long it is
    num_pieces = tail[page + 26]
    table = tail[table_begin : table_begin + num_pieces]
    if table_begin + num_pieces + sum(table) > len(tail):
        raise InputError("it is cut off: its last page is incomplete")


def _check_mp3_end(file: BinaryIO) -> None:
    """Compares the bytes that a Xing or Info header promises with those that are there; many files have no such header.

    The header stands in the first frame: its name, four bytes of flags, then each number that a flag announces.
    """
    head = _read_at(file, 0, 10)
    begin = 0
    if head[:3] == b"ID3":  # a tag, its size in four bytes of seven bits
        for byte in head[6:10]:
            begin = (begin << 7) | (byte & 127)
        begin += 10
    size = file.seek(0, os.SEEK_END) - begin
    # how far into the frame it stands depends on version and channels; Info is what LAME writes for a constant rate
    frame = _read_at(file, begin, 200)
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return
    flags = int.from_bytes(frame[place + 4 : place + 8])
    if flags & 2:  # bytes; the number of frames, flag 1, stands before it
        number = place + 8 + 4 * (flags & 1)
        promised = int.from_bytes(frame[number : number + 4])
        if size + _MP3_SLACK < promised:
            raise InputError(f"it is cut off: its header promises {promised} bytes of sound, but it holds {size}")


def _check_gif_end(file: BinaryIO) -> None:
    """A GIF is a list of blocks, the last of which is a semicolon."""
    # signature and size of the screen; flags of the table of colours, two bytes more
    position = 13 + _colour_table_bytes(_read_at(file, 10, 1))
    while True:
        # at the end of the file this is empty, which is no kind of block
        kind = _read_at(file, position, 1)
        if kind == b";":
            return
        if kind == b"!":  # an extension, and its label
            position += 2
        elif kind == b",":  # a picture: its place and size, its table of colours, the width of its codes
            position += 11 + _colour_table_bytes(_read_at(file, position + 9, 1))
        else:
            raise InputError(f"it is cut off or damaged: the block at byte {position} of the GIF is missing")
        # pieces of up to 255 bytes, up to an empty one
        while num_bytes := _read_at(file, position, 1):
            position += 1 + num_bytes[0]
            if not num_bytes[0]:
                break


def _colour_table_bytes(flags: bytes) -> int:
    """The size of a table of colours: three bytes each, if there is one."""
    if not flags or not flags[0] & 0x80:
        return 0
    return 3 * 2 ** ((flags[0] & 7) + 1)
