"""A file of rows that takes long to make: a command that was stopped goes on where it was.

Until all rows are there they stand in a file beside it, each with the number of the row that it was made of. The file
has its name when it is complete.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.plain_files import open_own_file, replace_file


class ResumedRows:
    """A context manager that keeps what has been written, whatever ends it.

    Attributes:
      num_done: rows of the source that are done.
      counts: how many of these gave a row (under ""), and how many none, by the reason.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        """Looks at what an earlier command has left.

        Args:
          out: the file.
          settings: what the rows depend on; the same for all of a file.

        Raises:
          InputError: if the file is there, cannot be written, or is of a command with other settings.
        """
        if out.exists():
            raise InputError(f"{out} exists already; name another file")
        self.num_done = 0
        self.counts: Counter[str] = Counter()
        self._out = out
        self._partial = out.with_name(f"{out.name}.partial")
        try:
            self._file = open_own_file(self._partial)
        except OSError as e:
            raise InputError(f"cannot write {self._partial}: {e.strerror or e}") from e
        header = {"settings": json.loads(json.dumps(settings))}
        end = 0
        for line in self._file:
            # what a kill has cut short is made again
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            if end == 0 and values != header:
                raise InputError(
                    f"{self._partial} is of a command with other settings; remove it, or name another file"
                )
            if end > 0:
                self._count(values)
            end += len(line)
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._write(header)

    def add(self, number: int, row: Mapping[str, Any] | None, reason: str = "") -> None:
        """Writes what came of a row of the source: a row, or none for a reason."""
        line = {"number": number, "row": row, "reason": reason}
        self._write(line)
        self._count(line)

    def finish(self) -> int:
        """Gives the file its name; returns how many rows it has."""
        self._file.seek(0)
        lines = []
        for line in self._file.read().splitlines()[1:]:
            row = json.loads(line)["row"]
            if row is not None:
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        replace_file(self._out, "".join(lines).encode())
        self._partial.unlink()
        return len(lines)

    def _count(self, values: Mapping[str, Any]) -> None:
        self.num_done = values["number"] + 1
        self.counts[values["reason"]] += 1

    def _write(self, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> ResumedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
