"""Processes that decode for chat, Python and training as they do for files of requests, within the same limits."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tyro
from PIL import Image, ImageFile

import omni_jax
from omni_jax.data import packing, pipeline
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import OmniPacking
from omni_jax.errors import InputError
from omni_jax.processing import media_workers, worker_pool
from omni_jax.processing.images import read_image
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.media_workers import MediaWorkers, isolate
from omni_jax.processing.processor import Processor
from omni_jax.processing.worker_pool import MediaLimits, PreparationError, WorkerPool, WorkerStartError
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
    batches = pipeline.batches(config, OmniPacking.create(config, processor, 1))
    expected = next(batches)
    batches.close()
    monkeypatch.setattr(Processor, "read_media", refuse)
    config = dataclasses.replace(config, isolate_media=True)
    isolated = pipeline.batches(config, OmniPacking.create(config, processor, 1))
    try:
        found = next(isolated)
    finally:
        isolated.close()
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# --- pictures that Pillow has opened, and those of a live session ---


def open_as_bytes() -> Image.Image:
    return Image.open(io.BytesIO(Path(PICTURE).read_bytes()))


@pytest.mark.parametrize("make", [lambda: PICTURE, lambda: Image.open(PICTURE), open_as_bytes])
def test_pictures_are_decoded_by_workers_alone(
    processor: Processor, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    """Whether they come with messages or one by one; pickling a picture of Pillow's would decode it."""
    isolated = isolate(processor, 1, MediaLimits(seconds=60.0, gigabytes=2.0))
    messages = [user({"type": "image", "image": make()}), user({"type": "video", "video": [make(), make()]})]
    expected = [processor(message).usage for message in messages]
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    messages = [user({"type": "image", "image": make()}), user({"type": "video", "video": [make(), make()]})]
    assert [isolated(message).usage for message in messages] == expected
    live = LivePrompt(isolated, [], audio=False, video=True)
    live.video(make(), 0.0)
    assert live.whole_prompt("").usage.video > 0
    # pixels are sent to nobody
    assert isolated.read_picture(np.zeros((28, 28, 3), np.uint8)).size == (28, 28)


def test_a_picture_of_a_live_session_costs_no_more_than_itself(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolated = isolate(processor, 1, MediaLimits(seconds=8.0, gigabytes=2.0))
    live = LivePrompt(isolated, [], audio=False, video=True)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="died"):
        patch.setattr(media_workers, "_read_picture", die)
        live.video(PICTURE, 0.0)
    with pytest.raises(InputError, match="no such file"):
        live.video("none.png", 0.0)
    live.video(PICTURE, 0.0)
    picture = isolated.read_picture(PICTURE)
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(read_image(PICTURE)))


class Unpicklable:
    """Raises what a damaged picture may raise when Pillow decodes it to pickle it."""

    def __reduce__(self) -> Any:
        raise SyntaxError("broken PNG file")


def test_what_cannot_be_sent_costs_itself() -> None:
    with WorkerPool(1, MediaLimits()) as pool:
        with pytest.raises(InputError, match="it cannot be sent to another process: SyntaxError: broken PNG file"):
            pool.schedule(len, Unpicklable())
        assert pool.schedule(len, "abc").result(timeout=60) == 3


# --- processes that do not get ready ---


class Unpickled:
    """Calls a function where it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("call", [(time.sleep, 60), (os._exit, 1), (np.ones, 1 << 40)], ids=["hangs", "dies", "grows"])
def test_workers_that_never_get_ready(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setattr(worker_pool, "MAX_START_SECONDS", 2.0)
    processor: Any = Unpickled(*call)
    with MediaWorkers(processor, 2, MediaLimits(seconds=60.0, gigabytes=1.0)) as workers:
        calls = [workers.submit((), None, 100) for _ in range(3)]
        for future in calls:
            with pytest.raises(WorkerStartError, match="the processes that decode media cannot be started"):
                future.result(timeout=60)
        # from then on at once, and no process is started
        monkeypatch.setattr(worker_pool, "MAX_START_SECONDS", 600.0)
        with pytest.raises(WorkerStartError):
            workers.submit((), None, 100)
        with pytest.raises(InputError, match="cannot be started"):
            workers.read_picture(PICTURE)


def test_training_ends_where_no_worker_gets_ready(
    processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are not rejected one by one."""
    answer = {"from": "gpt", "value": "A disc."}
    row = {"conversations": [{"from": "human", "value": "<image>?"}, answer], "images": [PICTURE]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(worker_pool, "MAX_START_SECONDS", 2.0)
    hanging: Any = Unpickled(time.sleep, 60)
    monkeypatch.setattr(
        packing, "isolate", lambda p, count: p.with_media_reader(MediaWorkers(hanging, count, MediaLimits()))
    )
    config = DataConfig(
        train=(str(tmp_path / "rows.jsonl"),), media_root=str(MEDIA), isolate_media=True, max_reject_share=0.9
    )
    batches = pipeline.batches(config, OmniPacking.create(config, processor, 1))
    try:
        with pytest.raises(WorkerStartError, match="cannot be started"):
            next(batches)
    finally:
        batches.close()


def test_the_time_of_a_start_is_no_limit_of_the_work() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "MAX_START_SECONDS", 3.0)
        pool = WorkerPool(1, MediaLimits())
    with pool:
        assert pool.schedule(time.sleep, 3.5).result(timeout=60) is None


def test_a_worker_that_dies_while_it_waits_is_replaced() -> None:
    with WorkerPool(1, MediaLimits()) as pool:
        os.kill(pool.schedule(os.getpid).result(timeout=60), signal.SIGKILL)
        # a call that was given to it in the meantime may be lost, but the next one is not
        for _ in range(50):
            try:
                assert pool.schedule(os.getpid).result(timeout=60) > 0
                break
            except PreparationError as e:
                assert "died before it began" in str(e)
        else:
            raise AssertionError("no worker takes its place")


def test_workers_need_no_jax() -> None:
    """Nor do the files that they import when they start: so they start in a second and take 65 MB of memory."""
    program = "import sys, serve, train, omni_jax.processing.media_workers; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=MEDIA.parents[1]
    )
    assert done.stdout.strip() == "False"
