"""Batches that clients start over HTTP: files of requests, answered beside those of others, one batch at a time.

``serve.py batch`` is the way for large files: it goes on after a stop, and its speech goes into files.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omni_jax.engine.outputs import Reply
from omni_jax.errors import InputError
from omni_jax.serving.batch_lines import (
    URL,
    Line,
    LineError,
    SeenIds,
    make_error,
    make_result,
    parse_line,
    read_custom_id,
    read_lines,
)
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.chat_response import make_body
from omni_jax.serving.file_store import FileStore, FileWriter, StoredFile
from omni_jax.serving.http_errors import ConflictError, NotFoundError, TooLargeError

MAX_LINES = 50_000
MAX_BATCHES = 1000  # that are known
_EXPIRY_SECONDS = 24 * 3600
_ENDED = ("completed", "failed", "cancelled")

_log = logging.getLogger(__name__)


class Answerer(Protocol):
    """What answers the requests of a batch."""

    async def answer_whole(self, request: ChatRequest) -> Reply: ...


@dataclass(eq=False)
class Batch:
    """A batch, as far as it is.

    Attributes:
      id: that clients name it by.
      input_file: of its requests.
      metadata: of the client's.
      created: seconds since 1970, as all times.
      status: one of OpenAI's.
      times: when it came to be in each status.
      total: lines of the file.
      num_completed: that were answered.
      num_failed: that were not.
      message: why it failed as a whole.
      output_file: of the answers, once it has ended.
      error_file: of the errors, likewise.
    """

    id: str
    input_file: StoredFile
    metadata: dict[str, str] | None
    created: int
    status: str = "validating"
    times: dict[str, int] = field(default_factory=dict)
    total: int = 0
    num_completed: int = 0
    num_failed: int = 0
    message: str | None = None
    output_file: StoredFile | None = None
    error_file: StoredFile | None = None

    def set_status(self, status: str) -> None:
        """Goes on to a status."""
        self.status = status
        self.times[status] = int(time.time())

    def describe(self) -> dict[str, Any]:
        """As OpenAI's API has it."""
        errors = None
        if self.message is not None:
            error = {"code": "invalid_file", "line": None, "message": self.message, "param": None}
            errors = {"object": "list", "data": [error]}
        values: dict[str, Any] = {
            "id": self.id,
            "object": "batch",
            "endpoint": URL,
            "errors": errors,
            "input_file_id": self.input_file.id,
            "completion_window": "24h",
            "status": self.status,
            "output_file_id": self.output_file.id if self.output_file else None,
            "error_file_id": self.error_file.id if self.error_file else None,
            "created_at": self.created,
            "expires_at": self.created + _EXPIRY_SECONDS,
            "metadata": self.metadata,
            "request_counts": {"total": self.total, "completed": self.num_completed, "failed": self.num_failed},
        }
        for status in ("in_progress", "finalizing", "completed", "failed", "cancelling", "cancelled"):
            values[f"{status}_at"] = self.times.get(status)
        return values


class Batches:
    """Batches by id, and the task that works on them."""

    def __init__(self, answerer: Answerer, files: FileStore, model_name: str, num_lines: int):
        """``num_lines`` of a batch are worked on at once; ``run`` works on them."""
        self._answerer = answerer
        self._files = files
        self._model_name = model_name
        self._num_lines = num_lines
        self._batches: dict[str, Batch] = {}
        self._waiting: asyncio.Queue[Batch] = asyncio.Queue()

    def list(self) -> list[Batch]:
        """All of them, the latest first."""
        return list(reversed(self._batches.values()))

    def find(self, batch_id: str) -> Batch:
        """A batch.

        Raises:
          NotFoundError: if there is none of this id.
        """
        if batch_id not in self._batches:
            raise NotFoundError(f"there is no batch {batch_id!r}")
        return self._batches[batch_id]

    def create(self, input_file_id: str, metadata: dict[str, str] | None) -> Batch:
        """Takes a batch, which begins when those before it have ended.

        Raises:
          NotFoundError: if there is no such file.
          ConflictError: if there are too many batches that have not ended.
        """
        batch = Batch(f"batch_{uuid.uuid4().hex}", self._files.find(input_file_id), metadata, int(time.time()))
        ended = [other.id for other in self._batches.values() if other.status in _ENDED]
        if len(self._batches) >= MAX_BATCHES:
            if not ended:
                raise ConflictError(f"there are {MAX_BATCHES} batches that have not ended; wait for them")
            del self._batches[ended[0]]
        self._batches[batch.id] = batch
        self._waiting.put_nowait(batch)
        return batch

    def cancel(self, batch_id: str) -> Batch:
        """Ends a batch after the lines that are worked on.

        Raises:
          NotFoundError: if there is none of this id.
          ConflictError: if it has ended.
        """
        batch = self.find(batch_id)
        if batch.status in _ENDED:
            raise ConflictError(f"the batch is {batch.status} already")
        batch.set_status("cancelling")
        return batch

    async def run(self) -> None:
        """Works on the batches as they come, until the task is cancelled."""
        while True:
            batch = await self._waiting.get()
            try:
                await self._run_batch(batch)
            except Exception as error:
                told = InputError | TooLargeError
                if not isinstance(error, told):
                    _log.error("a batch failed", exc_info=error)
                batch.message = str(error) if isinstance(error, told) else "the server failed; its log says why"
                batch.set_status("failed")

    async def _run_batch(self, batch: Batch) -> None:
        name = Path(batch.input_file.name).stem
        with (
            self._files.create(f"{name}_output.jsonl", "batch_output") as outputs,
            self._files.create(f"{name}_error.jsonl", "batch_output") as errors,
        ):
            try:
                await _BatchRun(batch, self._answerer, self._model_name, outputs, errors).run(self._num_lines)
            except ExceptionGroup as group:  # of its tasks, which may have found the same
                raise group.exceptions[0] from None
            is_cancelled = batch.status == "cancelling"
            if not is_cancelled:
                batch.set_status("finalizing")
        batch.output_file = outputs.keep() if batch.num_completed else None
        batch.error_file = errors.keep() if batch.num_failed else None
        batch.set_status("cancelled" if is_cancelled else "completed")


class _BatchRun:
    """The lines of one batch."""

    def __init__(self, batch: Batch, answerer: Answerer, model_name: str, outputs: FileWriter, errors: FileWriter):
        self._batch = batch
        self._answerer = answerer
        self._model_name = model_name
        self._outputs = outputs
        self._errors = errors
        self._seen = SeenIds()

    async def run(self, num_lines: int) -> None:
        """Answers all lines, so many at once.

        Raises:
          InputError: if the file cannot be read or has too many lines.
          TooLargeError: if there is no room for the answers.
        """
        batch = self._batch
        batch.total = await asyncio.to_thread(_count_lines, batch.input_file.path)
        if batch.status != "cancelling":
            batch.set_status("in_progress")
        lines = read_lines(str(batch.input_file.path))
        async with asyncio.TaskGroup() as group:
            for _ in range(num_lines):
                group.create_task(self._answer_lines(lines))

    async def _answer_lines(self, lines: Iterator[Line]) -> None:
        """One after the other, those that no other task has taken."""
        for line in lines:
            if self._batch.status == "cancelling":
                return
            text, failed = await self._answer_line(line)
            (self._errors if failed else self._outputs).write(f"{text}\n".encode())
            if failed:
                self._batch.num_failed += 1
            else:
                self._batch.num_completed += 1

    async def _answer_line(self, line: Line) -> tuple[str, bool]:
        """The line that comes of a line, and whether it is an error."""
        try:
            custom_id, request = parse_line(line)
            if not self._seen.add(custom_id):
                raise LineError(f"custom_id {custom_id!r} was there before; each must be another")
            reply = await self._answerer.answer_whole(request)
            body = make_body(request, reply, line.result_id, self._model_name, int(time.time()), None)
            return make_result(line, custom_id, body), False
        except Exception as error:  # of whatever type: it is this line's alone
            return make_error(line, read_custom_id(line), error).text, True


def _count_lines(path: Path) -> int:
    count = 0
    for _ in read_lines(str(path)):
        count += 1
        if count > MAX_LINES:
            raise InputError(f"the file has over {MAX_LINES} requests, which is the limit; use serve.py batch")
    if not count:
        raise InputError("the file has no requests")
    return count
