"""Runs cases on both sides in alternating rounds, and takes medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks.side import SideProcess


@dataclass(frozen=True)
class Case:
    """The same work for both sides.

    Attributes:
      name: in the table.
      method: of ``Side``, which returns seconds.
      args: of the method.
      with_pytorch: whether PyTorch does it too.
      divisor: of the seconds; for times of one second of speech, say.
      work: in the seconds that are shown, of what ``unit`` says, for a rate; no rate without a unit.
    """

    name: str
    method: Callable[..., float]
    args: tuple[Any, ...]
    with_pytorch: bool = True
    divisor: float = 1.0
    work: float = 0.0
    unit: str = ""


@dataclass(frozen=True)
class SideResult:
    """Of one side: the median of the seconds, the rate, and the most memory that it held in the case."""

    seconds: float
    rate: float | None
    gigabytes: float


@dataclass(frozen=True)
class CaseResult:
    """Of both sides; ``ratio`` is the median over rounds of PyTorch's seconds over ours."""

    case: str
    unit: str
    ours: SideResult
    pytorch: SideResult | None = None
    ratio: float | None = None


def run_case(
    case: Case, ours: SideProcess[Any], pytorch: SideProcess[Any], repeats: int, *, warm_up: bool = True
) -> CaseResult:
    """Runs a case ``repeats`` times on each side in turns; ``warm_up`` puts a round before them that does not count."""
    our_seconds: list[float] = []
    their_seconds: list[float] = []
    # in turns: a ratio is that of two times which lie side by side
    for _ in range(repeats + warm_up):
        our_seconds.append(ours.run(case.method, *case.args) / case.divisor)
        if case.with_pytorch:
            their_seconds.append(pytorch.run(case.method, *case.args) / case.divisor)
    # the first round, in which a side loads what the case needs, does not count
    if warm_up:
        del our_seconds[:1]
        del their_seconds[:1]
    result = _summarize(case, our_seconds, ours.memory)
    if not case.with_pytorch:
        return CaseResult(case.name, case.unit, result)
    # the median of the ratios, and not the ratio of the medians, which may be of different rounds
    ratios = [their / our for their, our in zip(their_seconds, our_seconds, strict=True)]
    pytorch_result = _summarize(case, their_seconds, pytorch.memory)
    return CaseResult(case.name, case.unit, result, pytorch_result, statistics.median(ratios))


def run_cases(
    cases: Sequence[Case], ours: SideProcess[Any], pytorch: SideProcess[Any], repeats: int, *, warm_up: bool = True
) -> list[CaseResult]:
    """Runs the cases one after the other, with a bar that shows how far they are."""
    steps = track(cases, "timing", console=Console(stderr=True))
    return [run_case(case, ours, pytorch, repeats, warm_up=warm_up) for case in steps]


def _summarize(case: Case, seconds: Sequence[float], memory: int) -> SideResult:
    median = statistics.median(seconds)
    return SideResult(median, case.work / median if case.unit else None, memory / 1e9)
