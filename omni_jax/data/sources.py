"""Files of rows, read at random: JSON lines, ArrayRecord and Parquet, on a disk or (not ArrayRecord) in a bucket."""

from __future__ import annotations

import bisect
import contextlib
import glob
import itertools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from omni_jax.errors import InputError
from omni_jax.processing.files import bucket_errors, is_remote, open_bucket, open_file

_SCAN = 1 << 24  # bytes looked through at a time for the ends of lines
_ROW_GROUPS = 4  # of a Parquet file that are kept in memory


class Row(NamedTuple):
    """What a file holds in one place, not yet read."""

    file: str
    number: int  # from 1; of JSON lines, the line
    contents: bytes | Mapping[str, Any]  # JSON, or a row as it is
    source: int = 0  # which of the run's sources it is of

    @property
    def name(self) -> str:
        return f"{self.file}:{self.number}"


class Source(Protocol):
    """Rows in an order that never changes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


class JsonLines:
    """A file with an object in each line; empty lines are passed over. Only where the lines begin is in memory."""

    def __init__(self, path: str) -> None:
        self._path = path
        size, ends = _line_ends(path)
        # A line begins after a line break and ends at the next; after the last one there is a line too, often empty.
        # Three int64 are kept for each row.
        begins = np.concatenate([[0], ends + 1])  # [lines]
        after = np.concatenate([ends, [size]])  # [lines]
        filled = after - begins > 1  # shorter than an object
        self._begins = begins[filled]
        self._ends = after[filled]
        self._lines = np.flatnonzero(filled) + 1  # as editors count them
        # opened by the first row, in the process that reads it
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, index: int) -> Row:
        begin = int(self._begins[index])
        end = int(self._ends[index])
        return Row(self._path, int(self._lines[index]), self._read(begin, end))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # another process opens it anew

    def _read(self, begin: int, end: int) -> bytes:
        if is_remote(self._path):
            with _reading(self._path):
                files, path = open_bucket(self._path)
                return files.cat_file(path, start=begin, end=end)
        self._file = file = self._file or open(self._path, "rb")  # noqa: SIM115, it stays open for the next row
        # pread has no position of its own, which several threads would move
        return os.pread(file.fileno(), end - begin, begin)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """A file or a bucket that cannot be read is an InputError that names it."""
    try:
        with bucket_errors(name):
            yield
    except OSError as e:
        raise InputError(f"cannot read {name}: {e.strerror or e}") from e


def _line_ends(path: str) -> tuple[int, np.ndarray]:
    """The size of a file, and the place of each of its line breaks."""
    ends = []  # of each piece that is read
    size = 0
    with bucket_errors(path), open_file(path) as file:
        while piece := file.read(_SCAN):
            ends.append(np.flatnonzero(np.frombuffer(piece, np.uint8) == ord("\n")) + size)
            size += len(piece)
    return size, np.concatenate([np.zeros(0, np.int64), *ends])


class ArrayRecord:
    """A file of records, each the JSON of a row (``tools/make_arrayrecord.py``)."""

    def __init__(self, path: str) -> None:
        if is_remote(path):
            raise InputError(
                f"{path}: ArrayRecord is read from a disk; mount the bucket with gcsfuse, or copy the file"
            )
        self._path = path
        try:
            self._records = ArrayRecordDataSource(path)
            self._length = len(self._records)
        except (RuntimeError, ValueError) as e:
            raise InputError(f"{path} is not an ArrayRecord file: {e}") from e

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return Row(self._path, index + 1, self._records[index])


class Parquet:
    """A file of columns. A row is found by reading its row group, so it is best written in small ones."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open_file()
        # the footer has the sizes of the row groups: no row is read
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._begins = list(itertools.accumulate([0, *sizes]))

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> Row:
        # the last group that begins at the row or before
        group = bisect.bisect_right(self._begins, index) - 1
        # one thread reads the file at a time, and the next may find the group in memory
        with self._lock:
            if group not in self._groups:
                # a dictionary keeps the order in which groups came, so its first key has been there longest
                while len(self._groups) >= _ROW_GROUPS:
                    self._groups.pop(next(iter(self._groups)))
                with _reading(self._path):
                    self._groups[group] = self._file.read_row_group(group)
            table = self._groups[group]
        return Row(self._path, index + 1, table.slice(index - self._begins[group], 1).to_pylist()[0])

    def __getstate__(self) -> dict[str, Any]:
        # neither the file nor the lock can go to a worker; it opens the file anew
        return {"_path": self._path, "_begins": self._begins}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_file()

    def _open_file(self) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as e:
            raise InputError(f"{self._path}: to read Parquet, install pyarrow: pip install omni_jax[parquet]") from e
        with bucket_errors(self._path):
            try:
                self._file = parquet.ParquetFile(open_file(self._path))
            except ArrowException as e:
                raise InputError(f"{self._path} is not a Parquet file: {e}") from e
        self._groups: dict[int, Any] = {}  # row groups in memory, by number
        self._lock = threading.Lock()


_KINDS = {".jsonl": JsonLines, ".arrayrecord": ArrayRecord, ".array_record": ArrayRecord, ".parquet": Parquet}


class Files:
    """Several files, one after the other."""

    def __init__(self, files: Sequence[Source]) -> None:
        self._files = files
        # the index of each file's first row, and at the end the number of all
        self._begins = list(itertools.accumulate(map(len, files), initial=0))

    def __len__(self) -> int:
        return self._begins[-1]

    def __getitem__(self, index: int) -> Row:
        # the last file that begins at the row or before; empty ones are passed over
        file = bisect.bisect_right(self._begins, index) - 1
        return self._files[file][index - self._begins[file]]

    def __iter__(self) -> Iterator[Row]:
        for i in range(len(self)):
            yield self[i]


def open_rows(pattern: str) -> Files:
    """Opens the files that a path or a pattern (``rows-*.jsonl``) names, in the order of their names.

    Raises:
      InputError: if there are none, one cannot be read, one is of an unknown kind, or all are empty.
    """
    # every name is looked at before a file is opened, since the index of a large one takes a while
    paths = _expand(pattern)
    for path in paths:
        if Path(path).suffix not in _KINDS:
            hint = "; of a list in one JSON file make lines: jq -c '.[]'" if path.endswith(".json") else ""
            raise InputError(f"{path}: unknown kind of file of rows; known: {', '.join(_KINDS)}{hint}")
    files: list[Source] = []
    try:
        for path in paths:
            files.append(_KINDS[Path(path).suffix](path))
    except OSError as e:
        raise InputError(f"cannot read {pattern}: {e.strerror or e}") from e
    rows = Files(files)
    if not len(rows):
        raise InputError(f"{pattern} holds no rows")
    return rows


def _expand(pattern: str) -> list[str]:
    """The files that a pattern names. They are sorted, because the order of rows follows from that of the files."""
    if is_remote(pattern):
        files, path = open_bucket(pattern)
        try:
            paths: list[str] = []
            with bucket_errors(pattern):
                for found in sorted(files.glob(path)):
                    paths.append(f"gs://{found.lstrip('/')}")
        except OSError as e:
            raise InputError(f"cannot look into the bucket of {pattern}: {e}") from e
    else:
        pattern = os.path.expanduser(pattern)
        # a file's own name may have brackets in it, which would make it a pattern
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise InputError(f"no file of rows at {pattern}")
    return paths
