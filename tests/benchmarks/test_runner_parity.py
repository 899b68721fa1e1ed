"""Rounds and medians, the process of a side, and the options of the command line. No times are looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.runner import Case, run_case
from benchmarks.side import Side, SideProcess
from tools import bench


class FakeProcess(SideProcess[Any]):
    """Its times are given."""

    def __init__(self, *seconds: float):
        self.seconds = iter(seconds)
        self.memory = 2 * 10**9

    def run(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return next(self.seconds)


def test_a_figure_is_the_median_of_alternating_rounds() -> None:
    case = Case("a", Side.vocode, (), divisor=2.0, work=6.0, unit="steps/s")
    result = run_case(case, FakeProcess(100.0, 2.0, 6.0, 4.0), FakeProcess(1.0, 6.0, 6.0, 8.0), 3)
    assert (result.ours.seconds, result.ours.rate, result.ours.gigabytes) == (2.0, 3.0, 2.0)
    assert result.pytorch is not None and result.pytorch.seconds == 3.0
    assert result.ratio == 2.0  # the median of 3, 1 and 2, and not the ratio of the medians


def test_without_pytorch_or_a_round_before() -> None:
    result = run_case(Case("a", Side.vocode, (), with_pytorch=False), FakeProcess(5.0), FakeProcess(), 1, warm_up=False)
    assert result.ours.seconds == 5.0
    assert (result.ours.rate, result.pytorch, result.ratio) == (None, None, None)


class ProcessSide:
    """Only its process is looked at, so it needs nothing else of a side."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self) -> float:
        return float(os.getpid())


def test_a_side_is_a_process_whose_memory_is_seen(tmp_path: Path) -> None:
    side: Any = ProcessSide
    with SideProcess(side, tmp_path) as process:
        assert process.run(ProcessSide.load) not in (0.0, float(os.getpid()))
        assert 1e6 < process.memory < 1e9


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("understand", ("--json-out", "--repeats")),
        ("speak", ("--seconds", "--reference-seconds", "--batches", "--repeats", "--parts")),
        ("batch", ("--requests", "--seconds", "--slots", "--text-batch", "--picture")),
        ("latency", ("--json-out", "--picture", "--seconds", "--reference-seconds", "--repeats", "--sound", "warmup")),
        ("first-packet", ("--json-out", "--picture", "--seconds", "--repeats", "--sound")),
        ("data", ("--json-out", "--repeats", "one core")),
    ],
)
def test_help_teaches(command: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        bench.main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*options, "Example"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("speak --seconds 0", "--seconds 0: give different lengths of 1 to 327"),
        ("speak --seconds 2 --reference-seconds 10", "--reference-seconds 10: each must be one of --seconds 2"),
        ("speak --parts talker replies --batches 0", "--batches 0: it must be at least 1"),
        ("batch --slots 0", "--slots 0: it must be at least 1"),
        ("understand --repeats 0", "--repeats 0: it must be at least 1"),
        ("data --repeats 0", "--repeats 0: it must be at least 1"),
        ("latency --seconds 2 2", "--seconds 2 2: give different lengths"),
        ("latency --seconds 2 --reference-seconds 10", "each must be one of --seconds"),
        ("latency --repeats 0", "--repeats 0: it must be at least 1"),
        ("latency --sound none.wav", "--sound none.wav: there is no such file"),
        ("latency --picture a.txt", "--picture a.txt: its name must end in .png, .svg, .pdf"),
        ("first-packet --seconds 10 2", "--seconds 10 2: give different lengths of 1 to 327, shortest first"),
        ("first-packet --sound none.wav", "--sound none.wav: there is no such file"),
        ("batch --picture a.txt", "--picture a.txt: its name must end in .png, .svg, .pdf"),
    ],
)
def test_wrong_options(options: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.main(options.split())
