"""The file that names the rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

from omni_jax.data.examples import Reject
from omni_jax.errors import InputError
from omni_jax.plain_files import open_own_file


class RejectsFile:
    """JSON lines with file, row and reason. A row is named once, however often it comes and the run restarts."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        # (file, row) of those that the file names
        self._known: set[tuple[str, int]] = set()
        if path is not None and path.exists():
            self._known = _read_known(path)

    def add(self, reject: Reject) -> None:
        """Writes a row's reason, unless it is there."""
        row = (reject.file, reject.number)
        if self._path is None or row in self._known:
            return
        self._known.add(row)
        line = json.dumps({"file": reject.file, "row": reject.number, "reason": reject.reason}, ensure_ascii=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Opened for each line, so that what a run has rejected can be read while it goes on. The name of a file need
        # not be UTF-8; one that is not must not end the run.
        with open_own_file(self._path, append=True) as file:
            file.write(line.encode(errors="backslashreplace") + b"\n")


def _read_known(path: Path) -> set[tuple[str, int]]:
    # not splitlines: a name may hold other characters that end a line for it
    with open_own_file(path) as file:
        *lines, rest = file.read().split(b"\n")
        try:
            known = set()
            for line in lines:
                value = json.loads(line)
                known.add((value["file"], value["row"]))
            if rest and not lines:
                raise ValueError("it has no whole line")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise InputError(f"{path} is not a file of rejected rows ({e}); name another as data.rejects") from e
        # a run was killed while it wrote, maybe in the middle of a character
        if rest:
            file.truncate(file.tell() - len(rest))
    return known
