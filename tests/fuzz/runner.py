"""Runs cases in processes of their own, and notices what a case may not do to its process."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

from tests.fuzz.target import Case, Target
from tests.fuzz.trace import Observed, Trace, mark

Kind = Literal["accepted", "refused", "foreign", "hang", "crash"]

RULES_FILE = "rules.json"
_GIB = 1 << 30
_START_SECONDS = 180.0  # for a process to import and to read its seeds
_MAX_RESTARTS = 20  # of processes that died or hung


@dataclass(frozen=True)
class Spec:
    """What is fuzzed.

    Attributes:
      target: the class that reads cases, as ``module:Class``.
      seed: of all that is random.
      case_seconds: limit of one case.
      gigabytes: of memory (GiB) that a process may take beyond what it has before its first case.
      folder: for the files of targets.
      is_traced: whether cases are to be told from each other in a list of system calls.
      grace: seconds after the limit of a case before its process is killed.
    """

    target: str
    seed: int
    case_seconds: float
    folder: Path
    gigabytes: float = 8.0
    is_traced: bool = False
    grace: float = 5.0


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Attributes:
      number: of the case.
      label: of the input that it was made of.
      kind: whether it was accepted, refused by an error of ours, or is a fault.
      error: in a form in which errors of the same kind are equal.
      detail: the traceback of a fault.
      seconds: that it took.
      resident: bytes of its process after it.
      observed: what it opened, started and connected to.
    """

    number: int
    label: str
    kind: Kind
    error: str = ""
    detail: str = ""
    seconds: float = 0.0
    resident: int = 0
    observed: Observed = field(default_factory=Observed)


class CaseTimeoutError(BaseException):
    """A case went over its limit; no ``except Exception`` stops it."""


class SeedError(Exception):
    """A target whose own good inputs are not accepted fuzzes nothing."""


def make_rng(seed: int, number: int) -> random.Random:
    """All that is random in a case."""
    return random.Random(f"{seed}:{number}")


def make_target(spec: Spec) -> Target:
    """The target, in a new folder of its own."""
    module, _, name = spec.target.partition(":")
    return getattr(importlib.import_module(module), name)(Path(tempfile.mkdtemp(dir=spec.folder)))


# --- the process that runs cases ---


def run_cases(spec: Spec, numbers: range, connection: Connection) -> None:
    """What a process does: sends an ``Outcome`` for each case, ``None`` first when it is ready."""
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGALRM, _raise_timeout)
    # libraries write what they find wrong with a file
    with (spec.folder / f"output-{os.getpid()}.txt").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    crash_log = (spec.folder / f"crash-{os.getpid()}.txt").open("w", encoding="utf-8")
    faulthandler.enable(crash_log)
    target = make_target(spec)
    try:
        _warm_up(target)
        target.prepare(len(numbers))
    except SeedError as e:
        connection.send(e)
        return
    _limit_memory(spec.gigabytes)
    target.trace = Trace(target.rules)
    if spec.is_traced:
        rules = json.dumps({"writable": target.rules.writable, "readable": target.rules.readable})
        (target.folder / RULES_FILE).write_text(rules, encoding="utf-8")
    gc.collect()
    connection.send(None)
    try:
        for number in numbers:
            connection.send(_run_case(spec, target, _make_case(spec, target, number), number))
    except SeedError as e:
        connection.send(e)
    finally:
        target.close()


def _make_case(spec: Spec, target: Target, number: int) -> Case:
    try:
        return target.make_case(make_rng(spec.seed, number), number)
    except Exception as e:
        raise SeedError(f"case {number} cannot be made: {traceback.format_exc()}") from e


def _warm_up(target: Target) -> None:
    """Reads all seeds: what is loaded late is loaded then, and what must be accepted is."""
    for case in target.list_seeds():
        try:
            target.run_case(case)
        except Exception as e:
            raise SeedError(f"the seed {case.label} is not accepted: {type(e).__name__}: {e}") from e


def _limit_memory(gigabytes: float) -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + round(gigabytes * _GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _raise_timeout(*_: object) -> None:
    raise CaseTimeoutError


def _run_case(spec: Spec, target: Target, case: Case, number: int) -> Outcome:
    assert target.trace is not None
    kind: Kind = "accepted"
    error = detail = ""
    if spec.is_traced:
        mark(f"begin-{number}")
    target.trace.begin()
    begin = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, spec.case_seconds)
    try:
        target.run_case(case)
    except target.own_errors as e:
        kind, error = "refused", describe_error(e)
    except CaseTimeoutError:
        kind, error, detail = "hang", f"over {spec.case_seconds:g} s", traceback.format_exc()
    except BaseException as e:  # a panic of a library in Rust is no Exception
        kind, error, detail = "foreign", describe_error(e), traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - begin
    observed = target.trace.end()
    if spec.is_traced:
        mark("end")
    if seconds > spec.case_seconds and kind != "hang":  # something has swallowed the alarm
        kind, error = "hang", f"over {spec.case_seconds:g} s"
    return Outcome(number, case.label, kind, error, detail, seconds, _resident_bytes(), observed)


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S+|[-+]?\d[\d.,e+-]*|\[.*\]|<.*>|\(.*\)")


def describe_error(error: BaseException) -> str:
    """The type of an error and the words of its message that do not vary; what it was made of, if that is ours too."""
    text = _VARYING.sub("*", str(error)[:400])
    where = _find_own_frame(error.__cause__ or error.__context__)
    return f"{type(error).__name__}: {text[:70]}{f' <- {where}' if where else ''}"


def _find_own_frame(cause: BaseException | None) -> str:
    """Where in the package an error of Python's arose that was turned into one of ours; "" if it arose elsewhere.

    Such an error is often a check that is missing.
    """
    if cause is None or not isinstance(
        cause, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError
    ):
        return ""
    frames = traceback.extract_tb(cause.__traceback__)
    if not frames or "/omni_jax/" not in frames[-1].filename:
        return ""
    return f"{type(cause).__name__} in {Path(frames[-1].filename).name}:{frames[-1].lineno}"


# --- the process that watches ---


@dataclass
class _Life:
    """A process that runs cases, from its start to its end.

    Attributes:
      remaining: cases whose outcomes have not come.
      since: when something last came of it, by ``time.monotonic``.
      ready: whether it has read its seeds.
    """

    process: Any
    connection: Connection
    remaining: range
    since: float
    ready: bool = False


def fuzz(
    spec: Spec, count: int, processes: int, seconds: float, report: Callable[[Outcome, int], None], first: int = 0
) -> int:
    """Runs cases ``first`` to ``first + count - 1``.

    Args:
      spec: what is fuzzed.
      count: of the cases.
      processes: that run them, side by side.
      seconds: after which the rest is left.
      report: called with each outcome, and the number of the process that it is of: its memory is watched by that.
      first: number of the first case.

    Returns:
      How many outcomes were reported.

    Raises:
      SeedError: if a good input is not accepted, or processes die before they have read theirs.
    """
    deadline = time.monotonic() + seconds
    lives: dict[int, _Life] = {}
    num_started = num_reported = 0

    def start(numbers: range) -> None:
        nonlocal num_started
        if len(numbers):
            if num_started > processes + _MAX_RESTARTS:
                raise SeedError(f"over {_MAX_RESTARTS} processes have died or hung; the rest is left")
            lives[num_started] = _start_life(spec, numbers)
            num_started += 1

    for part in range(processes):
        start(range(first + part, first + count, processes))
    try:
        while lives and time.monotonic() < deadline:
            wait([life.connection for life in lives.values()], timeout=0.5)
            for key, life in list(lives.items()):
                for outcome in _watch(spec, life):
                    report(outcome, key)
                    num_reported += 1
                if life.process is None:  # it has died, was killed, or is done
                    del lives[key]
                    start(life.remaining)
    finally:
        for life in lives.values():
            _kill(life)
    return num_reported


def _start_life(spec: Spec, numbers: range) -> _Life:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_cases, args=(spec, numbers, theirs))
    process.start()
    theirs.close()
    return _Life(process, ours, numbers, time.monotonic())


def _watch(spec: Spec, life: _Life) -> Iterator[Outcome]:
    """The outcomes that have come of a process; where it has ended early, what became of the case that it was at."""
    try:
        while life.connection.poll():
            message = life.connection.recv()
            life.since = time.monotonic()
            if isinstance(message, SeedError):
                raise message
            if message is None:
                life.ready = True
                continue
            life.remaining = life.remaining[1:]
            yield message
    except EOFError:
        yield from _bury(spec, life, "crash")
        return
    limit = spec.case_seconds + spec.grace if life.ready else _START_SECONDS
    if time.monotonic() - life.since > limit:
        yield from _bury(spec, life, "hang")


def _bury(spec: Spec, life: _Life, kind: Kind) -> Iterator[Outcome]:
    """Ends a process that is done, has died or hangs; the case that it was at is not run again."""
    process = life.process
    if kind == "hang":
        process.kill()
    process.join(10)
    _kill(life)
    if not len(life.remaining):
        return
    if not life.ready:
        raise SeedError(f"a process ended before it had read its seeds (exit code {process.exitcode})")
    log = spec.folder / f"crash-{process.pid}.txt"
    detail = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    error = f"over {spec.case_seconds:g} s" if kind == "hang" else f"exit code {process.exitcode}"
    number = life.remaining[0]
    life.remaining = life.remaining[1:]
    yield Outcome(number, "?", kind, error, detail, spec.case_seconds if kind == "hang" else 0.0)


def _kill(life: _Life) -> None:
    if life.process is not None:
        life.process.kill()
        life.process.join(10)
        life.connection.close()
        life.process = None
