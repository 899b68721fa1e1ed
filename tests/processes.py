"""Programs in processes of their own, as the command line starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_environment(devices: int = 1) -> dict[str, str]:
    """That of a process with so many devices; tests/conftest.py has set the compile cache and the precision."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}


def run(*arguments: str | Path, devices: int = 1, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, until it ends; what it printed is in the result."""
    command = [sys.executable, *map(str, arguments)]
    environment = make_environment(devices)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def start(*arguments: str | Path, devices: int = 1) -> subprocess.Popen[str]:
    """Python with these arguments."""
    command = [sys.executable, *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=ROOT, env=make_environment(devices), text=True, **pipes)


def finish(process: subprocess.Popen[str], codes: Sequence[int] = (0,)) -> str:
    """What it printed."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode in codes, f"{process.returncode}\n{out[-2000:]}\n{errors[-3000:]}"
    return out
