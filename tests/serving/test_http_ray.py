"""Two replicas of the server over a local Ray cluster: the answers of one, also when one of them is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from openai import OpenAI

from tests.serving.http_client import connect, serve_http

pytestmark = pytest.mark.long  # a cluster and three servers that each load a model take minutes

QUESTIONS = [f"Name {count} colours." for count in range(2, 8)]


def test_two_replicas(tiny_model: Path, tmp_path: Path) -> None:
    with serve_http(tiny_model) as address:
        alone = answer_all(connect(address))
    options = ("--engine", "ray", "--ray.actors", "2", "--port", "0", "--voices-dir", str(tmp_path / "voices"))
    with serve_http(tiny_model, *options, seconds=90) as address:
        client = connect(address)
        assert answer_all(client) == alone
        replicas = find_replicas()
        assert len(replicas) == 2
        os.kill(replicas[0].pid, signal.SIGKILL)
        for _ in range(3):
            assert answer_all(client) == alone
        wait_for_replica(replicas[1])
        assert answer_all(client) == alone
        check_stream(client, alone[QUESTIONS[0]])
        with pytest.raises(openai.BadRequestError, match="several replicas"):
            client.files.list()


def answer_all(client: OpenAI) -> dict[str, Any]:
    answers = {}
    for question in QUESTIONS:
        completion = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": question}],
            max_tokens=8,
            temperature=0,
        )
        answers[question] = completion.choices[0].message.content
    return answers


def check_stream(client: OpenAI, expected: str) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTIONS[0]}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def find_replicas() -> list[psutil.Process]:
    """The processes of replicas, the oldest first."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in process.cmdline()[0]:
                found.append(process)
        except (psutil.Error, IndexError):
            continue
    return sorted(found, key=lambda process: process.create_time())


def wait_for_replica(known: psutil.Process) -> None:
    """Waits until there is a new one."""
    started = time.monotonic()
    while not any(process.pid != known.pid for process in find_replicas()):
        assert time.monotonic() - started < 120
        time.sleep(0.5)
