"""Trains in child processes that are stopped at random moments; run by test_restarts.py in a process of its own.

``python -m tests.training.killed WORKDIR KILLS SIGNAL OPTION...`` prints one JSON list: how each child ended. What the
children import is imported once, before any of them: a child costs little more than what it trains.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import train as command
from omni_jax.training.progress import METRICS_FILE

SLOWEST_START = 120.0  # seconds


def child(options: list[str]) -> int:
    """Starts one; returns its id."""
    if process := os.fork():
        return process
    sys.argv = ["train.py", *options]
    code = command.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def ended(process: int) -> int | None:
    """The exit code, negative for a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def stop_at_random(process: int, metrics: Path, how: int, rng: random.Random) -> int:
    """Waits until the child has told of a step or so, a random while more, and sends the signal."""
    before, waited, wait = size_of(metrics), time.monotonic(), rng.uniform(0.0, 0.5)
    at_start = how == signal.SIGKILL and rng.random() < 0.3  # some before they have told of anything
    while size_of(metrics) <= before and not at_start and time.monotonic() - waited < SLOWEST_START:
        if (code := ended(process)) is not None:
            return code
        time.sleep(0.005)
    time.sleep(wait * (4 if at_start else 1))
    if (code := ended(process)) is not None:
        return code
    os.kill(process, how)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main() -> None:
    workdir, kills, how, *options = sys.argv[1:]
    rng, codes = random.Random(3), []
    options = [*options, "--workdir", workdir]
    for _ in range(int(kills)):
        process = child(options)
        codes.append(stop_at_random(process, Path(workdir) / METRICS_FILE, signal.Signals[how], rng))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child(options), 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
