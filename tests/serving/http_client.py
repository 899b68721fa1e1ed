"""A server as a user starts it, and OpenAI's client for it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
from openai import OpenAI

from tests.processes import start

KEY = "sk-test"


@contextlib.contextmanager
def serve_http(model: Path, *options: str, seconds: float = 30) -> Iterator[str]:
    """The address of a server with these options; it is told to stop at the end, and must end well in some seconds."""
    usual = ("--warmup-tokens", "0", "--slots", "4", "--workers", "1", "--port", "0", "--drain-seconds", "5")
    process = start("serve.py", "http", "--model", model, *usual, *options)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
    reader.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=;)", line)
        assert found is not None, f"{line}{''.join(errors)}"
        yield found[0]
    finally:
        process.terminate()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    reader.join()
    assert code in (0, -15), "".join(errors)


def find_server(address: str) -> psutil.Process:
    """The process that listens at an address."""
    port = int(address.rpartition(":")[2])
    for process in psutil.Process().children(recursive=True):
        if any(connection.laddr.port == port for connection in process.net_connections() if connection.laddr):
            return process
    raise AssertionError(f"no process listens at {address}")


def connect(address: str, key: str = KEY) -> OpenAI:
    """A client that asks once, so that a test sees every error."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=120)
