"""Errors of the server, in OpenAI's form."""

from __future__ import annotations

import logging

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from omni_jax.checks import short_message
from omni_jax.errors import InputError
from omni_jax.processing.worker_pool import PreparationError
from omni_jax.serving.engine_thread import ClosedError

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 1


class ApiError(Exception):
    """What a request is refused with.

    Attributes:
      status: of HTTP.
      kind: OpenAI's ``type``.
      code: OpenAI's ``code``, if it has one.
    """

    status = 400
    kind = "invalid_request_error"
    code: str | None = None


class ModelNotFoundError(ApiError):
    """There is no model of this name."""

    status = 404
    code = "model_not_found"


class NotFoundError(ApiError):
    """There is nothing of this name."""

    status = 404
    code = "not_found"


class ConflictError(ApiError):
    """There is something of this name already, or it is in another state."""

    status = 409
    code = "conflict"


class TooLargeError(ApiError):
    """A body is over the limit."""

    status = 413
    code = "request_too_large"


class UnauthorizedError(ApiError):
    """The key is missing or wrong."""

    status = 401
    code = "invalid_api_key"


class ForbiddenError(ApiError):
    """Whoever asks may not."""

    status = 403
    code = "forbidden"


class ClientGoneError(ApiError):
    """Nobody reads the response any more; the status is nginx's."""

    status = 499
    code = "client_closed_request"


class OverloadedError(ApiError):
    """There is no room for another request."""

    status = 503
    kind = "server_error"
    code = "overloaded"


class InternalError(ApiError):
    """What nobody foresaw."""

    status = 500
    kind = "server_error"


# what ``make_error`` knows
FORESEEN_ERRORS = (ApiError, ClosedError, InputError, PreparationError, ClientDisconnect, HTTPException)


def make_error(error: Exception) -> tuple[int, dict[str, object]]:
    """The status and the body of an error; what nobody foresaw is logged, and not told."""
    told = _translate(error)
    values = {"message": short_message(str(told)), "type": told.kind, "param": None, "code": told.code}
    return told.status, {"error": values}


def _translate(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClosedError):
        return OverloadedError(str(error))
    if isinstance(error, InputError | PreparationError):
        return ApiError(str(error))
    if isinstance(error, ClientDisconnect):
        return ClientGoneError("the client is gone")
    if isinstance(error, HTTPException):  # of a route that is not there, or not with this method
        told = ApiError(str(error.detail))
        told.status = error.status_code
        return told
    _log.error("a request failed", exc_info=error)
    return InternalError("the server failed; its log says why")


async def handle_error(request: Request, error: Exception) -> JSONResponse:
    """The response to a request that an endpoint could not serve."""
    status, body = make_error(error)
    headers = {}
    if status == OverloadedError.status:
        headers["Retry-After"] = str(_RETRY_SECONDS)
    if isinstance(error, HTTPException) and error.headers:
        headers |= dict(error.headers)
    return JSONResponse(body, status, headers)
