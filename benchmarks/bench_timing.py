"""What the benchmarks share: cases that both sides do in turns, processes whose memory is counted, and the table.

Nothing here imports JAX or PyTorch, so that a process of one side holds nothing of the other's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Case:
    """One row of the table: the same work on both sides. Each side does it once and returns the seconds it took.

    Attributes:
      name: the row's.
      ours, theirs: the work; None where PyTorch is left out.
      work, unit: how much of what is done in those seconds, to give a rate; none if the unit is empty.
    """

    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float] | None
    work: float = 0.0
    unit: str = ""


class Side:
    """A process that does one side's work, so that its memory is its own.

    Attributes:
      memory: after each call, the most bytes that the process held at once during it: interpreter, libraries and
        weights, and whatever it compiled. 0 where the system does not say (it is Linux that does).
    """

    def __init__(self) -> None:
        # not forked: threads of a parent that has used JAX would be missing
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.memory = 0

    def __call__(self, work: Callable[..., Any], *args: Any) -> Any:
        """What ``work(*args)`` returns; it is a function of a module."""
        result, self.memory = self._pool.submit(_watched, work, *args).result()
        return result

    def close(self) -> None:
        self._pool.shutdown()


def _watched(work: Callable[..., Any], *args: Any) -> tuple[Any, int]:
    """The result, and the high-water mark of this process's memory while it was made."""
    if not (_PROCESS / "clear_refs").exists():
        return work(*args), 0
    (_PROCESS / "clear_refs").write_text("5")  # sets the mark back to what is held now
    result = work(*args)
    lines = (_PROCESS / "status").read_text().splitlines()
    return result, next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def one_core() -> None:
    """Holds this process, and the threads that it will start, to one core."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call, which must not return before its result is there."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(case: Case, repeats: int, *, warm_up: bool = True) -> dict[str, Any]:
    """Medians over rounds of both sides in turns; ``warm_up`` puts one before them that is not counted."""
    sides = [case.ours] if case.theirs is None else [case.ours, case.theirs]
    rounds = [[side() for side in sides] for _ in range(repeats + warm_up)][warm_up:]
    ours, *theirs = zip(*rounds, strict=True)
    out: dict[str, Any] = dict(case=case.name, ours_seconds=statistics.median(ours))
    if theirs:
        out["theirs_seconds"] = statistics.median(theirs[0])
        out["ratio"] = statistics.median(b / a for a, b in zip(ours, theirs[0], strict=True))
    if case.unit:
        out["unit"] = case.unit
        out |= {f"{side}_rate": case.work / out[f"{side}_seconds"] for side in _sides(out)}
    return out


def show(results: Sequence[dict[str, Any]]) -> None:
    """Prints what ``measure`` gave, and ``ours_gigabytes`` and ``theirs_gigabytes`` of memory where they are given."""
    table = Table("", "omni_jax", "PyTorch", "PyTorch / omni_jax", "rate", "memory, GB")
    for r in results:
        times = [duration(r[f"{side}_seconds"]) if side in _sides(r) else "" for side in ("ours", "theirs")]
        ratio = f"{r['ratio']:.2f}" if "ratio" in r else ""
        table.add_row(r["case"], *times, ratio, f"{_pair(r, 'rate')} {r.get('unit', '')}", _pair(r, "gigabytes"))
    Console(width=130).print(table)


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def write(json_out: Path | None, results: Any) -> None:
    """Writes the figures, where a file is asked for."""
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _sides(result: dict[str, Any]) -> list[str]:
    return [side for side in ("ours", "theirs") if f"{side}_seconds" in result]


def _pair(result: dict[str, Any], what: str) -> str:
    values = [result.get(f"{side}_{what}") for side in ("ours", "theirs")]
    return " : ".join(f"{v:.1f}" for v in values if v)
