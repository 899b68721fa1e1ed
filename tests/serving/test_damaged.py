"""Sixty damaged files among good ones: each costs its own request, quickly, and no memory."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import omni_jax
from omni_jax.engine.request import SchedulerConfig
from omni_jax.errors import InputError
from omni_jax.processing import media_workers as media_workers_module
from omni_jax.processing.chat import parse_messages
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.serving.batch_lines import Line
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.serving.media_roots import MediaRoots
from tests.serving import requests

NUM_DAMAGED = 60
MAX_GROWTH = 200 << 20  # bytes, of this process and its workers

KINDS = {"picture.jpg": "image", "picture.png": "image", "speech.wav": "audio", "speech2.mp3": "audio"}
KINDS |= {"video.mp4": "video", "silent.mp4": "video"}


def damaged(folder: Path) -> list[tuple[Path, str]]:
    """Sixty files that are cut, have bits flipped, are of another type, huge, or without end."""
    rng = random.Random(0)
    files = []

    def add(name: str, data: bytes, kind: str) -> None:
        path = folder / f"{len(files):03d}-{name}"
        path.write_bytes(data)
        files.append((path, kind))

    for name, kind in KINDS.items():
        data = (requests.MEDIA / name).read_bytes()
        for part in (0.0, 0.01, 0.3, 0.9):
            add(name, data[: int(len(data) * part)], kind)
        for _ in range(2):
            flipped = bytearray(data)
            for _ in range(200):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            add(name, bytes(flipped), kind)
        for other in ("image", "audio", "video"):
            if other != kind and not (other == "audio" and kind == "video"):
                add(name, data, other)
    # a header that promises 65535 x 65535 pixels, and a picture that really has too many
    png = bytearray((requests.MEDIA / "picture.png").read_bytes())
    png[16:24] = (65535).to_bytes(4, "big") * 2
    add("huge.png", bytes(png), "image")
    Image.new("1", (20_000, 20_000)).save(folder / "large.png")
    files.append((folder / "large.png", "image"))
    # a sound that says that it lasts for hours, and one that does
    wav = bytearray((requests.MEDIA / "speech.wav").read_bytes())
    wav[4:8] = wav[40:44] = (0x7FFFFFF0).to_bytes(4, "little")
    add("endless.wav", bytes(wav), "audio")
    add("hours.wav", bytes(wav[:44]) + bytes(200 << 20), "audio")
    os.mkfifo(folder / "pipe.wav")  # whoever reads it waits for ever
    files.append((folder / "pipe.wav", "audio"))
    while len(files) < NUM_DAMAGED:
        add("noise.bin", rng.randbytes(5000), rng.choice(["image", "audio", "video"]))
    return files


def memory() -> int:
    """Bytes of this process and of its children."""
    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def test_sixty_damaged_files(model: omni_jax.OmniModel, media_workers: MediaWorkers, tmp_path: Path) -> None:
    files = damaged(tmp_path)
    assert len(files) == NUM_DAMAGED
    lines = []
    for i, (path, kind) in enumerate(files):
        part = {"type": kind, kind: str(path)}
        lines.append(requests.line(f"damaged-{i}", [part, {"type": "text", "text": "?"}], max_completion_tokens=2))
        if i % 4 == 0:
            (tmp_path / "media").exists() or (tmp_path / "media").symlink_to(requests.MEDIA)
            lines.append(requests.good(i))
    locations = FileLocations(MediaRoots(("/",), str(tmp_path)), str(tmp_path))
    runner = BatchRunner(model, "m", media_workers, SchedulerConfig(8, 8), locations, RunStatus())
    results = {}
    half_memory = 0
    for result in runner.run(Line(i + 1, data.encode()) for i, data in enumerate(lines)):
        values = json.loads(result.text)
        results[values["custom_id"]] = values
        if len(results) == len(lines) // 2:
            half_memory = memory()
    assert len(results) == len(lines)
    assert memory() < half_memory + MAX_GROWTH
    for custom_id, values in results.items():
        if custom_id.startswith("good"):
            assert values["error"] is None, values
    messages = [v["error"]["message"] for v in results.values() if v["error"] is not None]
    # flipped bits may leave a file that can be read; whatever is cut, of another type or too large may not
    assert len(messages) >= 45
    assert all("messages[0].content[0]" in m or "media" in m for m in messages), messages


def image(path: Path) -> tuple:
    return parse_messages([{"role": "user", "content": [{"type": "image", "image": str(path)}]}])


def hang(*_: object) -> None:
    time.sleep(60)


def die(*_: object) -> None:
    os._exit(9)


def grow(*_: object) -> int:
    return np.ones(4 << 30, np.uint8).nbytes


def test_a_worker_that_hangs_dies_or_grows_costs_one_request(
    media_workers: MediaWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = image(requests.MEDIA / "picture.jpg")
    calls = []
    for wrong in (hang, die, grow):
        monkeypatch.setattr(media_workers_module, "_prepare", wrong)
        calls.append(media_workers.submit(good, None, 1000))
        monkeypatch.undo()
    others = [media_workers.submit(good, None, 1000) for _ in range(4)]
    for call, message in zip(calls, ("took over 8 s", "died", "over 2 GiB"), strict=True):
        with pytest.raises(InputError, match=message):
            media_workers.result(call)
    assert {len(media_workers.result(other)) for other in others} == {len(media_workers.result(others[0]))}
