"""The lines of requests and of results, as OpenAI's batches have them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omni_jax.checks import check_names, short_message, shown
from omni_jax.errors import InputError
from omni_jax.processing.files import bucket_errors, open_file
from omni_jax.serving.chat_request import ChatRequest, parse_body
from omni_jax.serving.json_objects import parse_object

URL = "/v1/chat/completions"
MAX_LINE_BYTES = 64 << 20
ID_PREFIX = "batch_req_"  # of the id of a result; the line's number follows

_FIELDS = ("custom_id", "method", "url", "body")
_BOM = b"\xef\xbb\xbf"  # what editors on Windows begin a file with; amid a file where such files were joined
_SURROGATE = re.compile("[\ud800-\udfff]")


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
    def result_id(self) -> str:
        """What the line's result is known by."""
        return f"{ID_PREFIX}{self.number:08d}"


@dataclass(frozen=True)
class Result:
    """A line of results.

    Attributes:
      text: the line, without its end; it can be written in UTF-8.
      failed: whether it is an error.
      num_tokens: of text that were decoded.
      speech_seconds: that were synthesized.
    """

    text: str
    failed: bool = False
    num_tokens: int = 0
    speech_seconds: float = 0.0


class LineError(InputError):
    """A line that is no request."""


def read_lines(name: str, number: int = 1, offset: int = 0) -> Iterator[Line]:
    """The lines of a file that are not empty, one in memory at a time.

    Args:
      name: of the file, a path or a ``gs://`` URL.
      number: of the first line that is read.
      offset: of that line, in bytes.

    Raises:
      InputError: if the file cannot be read.
    """
    try:
        with bucket_errors(name), open_file(name) as file:
            file.seek(offset)
            # a byte more than is allowed, to tell a line that is too long from one that is just as long
            while data := file.readline(MAX_LINE_BYTES + 1):
                if len(data) > MAX_LINE_BYTES:
                    # read on to its end a piece at a time, so that it never is in memory as a whole
                    while data and not data.endswith(b"\n"):
                        data = file.readline(MAX_LINE_BYTES)
                    yield Line(number, None, offset)
                elif data.removeprefix(_BOM).strip():
                    yield Line(number, data, offset)
                # empty lines count, so that the number is the one that an editor shows
                number += 1
                offset = file.tell()
    except OSError as e:
        raise InputError(f"cannot read {name}: {e.strerror or e}") from e


def parse_line(line: Line) -> tuple[str, ChatRequest]:
    """The custom_id and the request of a line.

    Raises:
      LineError: if it is none, or its body cannot be served; says what is wrong with it.
    """
    values = _parse_json(line)
    # first, since it is what every other error is found by
    custom_id = values.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineError(f"custom_id is {shown(custom_id)}; it must be a string that is not empty")
    try:
        check_names("field", values, _FIELDS)
        for name, expected in (("method", "POST"), ("url", URL)):
            if values.get(name) != expected:
                raise InputError(f"{name} is {shown(values.get(name))}; it must be {expected!r}")
        return custom_id, parse_body(values.get("body"))
    # what is wrong with the fields makes the line no request, which has another code than media that cannot be read
    except InputError as e:
        raise LineError(str(e)) from e


def read_custom_id(line: Line) -> str | None:
    """The custom_id of a line, which may be wrong in every other way; None if it cannot be told."""
    try:
        custom_id = json.loads((line.data or b"").removeprefix(_BOM).decode())["custom_id"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return None
    return custom_id if isinstance(custom_id, str) else None


def make_result(line: Line, custom_id: str | None, body: dict[str, Any]) -> str:
    """A line of results that holds the body of an answer."""
    # the shape of OpenAI's batch results, field by field
    response = {"status_code": 200, "request_id": line.result_id, "body": body}
    return _dump({"id": line.result_id, "custom_id": custom_id, "response": response, "error": None})


def make_error(line: Line, custom_id: str | None, error: Exception) -> Result:
    """What comes of a line that is not answered.

    The code is "invalid_line" for what is no request, "invalid_request" for what cannot be served, and "failed" for
    whatever else came up.
    """
    if isinstance(error, InputError):
        code = "invalid_line" if isinstance(error, LineError) else "invalid_request"
        message = str(error)
    else:
        code = "failed"
        message = f"{type(error).__name__}: {error}"
    # results are shown to others than those who signed the URLs in them
    problem = {"code": code, "message": short_message(message)}
    text = _dump({"id": line.result_id, "custom_id": custom_id, "response": None, "error": problem})
    return Result(text, failed=True)


def _parse_json(line: Line) -> dict[str, Any]:
    # read_lines gives no data of a line that is too long
    if line.data is None:
        raise LineError(f"the line is longer than {MAX_LINE_BYTES} bytes; put its media into files")
    try:
        return parse_object(line.data.removeprefix(_BOM), "the line")
    except InputError as e:
        raise LineError(str(e)) from e


def _dump(values: dict[str, Any]) -> str:
    """JSON in letters rather than escapes, but for half a surrogate pair, which UTF-8 cannot hold."""
    text = json.dumps(values, ensure_ascii=False)
    return _SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class SeenIds:
    """Which custom_ids there were; of each 16 bytes are kept."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, custom_id: str) -> bool:
        """Whether it is new."""
        # a digest costs the same for an id of any length, and two ids never share one of 128 bits
        digest = hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()
        if digest in self._digests:
            return False
        self._digests.add(digest)
        return True
