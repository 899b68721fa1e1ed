"""What came of a run: counted as it goes, and printed as a table."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from tests.fuzz.runner import Outcome

MAX_GROWTH = 200 << 20
"""Bytes by which a process may grow from its second tenth of cases to its last."""
_MIN_SAMPLES = 20  # of a process; with fewer nothing is said of its growth
_MAX_FAULTS = 200  # that are kept; all are counted


@dataclass
class Tally:
    """What came of the cases of one command.

    Attributes:
      name: of the command.
      wanted: how many cases were asked for.
      labels: cases by what they were made of.
      errors: of ours, by kind.
      faults: outcomes that must not be, each with what is wrong with it.
    """

    name: str
    wanted: int
    kinds: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[Outcome, str]] = field(default_factory=list)
    fault_counts: Counter[str] = field(default_factory=Counter)
    slowest: Outcome | None = None
    num_opens: int = 0
    num_connections: int = 0
    seconds: float = 0.0
    traced_cases: int | None = None  # by system calls
    _resident: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, outcome: Outcome, process: int) -> None:
        """Counts the outcome of a case that this process ran."""
        self.kinds[outcome.kind] += 1
        self.labels[outcome.label] += 1
        if outcome.kind == "refused":
            self.errors[outcome.error] += 1
        if self.slowest is None or outcome.seconds > self.slowest.seconds:
            self.slowest = outcome
        if outcome.resident:
            self._resident[process].append(outcome.resident)
        if outcome.kind in ("foreign", "hang", "crash"):
            self.add_fault(outcome, outcome.kind, outcome.error)
        self.add_observed(outcome)

    def add_observed(self, outcome: Outcome) -> None:
        """Counts what a case opened, started and connected to."""
        seen = outcome.observed
        self.num_opens += seen.num_opens
        self.num_connections += seen.num_connections
        for kind, found in (("opens", seen.opens), ("connections", seen.connections), ("programs", seen.programs)):
            if found:
                self.add_fault(outcome, kind, "; ".join(found[:5]))

    def add_fault(self, outcome: Outcome, kind: str, what: str) -> None:
        self.fault_counts[kind] += 1
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append((outcome, f"{kind}: {what}"))

    @property
    def count(self) -> int:
        return sum(self.kinds.values())

    @property
    def growth(self) -> int:
        """Bytes by which the process that grew most did so, after its first tenth of cases."""
        grown = [0]
        for sizes in self._resident.values():
            tenth = len(sizes) // 10
            if len(sizes) >= _MIN_SAMPLES:
                early, late = sizes[tenth : 2 * tenth], sizes[-tenth:]
                grown.append(round(statistics.median(late) - statistics.median(early)))
        return max(grown)

    @property
    def complaints(self) -> list[str]:
        """Why the command fails; empty if all is well."""
        found = [f"{number} x {kind}" for kind, number in self.fault_counts.items()]
        if self.growth > MAX_GROWTH:
            found.append(f"memory grew by {self.growth >> 20} MiB; the limit is {MAX_GROWTH >> 20}")
        if self.count < self.wanted:
            found.append(f"only {self.count} of {self.wanted} cases were run")
        return found


def print_table(tallies: Sequence[Tally], console: Console) -> None:
    """A column for each command."""
    table = Table("", *(tally.name for tally in tallies))
    rows: list[tuple[str, list[str]]] = [
        ("cases", [f"{tally.count:,}" for tally in tallies]),
        ("accepted", [f"{tally.kinds['accepted']:,}" for tally in tallies]),
        ("refused, errors of ours", [f"{tally.kinds['refused']:,}" for tally in tallies]),
        ("foreign exceptions", [str(tally.kinds["foreign"]) for tally in tallies]),
        ("processes that died", [str(tally.kinds["crash"]) for tally in tallies]),
        ("over the limit of time", [str(tally.kinds["hang"]) for tally in tallies]),
        ("slowest case", [_describe_slowest(tally) for tally in tallies]),
        ("growth of memory", [f"{tally.growth / 2**20:.0f} MiB" for tally in tallies]),
        ("opens of files and folders", [f"{tally.num_opens:,}" for tally in tallies]),
        ("of these not allowed", [str(tally.fault_counts["opens"]) for tally in tallies]),
        ("connections attempted", [f"{tally.num_connections:,}" for tally in tallies]),
        ("to addresses not public", [str(tally.fault_counts["connections"]) for tally in tallies]),
        ("programs started, pickles", [str(tally.fault_counts["programs"]) for tally in tallies]),
        ("system calls traced", [_describe_traced(tally) for tally in tallies]),
        ("time", [f"{tally.seconds:.0f} s" for tally in tallies]),
        ("cases a second", [f"{tally.count / max(tally.seconds, 1e-9):.0f}" for tally in tallies]),
    ]
    for name, cells in rows:
        table.add_row(name, *cells)
    console.print(table)


def _describe_slowest(tally: Tally) -> str:
    slowest = tally.slowest
    return "" if slowest is None else f"{slowest.seconds:.2f} s"


def _describe_traced(tally: Tally) -> str:
    return "none" if tally.traced_cases is None else f"{tally.traced_cases:,} cases"


def print_errors(tally: Tally, console: Console, most: int = 12) -> None:
    """The errors that inputs were refused by, the most frequent first."""
    console.print(f"{tally.name}: refused by {len(tally.errors)} kinds of error")
    for error, number in tally.errors.most_common(most):
        console.print(f"  {number:7,}  {error}", markup=False, highlight=False)
    for error, number in tally.errors.most_common():
        if " <- " in error:  # an error of Python's in the package, which a check of ours might have told better
            console.print(f"  {number:7,}  {error}", markup=False, highlight=False)
