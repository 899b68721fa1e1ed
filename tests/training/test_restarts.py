"""Runs that are killed or told to stop go on to the same losses, bit by bit."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from omni_jax.training.loop import PREEMPTED
from omni_jax.training.metrics_log import METRICS_FILE, read_metrics
from tests.processes import finish, start
from tools.train_demo import MEDIA

pytestmark = pytest.mark.long  # ten processes that each load a model and compile a step

NUM_STEPS = 12
KILLED = -signal.SIGKILL
# before the first step, between two checkpoints, while one is written, and after one
KILLS = [("SIGKILL", "start"), ("SIGKILL", "step 3"), ("SIGKILL", "saving"), ("SIGKILL", "step 2")]


class Run(NamedTuple):
    workdir: Path
    codes: list[int]  # how each of its processes ended
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="module")
def make_run(tiny_model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """The same run, stopped at these points; all processes of one run are children of another."""
    folder = tmp_path_factory.mktemp("restarts")
    options = ["thinker-sft-tiny", "--init", str(tiny_model), "--data.train", str(rows), "--data.rows", "1"]
    options += ["--data.media-root", str(MEDIA), "--steps", str(NUM_STEPS), "--checkpoint.every"]

    def make(name: str, stops: Sequence[tuple[str, str]] = (), every: int = 2) -> Run:
        workdir = folder / name
        case = {"workdir": str(workdir), "stops": list(stops), "options": [*options, str(every)]}
        output = finish(start("-m", "tests.training.killed", json.dumps([case])))
        (codes,) = json.loads(output.splitlines()[-1])
        return Run(workdir, codes, read_metrics(workdir / METRICS_FILE))

    return make


@pytest.fixture(scope="module")
def unbroken(make_run: Callable[..., Run]) -> Run:
    return make_run("unbroken")


def assert_same_metrics(run: Run, unbroken: Run) -> None:
    assert unbroken.codes == [0]
    assert [m["step"] for m in unbroken.metrics] == list(range(1, NUM_STEPS + 1))
    for name in ("step", "loss", "grad_norm", "tokens", "target_tokens", "learning_rate"):
        assert [m[name] for m in run.metrics] == [m[name] for m in unbroken.metrics], name


def test_killed_four_times(make_run: Callable[..., Run], unbroken: Run) -> None:
    run = make_run("killed", KILLS)
    assert run.codes == [KILLED] * len(KILLS) + [0]
    assert_same_metrics(run, unbroken)
    # nothing is left of what was not finished
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == ["00000008", "00000010", "00000012"]


def test_told_to_stop(make_run: Callable[..., Run], unbroken: Run) -> None:
    run = make_run("stopped", [("SIGTERM", "step 1")], every=1000)
    assert run.codes == [PREEMPTED, 0]
    assert_same_metrics(run, unbroken)
    # what it saved when it was told, though no checkpoint was due, and its end
    saved = sorted(int(path.name) for path in (run.workdir / "checkpoints").iterdir())
    assert len(saved) == 2 and saved[0] < saved[1] == NUM_STEPS
