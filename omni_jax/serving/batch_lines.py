"""The lines of requests and of results, as OpenAI's batches have them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from omni_jax.errors import InputError
from omni_jax.processing.files import open_file
from omni_jax.serving.request import ChatRequest, read_body

URL = "/v1/chat/completions"
MOST_BYTES = 1 << 30  # of a line
PREFIX = "batch_req_"  # of the id of a result; the line's number follows

_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True)
class Line:
    """One line of a file of requests.

    Attributes:
      number: from 1 on.
      data: of the line; None if it is too long.
      offset: of its first byte in the file.
    """

    number: int
    data: bytes | None
    offset: int = 0

    @property
    def name(self) -> str:
        """What the line's result is known by."""
        return f"{PREFIX}{self.number:08d}"


class LineError(InputError):
    """A line that is no request.

    Attributes:
      custom_id: its own, if that could be read.
    """

    def __init__(self, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.custom_id = custom_id


def read_lines(name: str, number: int = 1, offset: int = 0) -> Iterator[Line]:
    """The lines of a file that are not empty, one in memory at a time.

    Args:
      name: of the file, a path or a ``gs://`` URL.
      number: of the first line that is read.
      offset: of that line.

    Raises:
      InputError: if the file cannot be read.
    """
    try:
        with open_file(name) as file:
            file.seek(offset)
            while data := file.readline(MOST_BYTES + 1):
                if len(data) > MOST_BYTES:
                    while data and not data.endswith(b"\n"):
                        data = file.readline(MOST_BYTES)
                    yield Line(number, None, offset)
                elif data.strip():
                    yield Line(number, data, offset)
                number, offset = number + 1, file.tell()
    except OSError as e:
        raise InputError(f"cannot read {name}: {e.strerror or e}") from e


def parse_line(line: Line) -> tuple[str, ChatRequest]:
    """The custom_id and the request of a line.

    Raises:
      LineError: if it is none; says what is wrong with it.
    """
    if line.data is None:
        raise LineError(f"the line is longer than {MOST_BYTES} bytes; put its media into files")
    try:
        values = json.loads(line.data.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError as e:
        raise LineError(f"the line is not UTF-8: {e}") from e
    except RecursionError as e:
        raise LineError("the line is nested too deeply") from e
    except ValueError as e:
        raise LineError(f"the line is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise LineError(f"the line must be an object, got {type(values).__name__}")
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(f"custom_id is {custom_id!r}; it must be a string that is not empty")
    unknown = sorted(set(values) - set(_FIELDS))
    if unknown:
        raise LineError(f"unknown field {', '.join(unknown)}; known: {', '.join(_FIELDS)}", custom_id)
    for name, wanted in (("method", "POST"), ("url", URL)):
        if values.get(name) != wanted:
            raise LineError(f"{name} is {values.get(name)!r}; it must be {wanted!r}", custom_id)
    try:
        return custom_id, read_body(values.get("body"))
    except InputError as e:
        raise LineError(str(e), custom_id) from e


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def result_line(line: Line, custom_id: str | None, body: dict[str, Any] | None, error: tuple[str, str] | None) -> str:
    """A line of results: an answer's body, or the code and the message of an error."""
    response = None if body is None else {"status_code": 200, "request_id": line.name, "body": body}
    problem = None if error is None else {"code": error[0], "message": error[1]}
    values = {"id": line.name, "custom_id": custom_id, "response": response, "error": problem}
    return json.dumps(values, ensure_ascii=False)


class Seen:
    """Which custom_ids there were; of each 16 bytes are kept."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, custom_id: str) -> bool:
        """Whether it is new."""
        digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        new = digest not in self._digests
        self._digests.add(digest)
        return new
