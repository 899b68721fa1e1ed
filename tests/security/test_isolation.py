"""Processes that decode for chat, Python and training as they do for files of requests, within the same limits."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tyro
from PIL import Image

import omni_jax
from omni_jax.data import pipeline
from omni_jax.data.config import DataConfig
from omni_jax.errors import InputError
from omni_jax.processing import media_workers
from omni_jax.processing.media_workers import MediaLimits, isolate
from omni_jax.processing.processor import Processor
from omni_jax.serving import chat
from omni_jax.serving.commands import ChatCommand
from tests.security.conftest import MEDIA

PICTURE, WAV = str(MEDIA / "picture.jpg"), str(MEDIA / "speech.wav")


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def refuse(*_: object) -> None:
    raise AssertionError("it was read in this process")


def die(*_: object) -> None:
    os._exit(9)


def hang(*_: object) -> None:
    time.sleep(60)


def grow(*_: object) -> int:
    return np.ones(4 << 30, np.uint8).nbytes


def test_isolated_media_are_read_alike_and_end_no_process_but_a_worker(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = isolate(processor, 1, MediaLimits(seconds=8.0, gigabytes=2.0))
    messages = user(
        {"type": "image", "image": Image.open(PICTURE)},
        {"type": "video", "video": str(MEDIA / "video.mp4")},
        {"type": "audio", "audio": np.zeros(8000, np.float32), "sampling_rate": 8000},
        {"type": "text", "text": "?"},
    )
    expected = processor(messages)
    # in this process nothing is read any more
    monkeypatch.setattr(Processor, "read_media", refuse)
    found = isolated(messages)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.media[0].patches, expected.media[0].patches)
    # other sizes hold in the worker, too
    small = isolated.with_pixels(max_pixels=28 * 28 * 4)
    assert small(user({"type": "image", "image": PICTURE})).usage.image == 2
    for wrong, message in ((hang, "took over 8 s"), (die, "died"), (grow, "over 2 GiB")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=rf"content\[0\] \(image .*{message}"):
            patch.setattr(media_workers, "_read_media", wrong)
            isolated(user({"type": "image", "image": PICTURE}))
    with pytest.raises(InputError, match=r"content\[0\] \(image 'none.png'\): no such file"):
        isolated(user({"type": "image", "image": "none.png"}))
    assert isolated(messages).usage == expected.usage


def test_a_loaded_model_isolates_its_media(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = omni_jax.load(tiny_model, components=("thinker",), isolate_media=True)
    monkeypatch.setattr(Processor, "read_media", refuse)
    assert model.processor(user({"type": "audio", "audio": WAV})).usage.audio > 0


def test_chat_isolates_media_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def stop(_: Path, **options: Any) -> None:
        given.append(options)
        raise InputError("enough")

    monkeypatch.setattr(chat, "load", stop)
    for arguments in ((), ("--no-isolate-media",)):
        with pytest.raises(InputError, match="enough"):
            chat.run_chat(tyro.cli(ChatCommand, args=["--model", "m", "--text", "hi", *arguments]))
    assert [options["isolate_media"] for options in given] == [True, False]


def test_training_isolates_media_and_makes_the_same_batches(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    answer = {"from": "gpt", "value": "A disc."}
    lines = []
    for number in range(4):
        question = {"from": "human", "value": f"<image>What is {number}?"}
        lines.append(json.dumps({"conversations": [question, answer], "images": [PICTURE]}))
    rows.write_text("\n".join(lines))
    config = DataConfig(
        train=(str(rows),),
        media_root=str(Path(PICTURE).parent),
        tokens=256,
        audio_blocks=0,
        canvases=4,
        windows=8,
        max_pixels=112 * 112,
    )
    batches = pipeline.batches(config, processor)
    expected = next(batches)
    batches.close()
    monkeypatch.setattr(Processor, "read_media", refuse)
    isolated = pipeline.batches(DataConfig(**{**vars(config), "isolate_media": True}), processor)
    try:
        found = next(isolated)
    finally:
        isolated.close()
    jax.tree.map(np.testing.assert_array_equal, found, expected)
