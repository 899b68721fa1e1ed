"""Files that clients upload and batches write, in a folder that goes with the server."""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from omni_jax.serving.http_errors import NotFoundError, TooLargeError

MAX_NAME = 255  # characters of a file's name
_PIECE = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    """A file.

    Attributes:
      id: that clients name it by.
      name: that it was uploaded with.
      purpose: what it is for: "batch" or "batch_output".
      created: seconds since 1970.
      path: where it is.
      num_bytes: of it.
    """

    id: str
    name: str
    purpose: str
    created: int
    path: Path
    num_bytes: int

    def describe(self) -> dict[str, object]:
        """As OpenAI's API has it."""
        values = {"id": self.id, "object": "file", "bytes": self.num_bytes, "created_at": self.created}
        return {**values, "filename": self.name, "purpose": self.purpose, "status": "processed"}

    def read(self) -> Iterator[bytes]:
        """Its bytes, in pieces."""
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece


class FileStore:
    """Files by id; a context manager that removes them all."""

    def __init__(self, max_bytes: int):
        """Makes the folder; ``max_bytes`` are those of all files together."""
        self._folder = tempfile.TemporaryDirectory(prefix="omni_jax_files_")
        self._files: dict[str, StoredFile] = {}
        self._max_bytes = max_bytes

    def list(self) -> list[StoredFile]:
        """All of them, the latest first."""
        return list(reversed(self._files.values()))

    def find(self, file_id: str) -> StoredFile:
        """A file.

        Raises:
          NotFoundError: if there is none of this id.
        """
        if file_id not in self._files:
            raise NotFoundError(f"there is no file {file_id!r}")
        return self._files[file_id]

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self._files.values())

    def add(self, name: str, purpose: str, data: bytes) -> StoredFile:
        """Keeps a file.

        Raises:
          TooLargeError: if there is no room for it.
        """
        with self.create(name, purpose) as writer:
            writer.write(data)
        return writer.keep()

    def create(self, name: str, purpose: str) -> FileWriter:
        """Begins a file that comes in pieces."""
        return FileWriter(self, Path(self._folder.name) / f"file-{uuid.uuid4().hex}", name[:MAX_NAME], purpose)

    def keep(self, file: StoredFile) -> None:
        """Takes a file that has been written into the folder."""
        self._files[file.id] = file

    def check_room(self, num_bytes: int) -> None:
        """Whether so many bytes can be kept beside the files that are there.

        Raises:
          TooLargeError: if not.
        """
        total = self.num_bytes + num_bytes
        if total > self._max_bytes:
            raise TooLargeError(
                f"the server's files would have {total} bytes; the limit is {self._max_bytes} (--files-gigabytes); "
                "delete some"
            )

    def delete(self, file_id: str) -> None:
        """Removes a file.

        Raises:
          NotFoundError: if there is none of this id.
        """
        self.find(file_id).path.unlink(missing_ok=True)
        del self._files[file_id]

    def close(self) -> None:
        """Removes all of them."""
        self._files.clear()
        self._folder.cleanup()


class FileWriter:
    """A file that is written; a context manager that closes it, and removes it after an error."""

    def __init__(self, store: FileStore, path: Path, name: str, purpose: str):
        self._store = store
        self._path = path
        self._name = name
        self._purpose = purpose
        self._file = path.open("wb")
        self.num_bytes = 0

    def write(self, data: bytes) -> None:
        """Adds bytes.

        Raises:
          TooLargeError: if there is no room for them.
        """
        self._store.check_room(self.num_bytes + len(data))
        self.num_bytes += self._file.write(data)

    def keep(self) -> StoredFile:
        """The file, as one of the store's."""
        self._file.close()
        file = StoredFile(self._path.name, self._name, self._purpose, int(time.time()), self._path, self.num_bytes)
        self._store.keep(file)
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None:
            self._path.unlink(missing_ok=True)
