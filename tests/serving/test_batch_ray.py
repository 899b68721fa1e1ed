"""Two actors of a local Ray cluster: the results of one machine, also when an actor is killed half way."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import run, start
from tests.serving import requests
from tests.serving.test_batch import command, comparable, results

pytestmark = pytest.mark.long  # a cluster and five processes that each load a model take minutes

LINES = 32  # eight blocks or so


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Requests and what one machine makes of them."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "media").symlink_to(requests.MEDIA)
    lines = [requests.good(i) for i in range(LINES - 2)]
    lines.insert(5, "{not json")
    lines.insert(20, requests.good(3))  # whose custom_id was there before
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    done = run(*command(tiny_model, folder, "alone"), "--media-root", "/")
    assert done.returncode == 0, done.stderr
    return folder


def over_ray(model: Path, folder: Path, name: str) -> list[str]:
    engine = ["--engine", "ray", "--ray.actors", "2", "--slots", "2", "--workers", "1", "--media-root", "/"]
    return [*command(model, folder, name), *engine]


def test_two_actors(tiny_model: Path, folder: Path) -> None:
    done = run(*over_ray(tiny_model, folder, "ray"))
    assert done.returncode == 0, done.stderr
    assert comparable(folder, "ray") == comparable(folder, "alone")
    summary = json.loads(done.stdout)
    assert (summary["answered"], summary["failed"]) == (LINES - 2, 2)


def test_an_actor_is_killed_half_way(tiny_model: Path, folder: Path) -> None:
    process = start(*over_ray(tiny_model, folder, "killed"))
    file = folder / "killed.jsonl"
    started = time.monotonic()
    actors: list[psutil.Process] = []
    # the second may begin when the first has nearly all of the work: until one is at work and something is done
    while not actors or not file.exists() or len(file.read_bytes().splitlines()) < 3:
        assert process.poll() is None, "it ended before an actor could be killed"
        assert time.monotonic() - started < 240
        actors = [p for p in psutil.Process(process.pid).children(recursive=True) if is_actor(p)]
        time.sleep(0.05)
    os.kill(actors[0].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert len(results(folder, "killed")) == LINES
    assert comparable(folder, "killed") == comparable(folder, "alone")


def is_actor(process: psutil.Process) -> bool:
    try:
        return "MapWorker" in process.cmdline()[0]
    except (psutil.Error, IndexError):
        return False
