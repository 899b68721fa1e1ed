"""What ``bench.py serve`` says of a server: pieces that come in time, and pieces that come too late."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from benchmarks.serve import Timing, ask_all, make_requests, summarize
from omni_jax.errors import InputError

SECOND = base64.b64encode(bytes(2 * 24_000)).decode()


def test_underruns_are_counted_as_a_player_has_them() -> None:
    timing = Timing()
    timing.add_text(0.5)
    timing.add_audio(1.0, 48_000, 0.2)  # plays from 1.2 to 2.2
    timing.add_audio(2.1, 48_000, 0.0)  # to 3.2
    timing.add_audio(3.7, 48_000, 0.0)  # half a second late; to 4.7
    timing.add_audio(4.6, 48_000, 0.0)
    assert (timing.first_text, timing.first_audio, timing.audio_seconds, timing.underruns) == (0.5, 1.0, 4.0, 1)
    assert timing.audio_rtf == pytest.approx(3.6 / 4)


def test_requests_are_mixed_and_the_same_for_a_seed() -> None:
    bodies = make_requests(40, "m", 0.5, 8, "Ethan")
    kinds = {tuple(part["type"] for part in body["messages"][1]["content"]) for body in bodies}
    assert len(kinds) == 4
    assert 10 < sum("audio" in body for body in bodies) < 30
    assert bodies == make_requests(40, "m", 0.5, 8, "Ethan")


def make_client(status: int = 200) -> httpx.AsyncClient:
    running = {"now": 0, "most": 0}

    async def chunks(speaks: bool) -> AsyncIterator[str]:
        deltas = [{"content": "a"}, *([{"audio": {"id": "x", "data": SECOND}}] * 2 if speaks else [])]
        for delta in deltas:
            yield f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n"
            await asyncio.sleep(0.01)
        running["now"] -= 1
        yield "data: [DONE]\n\n"

    async def answer(request: Request) -> Response:
        if status != 200:
            return JSONResponse({"error": {"message": "full"}}, status)
        running["now"] += 1
        running["most"] = max(running.values())
        return StreamingResponse(chunks("audio" in await request.json()), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server")


def test_all_requests_are_timed() -> None:
    async def work() -> list[Timing]:
        async with make_client() as client:
            bodies = make_requests(12, "m", 0.5, 8, "Ethan")
            return await ask_all(client, "/v1/chat/completions", bodies, 4, lambda: None)

    timings = asyncio.run(work())
    values = summarize(timings, 2.0)
    assert values["requests"] == 12 and values["spoken"] == sum(bool(timing.audio_seconds) for timing in timings) > 0
    assert values["audio_seconds_per_second"] == values["spoken"] and values["requests_per_second"] == 6
    assert values["ttft_p50"] <= values["ttft_p99"] <= values["e2el_p99"]


def test_a_refusal_is_told() -> None:
    async def work() -> None:
        async with make_client(503) as client:
            await ask_all(client, "/v1/chat/completions", make_requests(1, "m", 0, 8, "Ethan"), 1, lambda: None)

    with pytest.raises(InputError, match="503"):
        asyncio.run(work())
