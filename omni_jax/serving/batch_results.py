"""Where the results of a file of requests go, so that a run which was killed can go on: a file, or a bucket."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omni_jax.errors import InputError
from omni_jax.plain_files import open_own_file
from omni_jax.processing.files import bucket_errors, is_remote, open_bucket
from omni_jax.serving.batch_lines import ID_PREFIX

PART_LINES = 1000  # at most, in an object
PART_SECONDS = 10.0  # after which an object is written, however few lines it has


def open_results(name: str) -> Results:
    """Opens what ``name`` is, a path or a ``gs://`` URL, and makes it if it is not there.

    Raises:
      InputError: if it cannot be written, another run writes it, or it holds something else.
    """
    return BucketResults(name) if is_remote(name) else FileResults(Path(name))


class Results(ABC):
    """Results that grow line by line; a context manager.

    Attributes:
      finished: lines of the requests that there were results for at first, with their custom_id.
      num_failed: how many of these are errors.
    """

    def __init__(self) -> None:
        self.finished: dict[int, str | None] = {}
        self.num_failed = 0

    def _read(self, name: str, number: int, data: bytes) -> bool:
        """Reads a line that was there; whether its result is a new one."""
        try:
            values = json.loads(data)
            name_of_line = values["id"]
            custom_id = values["custom_id"]
            if not name_of_line.startswith(ID_PREFIX):
                raise ValueError(f"its id is {name_of_line}")
            line = int(name_of_line.removeprefix(ID_PREFIX))
            failed = values["error"] is not None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise InputError(
                f"{name} is no file of results: line {number} cannot be read ({e}); name another file, or remove it"
            ) from e
        # a result may stand in the object and in a part, where a run was killed while it joined them
        is_new = line not in self.finished
        self.num_failed += is_new and failed
        self.finished[line] = custom_id
        return is_new

    @abstractmethod
    def add(self, line: str) -> None:
        """Writes a result."""

    def __enter__(self) -> Results:
        return self

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


class FileResults(Results):
    """A file on a disk. A result is there once it is added, whatever happens to the process from then on."""

    def __init__(self, path: Path):
        """Makes the file one's own; a line that was torn when a run was killed is taken off.

        Raises:
          InputError: if it cannot be written, is a link, another run writes it, or it holds anything but results. It is
            left as it is then.
        """
        super().__init__()
        # for reading and appending; what is there is never cut off by opening it
        try:
            self._file = open_own_file(path, append=True)
        except OSError as e:
            raise InputError(f"cannot write {path}: {e.strerror}") from e
        # the lock goes with the process, however it ends
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.close()
            raise InputError(f"another run is writing {path}; wait for it, or name another file") from e
        try:
            self._read_lines(str(path))
        except InputError:
            self._file.close()
            raise

    def _read_lines(self, name: str) -> None:
        self._file.seek(0)
        num_bytes = 0  # up to the end of the last complete line
        for number, data in enumerate(self._file, start=1):
            if not data.endswith(b"\n"):  # torn: the run was killed while it wrote
                break
            self._read(name, number, data)
            num_bytes += len(data)
        # without a whole line it cannot be told whose the file is
        if not num_bytes and self._file.seek(0, os.SEEK_END):
            raise InputError(f"{name} is no file of results: it has no whole line; name another file, or remove it")
        # a torn line goes, and its request is answered again
        self._file.truncate(num_bytes)
        self._file.seek(0, os.SEEK_END)

    def add(self, line: str) -> None:
        # flushed to the system, which keeps it even if this process is killed
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as e:  # a full disk
            raise InputError(
                f"cannot write results: {e.strerror or e}; the same command goes on from what is written"
            ) from e

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been said
            self._file.close()


class BucketResults(Results):
    """An object in a bucket. Objects cannot grow, so results lie in parts beside it until all are there.

    A run that is killed loses what it added since the last part, which is that of ``PART_SECONDS`` or ``PART_LINES`` at
    most, and does it again. Nothing keeps two runs from writing the same parts.
    """

    def __init__(self, url: str):
        super().__init__()
        self._url = url
        self._files, self._path = open_bucket(url)
        self._folder = f"{self._path}.parts"
        self._waiting: list[bytes] = []
        self._written = time.monotonic()
        try:
            with bucket_errors(url):
                self._parts = sorted(self._files.find(self._folder)) if self._files.exists(self._folder) else []
                # for what it notes on the way
                for _ in self._lines():
                    pass
        except OSError as e:
            raise InputError(f"cannot read {url}: {e.strerror or e}") from e

    def _lines(self) -> Iterator[bytes]:
        """The lines of the object, then those of the parts, each result once."""
        self.finished = {}
        self.num_failed = 0
        paths = list(self._parts)
        if self._files.isfile(self._path):
            paths.insert(0, self._path)
        for path in paths:
            with self._files.open(path, "rb") as file:
                for number, data in enumerate(file, start=1):
                    if self._read(f"gs://{path.lstrip('/')}", number, data):
                        yield data

    def add(self, line: str) -> None:
        self._waiting.append(line.encode() + b"\n")
        if len(self._waiting) >= PART_LINES or time.monotonic() - self._written >= PART_SECONDS:
            self._write_part()

    def _write_part(self) -> None:
        """Writes a part of what waits."""
        # numbers go on from those that an earlier run has left
        if self._waiting:
            last = int(Path(self._parts[-1]).stem) if self._parts else 0
            path = f"{self._folder}/{last + 1:08d}.jsonl"
            self._attempt(self._files.pipe_file, path, b"".join(self._waiting))
            self._parts.append(path)
            self._waiting.clear()
        self._written = time.monotonic()

    def _join_parts(self) -> None:
        """Makes one object of the parts."""
        joined = f"{self._path}.whole"  # another name: the object itself is read meanwhile
        with self._files.open(joined, "wb") as out:
            for data in self._lines():
                out.write(data)
        # in this order, so that every result is in a part or in the object, wherever the run may be killed
        self._files.mv(joined, self._path)
        self._files.rm(self._folder, recursive=True)
        self._parts.clear()

    def _attempt(self, work: Any, *args: Any) -> None:
        try:
            with bucket_errors(self._url):
                work(*args)
        except OSError as e:
            raise InputError(
                f"cannot write {self._url}: {e.strerror or e}; the same command goes on from what is written"
            ) from e

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # also after an error, for what was answered is to be kept; the parts are joined when all lines are done
        self._write_part()
        if kind is None and self._parts:
            self._attempt(self._join_parts)


class KnownResults(Results):
    """Of a process that does not write: another one has these, and keeps what is added."""

    def __init__(self, finished: dict[int, str | None]):
        super().__init__()
        self.finished = finished

    def add(self, line: str) -> None:
        """Nothing; the other process adds it."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing is held."""
