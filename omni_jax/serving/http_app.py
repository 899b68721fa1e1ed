"""The server's routes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute

from omni_jax.serving.batches_endpoint import (
    cancel_batch,
    create_batch,
    delete_file,
    get_batch,
    get_file,
    get_file_content,
    list_batches,
    list_files,
    refuse_files,
    upload_file,
)
from omni_jax.serving.chat_endpoint import complete_chat
from omni_jax.serving.http_errors import FORESEEN_ERRORS, handle_error
from omni_jax.serving.http_middleware import CheckKey, CheckOrigin, CountResponses
from omni_jax.serving.http_page import PageFiles, get_page
from omni_jax.serving.metrics import CONTENT_TYPE
from omni_jax.serving.openapi import get_description, get_documentation
from omni_jax.serving.realtime_endpoint import run_realtime
from omni_jax.serving.service import Service
from omni_jax.serving.speech_endpoint import create_speech
from omni_jax.serving.transcription_endpoint import create_transcription
from omni_jax.serving.voices_endpoint import add_voice, delete_voice, list_voices


def make_app(service: Service, *, api_keys: Sequence[str] = (), cors_origins: Sequence[str] = ()) -> Starlette:
    """The application of a service.

    Args:
      service: that answers.
      api_keys: one of which a request must have; none: no key is asked for.
      cors_origins: of pages of other hosts that may ask.
    """
    middleware = [Middleware(CountResponses, service=service), Middleware(CheckOrigin, allowed=tuple(cors_origins))]
    if cors_origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
        )
    if api_keys:
        middleware.append(Middleware(CheckKey, api_keys=tuple(api_keys)))
    routes = [
        Route("/v1/chat/completions", complete_chat, methods=["POST"]),
        Route("/v1/audio/speech", create_speech, methods=["POST"]),
        Route("/v1/audio/transcriptions", create_transcription, methods=["POST"]),
        Route("/v1/audio/voices", list_voices, methods=["GET"]),
        Route("/v1/audio/voices", add_voice, methods=["POST"]),
        Route("/v1/audio/voices/{name}", delete_voice, methods=["DELETE"]),
        *_make_file_routes(service.spec.replicas),
        WebSocketRoute("/v1/realtime", run_realtime),
        Route("/v1/models", list_models, methods=["GET"]),
        Route("/v1/models/{name:path}", get_model, methods=["GET"]),
        Route("/openapi.json", get_description, methods=["GET"]),
        Route("/docs", get_documentation, methods=["GET"]),
        Route("/", get_page, methods=["GET"]),
        Mount("/page", PageFiles()),
        Route("/health", get_health, methods=["GET"]),
        Route("/ready", get_ready, methods=["GET"]),
        Route("/metrics", get_metrics, methods=["GET"]),
    ]
    # by kind: after what nobody foresaw the connection is closed too
    handlers = dict.fromkeys((Exception, *FORESEEN_ERRORS), handle_error)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=_run_batches)
    app.state.service = service
    return app


def _make_file_routes(replicas: int) -> list[Route]:
    """Files and batches; of several replicas none has those of the others, so that all of them refuse."""
    if replicas > 1:
        methods = ["GET", "POST", "DELETE"]
        return [Route(f"/v1/{name}{{rest:path}}", refuse_files, methods=methods) for name in ("files", "batches")]
    return [
        Route("/v1/files", list_files, methods=["GET"]),
        Route("/v1/files", upload_file, methods=["POST"]),
        Route("/v1/files/{id}", get_file, methods=["GET"]),
        Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
        Route("/v1/files/{id}/content", get_file_content, methods=["GET"]),
        Route("/v1/batches", list_batches, methods=["GET"]),
        Route("/v1/batches", create_batch, methods=["POST"]),
        Route("/v1/batches/{id}", get_batch, methods=["GET"]),
        Route("/v1/batches/{id}/cancel", cancel_batch, methods=["POST"]),
    ]


@contextlib.asynccontextmanager
async def _run_batches(app: Starlette) -> AsyncIterator[None]:
    """Works on batches as long as the server runs."""
    service: Service = app.state.service
    task = asyncio.create_task(service.batches.run())
    yield
    task.cancel()


async def list_models(request: Request) -> Response:
    """GET /v1/models."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_describe(service, name) for name in service.names]})


async def get_model(request: Request) -> Response:
    """GET /v1/models/{name}."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    service.check_model(name)
    return JSONResponse(_describe(service, name))


def _describe(service: Service, name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": service.started, "owned_by": "omni_jax"}


async def get_health(request: Request) -> Response:
    """GET /health: whether the engine runs."""
    service: Service = request.app.state.service
    is_alive = service.engine.is_alive
    return JSONResponse({"status": "ok" if is_alive else "failed"}, 200 if is_alive else 503)


async def get_ready(request: Request) -> Response:
    """GET /ready: whether another request would be taken."""
    service: Service = request.app.state.service
    ready = service.engine.is_alive and not service.draining
    return JSONResponse({"ready": ready}, 200 if ready else 503)


async def get_metrics(request: Request) -> Response:
    """GET /metrics."""
    service: Service = request.app.state.service
    return Response(service.metrics.render(), media_type=CONTENT_TYPE)
