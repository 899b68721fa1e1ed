"""The commands: ``python -m tests.fuzz images|media|batch|voices|folders|all``.

Case ``I`` of seed ``S`` is always the same: ``python -m tests.fuzz images --seed S --case I`` runs it alone. Faults are
written to ``out/fuzz``, each case with its input and what it did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.fuzz.report import Tally, print_errors, print_table
from tests.fuzz.runner import RULES_FILE, Outcome, SeedError, Spec, fuzz, make_rng, make_target
from tests.fuzz.trace import STRACE, Rules, read_system_calls

Name = Literal["images", "media", "batch", "voices", "folders"]

_STRACE_CASES = 300  # of each command that ``all`` runs once more with system calls traced
_STRACE_SECONDS = 300.0


@dataclass(frozen=True)
class Plan:
    """How a command runs unless it is told otherwise.

    Attributes:
      target: the class that reads its cases.
      count: of its cases.
      seconds: after which it ends, done or not.
      case_seconds: limit of one case. Those of what a case may call are below it: 10 s of a chat template, 30 s of a
        process that decodes.
    """

    target: str
    count: int
    seconds: float
    case_seconds: float


PLANS: dict[Name, Plan] = {
    "images": Plan("tests.fuzz.media_targets:Images", 100_000, 1500, 40),
    "media": Plan("tests.fuzz.media_targets:Media", 9_000, 900, 40),
    "batch": Plan("tests.fuzz.batch_target:Batch", 20_000, 1200, 40),
    "voices": Plan("tests.fuzz.checkpoint_targets:Voices", 20_000, 600, 5),
    "folders": Plan("tests.fuzz.checkpoint_targets:Folders", 5_000, 1500, 25),
}


@dataclass(frozen=True)
class Options:
    """Runs mutated inputs through the functions that read them, and fails if one does what it must not.

    Attributes:
      command: what is fuzzed.
      count: of cases; as many as the command is for if None.
      seed: case I of seed S is always the same.
      seconds: after which the command ends; if it is not done by then, it fails.
      processes: side by side.
      case: run this one alone, and write what it is.
      strace: trace system calls too, which shows files that C libraries open; needs the program strace and is slow.
      out: where faults are written.
    """

    command: tyro.conf.Positional[Literal["images", "media", "batch", "voices", "folders", "all"]]
    count: int | None = None
    seed: int = 0
    seconds: float | None = None
    processes: int = 2
    case: int | None = None
    strace: bool = False
    out: Path = Path("out/fuzz")


def main(options: Options) -> int:
    """Runs one command or all of them; returns what the program exits with."""
    console = Console(width=130, markup=False, highlight=False)
    has_strace = shutil.which(STRACE[0]) is not None
    if options.strace and not has_strace:
        console.print("--strace: the program strace is not installed (apt install strace)")
        return 2
    names: list[Name] = list(PLANS) if options.command == "all" else [options.command]
    options.out.mkdir(parents=True, exist_ok=True)
    tallies: list[Tally] = []
    problem = None
    try:
        for name in names:
            tally = run_command(name, PLANS[name], options)
            # of a whole run, a sample is traced beneath Python too
            if options.command == "all" and has_strace and not options.strace:
                _trace_sample(tally, name, options)
            tallies.append(tally)
            print_errors(tally, console)
    except SeedError as e:
        problem = e
    print_table(tallies, console)
    if not options.strace and not has_strace:
        console.print("strace is not installed: files that C libraries open by themselves were not traced")
    code = _print_complaints(tallies, options, console)
    if problem is not None:
        console.print(f"FAILED, and what comes after it was not run: {problem}")
    return code if problem is None else 2


def run_command(name: Name, plan: Plan, options: Options) -> Tally:
    """Runs the cases of one command, with a bar that shows how far it is.

    Raises:
      SeedError: if a good input is not accepted.
    """
    first = options.case or 0
    count = 1 if options.case is not None else options.count or plan.count
    processes = 1 if options.strace else min(options.processes, count)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=options.out)).resolve()
    spec = Spec(plan.target, options.seed, plan.case_seconds, folder, is_traced=options.strace)
    tally = Tally(name, count)
    begin = time.monotonic()
    try:
        with _under_strace(folder) if options.strace else contextlib.nullcontext():
            _run_with_bar(spec, tally, processes, options.seconds or plan.seconds, first)
        if options.strace:
            _add_system_calls(tally, folder)
        tally.seconds = time.monotonic() - begin
        _write_faults(tally, spec, options)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tally


def _run_with_bar(spec: Spec, tally: Tally, processes: int, seconds: float, first: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(tally.name, total=tally.wanted)

        def report(outcome: Outcome, process: int) -> None:
            tally.add(outcome, process)
            num_faults = sum(tally.fault_counts.values())
            description = f"{tally.name}, {num_faults} faults" if num_faults else tally.name
            progress.update(task, completed=tally.count, description=description)

        fuzz(spec, tally.wanted, processes, seconds, report, first)


# --- system calls ---


@contextlib.contextmanager
def _under_strace(folder: Path) -> Iterator[None]:
    """Processes that are started within run under strace, each with a list of its calls in ``folder``."""
    program = folder / "python"
    call = shlex.join([*STRACE, str(folder / "calls")])
    program.write_text(f'#!/bin/sh\nexec {call}.$$ {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    multiprocessing.set_executable(str(program))
    try:
        yield
    finally:
        multiprocessing.set_executable(sys.executable)


def _add_system_calls(tally: Tally, folder: Path) -> None:
    """Adds what the system calls of a run's cases were."""
    writable: list[str] = []
    readable: list[str] = []
    for file in folder.glob(f"*/{RULES_FILE}"):
        rules = json.loads(file.read_text(encoding="utf-8"))
        writable += rules["writable"]
        readable += rules["readable"]
    tally.traced_cases = 0
    for path in folder.glob("calls.*"):
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, observed in read_system_calls(lines, Rules(tuple(writable), tuple(readable))):
                tally.traced_cases += 1
                tally.add_observed(Outcome(number, "system calls", "accepted", observed=observed))


def _trace_sample(tally: Tally, name: Name, options: Options) -> None:
    """Runs some of the cases once more under strace, and adds what was wrong with them."""
    traced = dataclasses.replace(options, strace=True, count=min(_STRACE_CASES, tally.wanted), seconds=_STRACE_SECONDS)
    sample = run_command(name, PLANS[name], traced)
    tally.traced_cases = sample.traced_cases
    tally.fault_counts.update(sample.fault_counts)
    tally.faults += sample.faults


# --- what is told at the end ---


def _write_faults(tally: Tally, spec: Spec, options: Options) -> None:
    """Writes the input of each case that is a fault and what it did; and of the case that was run alone."""
    wanted = {outcome.number: f"{what}\n\n{outcome.detail}" for outcome, what in tally.faults}
    if options.case is not None:
        wanted.setdefault(options.case, "no fault")
    if not wanted:
        return
    target = make_target(spec)
    for number, what in wanted.items():
        case = target.make_case(make_rng(spec.seed, number), number)
        name = f"{tally.name}-{spec.seed}-{number}"
        (options.out / f"{name}.bin").write_bytes(case.data)
        about = f"{case.label} {case.way} {dict(case.options)}\n{what}"
        (options.out / f"{name}.txt").write_text(about, encoding="utf-8", errors="backslashreplace")


def _print_complaints(tallies: Sequence[Tally], options: Options, console: Console) -> int:
    """Prints why the run fails, if it does; returns what the program exits with."""
    failed = False
    for tally in tallies:
        for outcome, what in tally.faults[:20]:
            console.print(f"{tally.name} --seed {options.seed} --case {outcome.number} ({outcome.label}): {what[:300]}")
        for complaint in tally.complaints:
            failed = True
            console.print(f"{tally.name} FAILED: {complaint}")
    if failed:
        console.print(f"inputs and tracebacks are in {options.out}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
