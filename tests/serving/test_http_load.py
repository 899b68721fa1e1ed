"""Two hundred mixed requests, sixteen at a time: as each alone, without compiling, in memory that stays as it is."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

import omni_jax
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from tests.serving import requests
from tests.serving.http_client import find_server, serve_http

pytestmark = pytest.mark.long

COUNT = 200
AT_A_TIME = 16
GROWTH = 1.1  # of memory, from the middle to the end
KINDS = 8
TALKER = {"temperature": 0.0, "max_tokens": 40}
WARM = (
    "--warmup-tokens",
    "1024",
    "--warmup-windows",
    "32",
    "--slots",
    "4",
    "--queue",
    "64",
    "--prefix-gigabytes",
    "0.1",
)


def make_body(number: int) -> dict[str, Any]:
    """One of a few kinds: text, picture, sound, video; half of them spoken, half of these streamed."""
    kind = number % KINDS
    media = [
        [],
        [{"type": "image_url", "image_url": {"url": str(requests.MEDIA / "picture.jpg")}}],
        [{"type": "audio_url", "audio_url": {"url": str(requests.MEDIA / "speech.wav")}}],
        [{"type": "video_url", "video_url": {"url": str(requests.MEDIA / "silent.mp4")}}],
    ][kind % 4]
    content = [*media, {"type": "text", "text": f"What is number {number % 20}?"}]
    messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": content}]
    body: dict[str, Any] = {"messages": messages, "max_tokens": 1 + number % 9, "return_token_ids": True}
    body |= {"mm_processor_kwargs": requests.SMALL}
    if kind >= 4:
        body |= {"modalities": ["text", "audio"], "audio": {"voice": "Ethan", "format": "pcm16"}}
        body["sampling_params_list"] = [{}, TALKER]
    return body


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> tuple[list[int], list[int]]:
    answer = (await client.post(url, json=body)).raise_for_status().json()
    (choice,) = answer["choices"]
    return choice["token_ids"], choice["message"].get("audio", {}).get("codec_ids", [])


def read_metric(address: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_two_hundred_at_once(tiny_model: Path) -> None:
    model = omni_jax.load(tiny_model)
    bodies = [make_body(number) for number in range(COUNT)]
    with serve_http(tiny_model, "--media-root", str(requests.MEDIA), *WARM) as address:
        url = f"{address}/v1/chat/completions"
        process = find_server(address)
        memory: list[int] = []

        async def work() -> list[tuple[list[int], list[int]]]:
            limit = asyncio.Semaphore(AT_A_TIME)
            async with httpx.AsyncClient(timeout=None) as client:

                async def ask_one(body: dict[str, Any]) -> tuple[list[int], list[int]]:
                    async with limit:
                        ids = await ask(client, url, body)
                        memory.append(process.memory_info().rss)
                        return ids

                return await asyncio.gather(*map(ask_one, bodies))

        answers = asyncio.run(work())
        assert read_metric(address, "omni_compilations") == 0
        assert max(memory[COUNT // 2 :]) <= GROWTH * max(memory[: COUNT // 2])
    known: dict[str, tuple[list[int], list[int]]] = {}
    for body, ids in zip(bodies, answers, strict=True):
        key = repr({name: value for name, value in body.items() if name != "return_token_ids"})
        if key not in known:
            known[key] = answer_alone(model, body)
        assert ids == known[key]


def answer_alone(model: omni_jax.OmniModel, body: dict[str, Any]) -> tuple[list[int], list[int]]:
    options: dict[str, Any] = {"max_tokens": body["max_tokens"]}
    if "audio" in body:
        options |= {"modalities": ("text", "audio"), "voice": "Ethan", "talker": TALKER}
    messages = []
    for message in body["messages"]:
        content = message["content"]
        if isinstance(content, list):
            content = [_make_small(part) for part in content]
        messages.append({**message, "content": content})
    reply = model.generate(messages, **options)
    return list(reply.token_ids), list(reply.codec_ids)


def _make_small(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, **requests.SMALL} if part["type"] in ("image_url", "video_url") else part
