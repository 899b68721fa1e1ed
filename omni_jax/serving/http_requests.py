"""What endpoints do with requests and responses of HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from omni_jax.checks import shown
from omni_jax.errors import InputError
from omni_jax.serving.http_errors import TooLargeError
from omni_jax.serving.json_objects import parse_object

T = TypeVar("T")

_PING_SECONDS = 15


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request.

    Raises:
      TooLargeError: if it has more bytes.
    """
    pieces = []
    num_bytes = 0
    async for piece in request.stream():
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise TooLargeError(f"the body has over {max_bytes} bytes, which is the limit (--max-body-megabytes)")
        pieces.append(piece)
    return b"".join(pieces)


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The object that is the body of a request.

    Raises:
      InputError: if it is none.
      TooLargeError: if it has more bytes.
    """
    return parse_object(await read_body(request, max_bytes), "body")


@contextlib.asynccontextmanager
async def read_form(request: Request, max_bytes: int) -> AsyncIterator[FormData]:
    """The fields and files of a multipart body.

    Raises:
      InputError: if it is none.
      TooLargeError: if it has more bytes.
    """
    kind = request.headers.get("content-type", "")
    if not kind.startswith("multipart/form-data"):
        raise InputError(f"the body must be multipart/form-data, got {shown(kind)}")
    body = await read_body(request, max_bytes)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    # of the same headers, with the body that was found small enough
    form = await Request(request.scope, receive).form(max_files=1, max_fields=64, max_part_size=max_bytes)
    try:
        yield form
    finally:
        await form.close()


def form_text(form: FormData, name: str, default: str | None = None) -> str | None:
    """A field of a form that is text.

    Raises:
      InputError: if it is a file.
    """
    value = form.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, got a file")
    return value


async def form_file(form: FormData, name: str) -> bytes:
    """A file of a form.

    Raises:
      InputError: if it is missing, empty, or text.
    """
    value = form.get(name)
    if not isinstance(value, UploadFile):
        raise InputError(f"{name} is missing; it must be a file")
    data = await value.read()
    if not data:
        raise InputError(f"{name} is empty (0 bytes)")
    return data


async def until_disconnected(request: Request, work: Awaitable[T]) -> T:
    """What some work gives; it is cancelled as soon as nobody waits for it any more.

    Raises:
      ClientDisconnect: then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    # the body has been read, so that nothing else comes
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _HoldingResponse(Response):
    """A response that holds something; it is freed when all is sent, or nobody reads it any more.

    Attributes:
      on_end: are called once, then.
    """

    on_end: Sequence[Callable[[], object]] = ()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for function in self.on_end:
                function()


class EventStream(_HoldingResponse, EventSourceResponse):
    """Server-sent events."""

    def __init__(self, events: AsyncIterator[str], *on_end: Callable[[], object]):
        """``events`` are the data of each; ``on_end`` free what they hold."""
        super().__init__(events, ping=_PING_SECONDS, sep="\n")
        self.on_end = on_end


class ByteStream(_HoldingResponse, StreamingResponse):
    """Bytes as they are made."""

    def __init__(self, pieces: AsyncIterator[bytes], content_type: str, *on_end: Callable[[], object]):
        """``pieces`` make up the body; ``on_end`` free what they hold."""
        super().__init__(pieces, media_type=content_type)
        self.on_end = on_end
