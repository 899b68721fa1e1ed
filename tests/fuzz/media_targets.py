"""Pictures, sounds and videos: ``read_media`` in this process, and a share of them in processes that decode."""

from __future__ import annotations

import dataclasses
import random
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.processing.chat import MediaPart
from omni_jax.processing.layout import AudioInput, Item, TokenBudget
from omni_jax.processing.media_workers import MediaLimits, MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer
from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.target import Case, Target, WorkerError

MAX_PIXELS = 28 * 28 * 16  # of what a picture or a frame becomes; the decoders see all of it
_BUDGET = TokenBudget(8192)
# what is said of a worker that fails without an error of ours
_WORKER_FAILS = re.compile(r"the process that decoded its media died|its messages or media cannot be read")


def make_processor(folder: Path) -> Processor:
    """One without a model, with small pictures."""
    config = OmniConfig.tiny()
    write_tokenizer(folder, config)
    config.save(folder)
    return Processor.load(folder).with_pixels(max_pixels=MAX_PIXELS, video_max_pixels=MAX_PIXELS)


def check_item(item: Item) -> None:
    """Checks that what the encoders get of media is numbers, and not too many."""
    for part in item if isinstance(item, tuple) else (item,):
        values = part.mel if isinstance(part, AudioInput) else part.patches
        assert len(values) and values.nbytes < 1 << 30, values.shape
        assert np.isfinite(values).all(), "what the encoder gets holds NaN or infinity"


class MediaTarget(Target):
    """Media of one kind or of several.

    Attributes:
      worker_share: every how many cases one is read in another process.
    """

    own_errors = (InputError,)
    worker_share = 100

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.processor = make_processor(self.folder / "processor")
        self.files = self.make_files()
        self.others = [data for data in self.files.values() if len(data) < 20_000]
        self._path = self.work / "medium"
        self._workers: MediaWorkers | None = None

    def make_files(self) -> Mapping[str, bytes]:
        """Good files by name."""
        raise NotImplementedError

    def choose_options(self, rng: random.Random) -> dict[str, Any]:
        """How a medium is asked for: its ``kind``, and its options."""
        raise NotImplementedError

    def repair(self, rng: random.Random, data: bytes) -> bytes:
        """Sums that a mutation has made wrong are made right, so that decoders see what lies behind them."""
        raise NotImplementedError

    def prepare(self, num_cases: int) -> None:
        if num_cases >= self.worker_share:
            self.run_case(dataclasses.replace(self.list_seeds()[0], way="worker"))

    def make_case(self, rng: random.Random, number: int) -> Case:
        label = rng.choice(list(self.files))
        data = mutate_bytes(rng, self.files[label], self.others)
        if rng.random() < 0.6:
            data = self.repair(rng, data)
        is_in_worker = number % self.worker_share == self.worker_share - 1
        way = "worker" if is_in_worker else rng.choice(("bytes", "bytes", "bytes", "path"))
        return Case(label, data, way, self.choose_options(rng))

    def run_case(self, case: Case) -> None:
        source: Any = case.data
        if case.way == "path":
            self._path.write_bytes(case.data)
            source = str(self._path)
        options = dict(case.options)
        kind: Literal["image", "audio", "video"] = options.pop("kind")
        part = MediaPart(kind, source, "case", options)
        if case.way == "worker":
            check_item(self._read_in_worker(part))
        else:
            check_item(self.processor.read_media(part, None, _BUDGET))

    def _read_in_worker(self, part: MediaPart) -> Item:
        if self._workers is None:  # which takes seconds
            self._workers = MediaWorkers(self.processor, 1, MediaLimits(seconds=30.0, gigabytes=4.0))
        try:
            return self._workers.read_media(self.processor.settings, part, None, _BUDGET)
        except InputError as e:
            if _WORKER_FAILS.search(str(e)):
                raise WorkerError(str(e)) from e
            raise

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()


class Images(MediaTarget):
    """Pictures in all formats that are read."""

    worker_share = 250

    def make_files(self) -> Mapping[str, bytes]:
        return seeds.make_pictures()

    def list_seeds(self) -> list[Case]:
        return [Case(name, data, "bytes", {"kind": "image"}) for name, data in self.files.items()]

    def choose_options(self, rng: random.Random) -> dict[str, Any]:
        return {"kind": "image"}

    def repair(self, rng: random.Random, data: bytes) -> bytes:
        return repair_png(data)


class Media(MediaTarget):
    """Sounds and videos."""

    worker_share = 20

    def make_files(self) -> Mapping[str, bytes]:
        return seeds.make_media()

    def list_seeds(self) -> list[Case]:
        return [Case(name, data, "bytes", {"kind": seeds.kind_of(name)}) for name, data in self.files.items()]

    def choose_options(self, rng: random.Random) -> dict[str, Any]:
        kind = rng.choice(("audio", "video"))
        if rng.random() < 0.6:
            return {"kind": kind}
        begin = rng.choice((0.0, 0.05, 0.1, 0.5, 1e9 - 1))
        options: dict[str, Any] = {
            "kind": kind,
            f"{kind}_start": begin,
            f"{kind}_end": begin + rng.choice((1e-9, 0.1, 60)),
        }
        if kind == "video":
            options |= rng.choice(({}, {"fps": 1000.0}, {"fps": 1e-6}, {"nframes": 2}, {"nframes": 700}))
            options["use_audio_in_video"] = rng.choice((True, False, "auto"))
        return options

    def repair(self, rng: random.Random, data: bytes) -> bytes:
        return repair_ogg(data) if data[:4] == b"OggS" else repair_sizes(rng, data)


def repair_png(data: bytes) -> bytes:
    """A PNG file whose chunks have the check sums of what is in them."""
    if data[:4] != b"\x89PNG":
        return data
    out = bytearray(data[:8])
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        out += data[place : place + 4] + body
        if len(body) < 4 + length:
            break
        out += zlib.crc32(body).to_bytes(4, "big")
        place += 12 + length
    return bytes(out + data[place:]) if place + 12 > len(data) else bytes(out)


def _make_ogg_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_OGG_TABLE = _make_ogg_table()


def repair_ogg(data: bytes) -> bytes:
    """An Ogg file whose pages have the check sums of what is in them."""
    starts = [match.start() for match in re.finditer(rb"OggS", data)]
    out = bytearray(data)
    for begin, end in zip(starts, [*starts[1:], len(data)], strict=True):
        if end - begin < 27:
            continue
        out[begin + 22 : begin + 26] = bytes(4)
        value = 0
        for byte in out[begin:end]:
            value = ((value << 8) & 0xFFFFFFFF) ^ _OGG_TABLE[(value >> 24) ^ byte]
        out[begin + 22 : begin + 26] = value.to_bytes(4, "little")
    return bytes(out)


def repair_sizes(rng: random.Random, data: bytes) -> bytes:
    """A file of RIFF or AIFF, or of MP4's outermost boxes, that ends where its header says; others as they are."""
    out = bytearray(data)
    if data[:4] == b"RIFF":
        out[4:8] = struct.pack("<I", max(len(data) - 8, 0))
    elif data[:4] == b"FORM":
        out[4:8] = struct.pack(">I", max(len(data) - 8, 0))
    elif data[4:8] == b"ftyp":
        for name in (b"moov", b"mdat"):
            place = data.find(name)
            if place >= 4 and place + int.from_bytes(data[place - 4 : place], "big") - 4 > len(data):
                out[place - 4 : place] = struct.pack(">I", len(data) - place + 4)
    return bytes(out)
