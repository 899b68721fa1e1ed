"""The websocket of realtime sessions, with OpenAI's events (GA)."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from omni_jax.errors import InputError
from omni_jax.serving.http_errors import ApiError
from omni_jax.serving.json_objects import parse_object
from omni_jax.serving.realtime_session import RealtimeSession
from omni_jax.serving.service import Service
from omni_jax.serving.turn_detection import SileroDetector, VoiceDetector, WebRtcDetector

_TRY_AGAIN_LATER = 1013  # RFC 6455's registry
_POLICY_VIOLATION = 1008


async def run_realtime(websocket: WebSocket) -> None:
    """WS /v1/realtime?model=NAME."""
    service: Service = websocket.app.state.service
    # as OpenAI's clients offer it, with others that carry keys of browsers
    offered = websocket.scope.get("subprotocols", [])
    await websocket.accept(subprotocol="realtime" if "realtime" in offered else None)
    session: RealtimeSession | None = None
    try:
        with service.open_session():
            service.check_model(websocket.query_params.get("model"))
            session = RealtimeSession(
                service, functools.partial(_send, websocket), functools.partial(make_detector, service)
            )
            await session.begin()
            while True:
                message = await websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                await _handle(session, message.get("text"))
    except ApiError as error:
        await _refuse(websocket, error)
    except WebSocketDisconnect:
        pass
    finally:
        if session is not None:
            await session.close()


def make_detector(service: Service, threshold: float) -> VoiceDetector:
    """The detector of voice that the server was started with."""
    path = service.spec.voice_detector
    return WebRtcDetector(threshold) if path is None else SileroDetector(path)


async def _send(websocket: WebSocket, event: dict[str, Any]) -> None:
    # whoever is gone is found by the next receive
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await websocket.send_json(event)


async def _handle(session: RealtimeSession, text: Any) -> None:
    try:
        if not isinstance(text, str):
            raise InputError("events are JSON texts, and no binary messages")
        event = parse_object(text, "the event")
    except InputError as error:
        await session.send_error(error)
        return
    await session.handle(event)


async def _refuse(websocket: WebSocket, error: ApiError) -> None:
    code = _TRY_AGAIN_LATER if error.status == 503 else _POLICY_VIOLATION
    await websocket.close(code, str(error)[:120])
