"""The file that names the rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

from omni_jax.data.examples import Reject
from omni_jax.errors import InputError


class RejectsFile:
    """JSON lines with file, row and reason. A row is named once, however often it comes and the run restarts."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: set[tuple[str, int]] = set()
        if path is not None and path.exists():
            self._read(path)

    def add(self, reject: Reject) -> None:
        """Writes a row's reason, unless it is there."""
        if self._path is None or (reject.file, reject.number) in self._known:
            return
        self._known.add((reject.file, reject.number))
        line = json.dumps({"file": reject.file, "row": reject.number, "reason": reject.reason}, ensure_ascii=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _read(self, path: Path) -> None:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):  # a run was killed while it wrote
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        try:
            self._known = {(line["file"], line["row"]) for line in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError) as e:
            raise InputError(f"{path} is not a file of rejected rows ({e}); name another as data.rejects") from e
