"""Runs that are killed or told to stop go on to the same losses, bit by bit."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from omni_jax.training.loop import PREEMPTED
from omni_jax.training.progress import METRICS_FILE, read_metrics
from tests.training.processes import finish, start

STEPS = 14


@pytest.fixture(scope="module")
def options(tiny_model: Path, rows: Path) -> list[str]:
    about = {"init": tiny_model, "data.train": rows, "steps": STEPS, "checkpoint.every": 2, "data.rows": 1}
    return ["thinker-sft-tiny", *(part for name, value in about.items() for part in (f"--{name}", str(value)))]


def run(workdir: Path, kills: int, how: str, options: list[str]) -> tuple[list[int], list[dict[str, Any]]]:
    codes = json.loads(finish(start("tests.training.killed", str(workdir), str(kills), how, *options)).splitlines()[-1])
    return codes, read_metrics(workdir / METRICS_FILE)


@pytest.fixture(scope="module")
def unbroken(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    codes, metrics = run(tmp_path_factory.mktemp("unbroken") / "run", 0, "SIGKILL", options)
    assert codes == [0] and [m["step"] for m in metrics] == list(range(1, STEPS + 1))
    return metrics


def assert_same(metrics: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for name in ("step", "loss", "grad_norm", "tokens", "learnt", "learning_rate"):
        assert [m[name] for m in metrics] == [m[name] for m in expected], name


def test_killed_ten_times(options: list[str], unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    codes, metrics = run(tmp_path / "run", 10, "SIGKILL", options)
    assert set(codes) <= {0, -signal.SIGKILL} and codes.count(-signal.SIGKILL) >= 4 and codes[-1] == 0
    assert_same(metrics, unbroken)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # nothing is left of what was not finished


def test_told_to_stop(options: list[str], unbroken: list[dict[str, Any]], tmp_path: Path) -> None:
    codes, metrics = run(tmp_path / "run", 1, "SIGTERM", [*options, "--checkpoint.every", "1000"])
    assert codes == [PREEMPTED, 0]
    assert_same(metrics, unbroken)
    # what it saved when it was told, though no checkpoint was due, and its end
    saved = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == 2 and saved[0] < saved[1] == STEPS
