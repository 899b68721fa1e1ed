"""What every request passes: it is counted, its origin and its key are checked."""

from __future__ import annotations

import hmac
import urllib.parse
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from omni_jax.serving.http_errors import ApiError, ForbiddenError, UnauthorizedError, handle_error
from omni_jax.serving.service import Service

# what needs no key: whether the server is alive, what it counts and takes, and the page, which asks for one
_OPEN_PATHS = ("/", "/docs", "/openapi.json", "/health", "/ready", "/metrics")
_OPEN_FOLDER = "/page/"
# browsers cannot send a header with a websocket; OpenAI's clients put the key here
_KEY_PROTOCOL = "openai-insecure-api-key."


class CountResponses:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # of the route and not of the request, which may hold anything
                route = scope.get("route")
                self._service.metrics.count_response(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, count)


class CheckOrigin:
    """Refuses what a page of another origin asks for, unless that is allowed.

    A browser sends such requests, and opens such websockets, without asking first; only their answers are kept from the
    page.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str]):
        self._app = app
        self._allowed = tuple(allowed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not self._is_allowed(Headers(scope=scope)):
            error = ForbiddenError("pages of this origin may not ask; the server's --cors-origins names those that may")
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        # programs that are no browsers send none
        if origin is None or "*" in self._allowed or origin in self._allowed:
            return True
        return urllib.parse.urlsplit(origin).netloc == headers.get("host")


class CheckKey:
    """Refuses requests without a key."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]):
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or _is_open(scope["path"]) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        await _refuse(UnauthorizedError("the API key is missing or wrong"), scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = [Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")]
        for protocol in scope.get("subprotocols", []):
            if protocol.startswith(_KEY_PROTOCOL):
                given.append(protocol.removeprefix(_KEY_PROTOCOL))
        # every pair is compared, in a time that does not tell how much of one is right
        matches = [hmac.compare_digest(text.encode(), key) for text in given for key in self._keys]
        return any(matches)


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        # before it is accepted: the client gets status 403
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": str(error)})
        return
    response = await handle_error(Request(scope), error)
    await response(scope, receive, send)
