"""Training in processes of their own, as the command line does it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

ROOT = Path(__file__).parents[2]


def environment(devices: int = 1) -> dict[str, str]:
    """That of a process with so many devices, which shares the compiled programs and the precision of the tests."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "PYTHONPATH": str(ROOT),
    }


def start(module: str, *arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], codes: Sequence[int] = (0,)) -> str:
    """What it printed."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode in codes, f"{process.returncode}\n{out[-2000:]}\n{errors[-3000:]}"
    return out
