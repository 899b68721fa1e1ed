"""Who may ask: pages of this origin and of those that are allowed, with a key where there is one."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from omni_jax.serving.http_middleware import CheckKey, CheckOrigin

HOST = "http://testserver"
PAGE = "https://page.example"


async def answer(request: Request) -> Response:
    return PlainTextResponse("yes")


async def accept(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("yes")
    await websocket.close()


def make_client(*middleware: Middleware) -> TestClient:
    routes = [
        Route("/v1/models", answer),
        Route("/health", answer),
        Route("/page/page.js", answer),
        WebSocketRoute("/v1/realtime", accept),
    ]
    return TestClient(Starlette(routes=routes, middleware=list(middleware)))


def opens(client: TestClient, headers: dict[str, str], protocols: list[str] | None = None) -> bool:
    """Whether a websocket is accepted."""
    try:
        with client.websocket_connect("/v1/realtime", protocols, headers=headers) as websocket:
            return websocket.receive_text() == "yes"
    except WebSocketDisconnect:
        return False


@pytest.mark.parametrize(
    "origin, allowed, may",
    [
        (None, (), True),
        (HOST, (), True),
        (PAGE, (), False),
        ("null", (), False),
        ("http://testserver.evil.example", (), False),
        ("http://testserver:81", (), False),
        (PAGE, (PAGE,), True),
        (PAGE, ("*",), True),
        ("https://other.example", (PAGE,), False),
    ],
)
def test_pages_of_other_origins_may_not_ask(origin: str | None, allowed: tuple[str, ...], may: bool) -> None:
    client = make_client(Middleware(CheckOrigin, allowed=allowed))
    headers = {} if origin is None else {"Origin": origin}
    response = client.get("/v1/models", headers=headers)
    assert response.status_code == (200 if may else 403)
    assert may or response.json()["error"]["code"] == "forbidden"
    assert opens(client, headers) == may


@pytest.mark.parametrize(
    "header, may",
    [
        ("Bearer one", True),
        ("Bearer two", True),
        ("Bearer three", False),
        ("Bearer on", False),
        ("Bearer ", False),
        ("", False),
        ("Bearer \u00e9", False),
    ],
)
def test_a_key_opens_both_doors(header: str, may: bool) -> None:
    client = make_client(Middleware(CheckKey, api_keys=("one", "two")))
    headers = {"Authorization": header.encode("latin-1").decode("latin-1")} if header else {}
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    response = client.get("/v1/models", headers=encoded)
    assert response.status_code == (200 if may else 401)
    assert opens(client, encoded) == may


def test_a_browser_gives_its_key_as_a_protocol() -> None:
    client = make_client(Middleware(CheckKey, api_keys=("one",)))
    assert opens(client, {}, ["realtime", "openai-insecure-api-key.one"])
    assert not opens(client, {}, ["realtime", "openai-insecure-api-key.two"])
    assert not opens(client, {}, ["realtime"])


def test_the_page_and_health_need_no_key() -> None:
    client = make_client(Middleware(CheckKey, api_keys=("one",)))
    assert client.get("/health").status_code == 200
    assert client.get("/page/page.js").status_code == 200
