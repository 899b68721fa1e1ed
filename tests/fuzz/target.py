"""What a kind of input has to say of itself so that it can be fuzzed."""

from __future__ import annotations

import abc
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.trace import Rules, Trace


class WorkerError(Exception):
    """A process that decodes media died, or failed in a way that it does not announce."""


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
      label: of what it was made: a format, or the name of a file.
      data: the bytes that a stranger gives.
      way: how they are read, such as "bytes", "path" or "worker".
      options: what else is asked for with them.
    """

    label: str
    data: bytes
    way: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


class Target(abc.ABC):
    """Reads the cases of one command, in the process that runs them.

    Attributes:
      folder: of this target's own; its cases may write into ``folder/work`` alone.
      own_errors: by which an input is refused.
      rules: where files may be opened.
      trace: set before the first case is run.
    """

    own_errors: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.work = self.folder / "work"
        self.work.mkdir(parents=True)
        self.rules = Rules(writable=(str(self.work),))
        self.trace: Trace | None = None

    @abc.abstractmethod
    def list_seeds(self) -> list[Case]:
        """Inputs that must be accepted; cases are mutants of them."""

    def prepare(self, num_cases: int) -> None:  # noqa: B027
        """Starts what takes long to start, if so many cases need it."""

    @abc.abstractmethod
    def make_case(self, rng: random.Random, number: int) -> Case:
        """The case of this number; the same for the same numbers."""

    @abc.abstractmethod
    def run_case(self, case: Case) -> None:
        """Reads a case; an exception that is none of ``own_errors`` is a fault."""

    def close(self) -> None:  # noqa: B027
        """Ends what was started."""
