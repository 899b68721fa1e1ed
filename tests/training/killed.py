"""Trains in child processes that are stopped at chosen points; run by test_restarts.py in a process of its own.

``python -m tests.training.killed CASES`` reads a JSON list of {"workdir", "stops", "options"} and prints a JSON list
with how each child of each case ended. A stop is a signal and a point:

* ``start``: before the run has told of a step;
* ``step N``: after ``N`` more steps than the child before it had told of, so between two checkpoints or on one;
* ``saving``: while a checkpoint is being written and has no name yet.

What the children import is imported once, before any of them: a child costs little more than what it trains.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import omni_jax.training.command_line  # noqa: F401, once, before the children
import train as command
from omni_jax.checkpoint.train_checkpoints import CHECKPOINTS_FOLDER
from omni_jax.training.metrics_log import METRICS_FILE

SLOWEST_START = 240.0  # seconds until a child must have come to its point


def start_child(options: list[str]) -> int:
    """Returns its process id."""
    if process := os.fork():
        return process
    sys.argv = ["train.py", *options]
    code = command.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_code(process: int) -> int | None:
    """Negative for a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def unfinished_checkpoints(workdir: Path) -> set[str]:
    return {path.parent.name for path in (workdir / CHECKPOINTS_FOLDER).glob("*.orbax-checkpoint-tmp/*")}


def stop_child(process: int, workdir: Path, point: str, how: int) -> int:
    """Waits until the child comes to the point and sends the signal; returns its exit code."""
    kind, _, steps = point.partition(" ")
    # a child drops the lines after the checkpoint that it goes on from, so it is one more line than that that counts
    lines = count_lines(workdir / METRICS_FILE)
    stale = unfinished_checkpoints(workdir)  # of the child before, until this one has removed it
    deadline = time.monotonic() + SLOWEST_START
    while time.monotonic() < deadline:
        if (code := exit_code(process)) is not None:
            return code
        if kind == "start" and (workdir / "tensorboard").exists():
            break
        if kind == "step" and count_lines(workdir / METRICS_FILE) >= lines + int(steps):
            break
        unfinished = unfinished_checkpoints(workdir)
        if kind == "saving" and unfinished - stale:
            break
        stale &= unfinished
        time.sleep(0.001)
    os.kill(process, how)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run_case(workdir: str, stops: list[tuple[str, str]], options: list[str]) -> list[int]:
    options = [*options, "--workdir", workdir]
    codes = []
    for how, point in stops:
        process = start_child(options)
        codes.append(stop_child(process, Path(workdir), point, signal.Signals[how]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(start_child(options), 0)[1]))
    return codes


def main() -> None:
    cases = json.loads(sys.argv[1])
    print(json.dumps([run_case(**case) for case in cases]))


if __name__ == "__main__":
    main()
