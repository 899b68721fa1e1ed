"""``bench.py serve``: a server of OpenAI's API under load, ours or any other."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import (
    check_at_least_one,
    check_picture,
    format_seconds,
    print_tables,
    save_figure,
    write_json,
)
from omni_jax.errors import InputError
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.serving.sound_formats import encode_sound

_QUESTIONS = ("What is this?", "Tell me about it.", "What do you think of it?", "Describe what you notice.")
_SIDE = 224  # pixels of a picture
_SOUND_SECONDS = 2.0
_BYTES_PER_SAMPLE = 2


@dataclass
class Timing:
    """One request, in seconds since it was sent.

    Attributes:
      first_text: when its first text came; None: none came.
      first_audio: likewise of its sound.
      last_audio: when its last sound came.
      finished: when all had come.
      audio_seconds: of sound.
      underruns: pieces of sound that came after a player, which held the first back as it was told, had run dry.
    """

    first_text: float | None = None
    first_audio: float | None = None
    last_audio: float | None = None
    finished: float = 0.0
    audio_seconds: float = 0.0
    underruns: int = 0
    _starts: float = field(default=0.0, repr=False)  # when the player begins

    def add_text(self, now: float) -> None:
        """Text came."""
        if self.first_text is None:
            self.first_text = now

    def add_audio(self, now: float, num_bytes: int, hold_back: float) -> None:
        """Sound came; ``hold_back`` is what the server says of the first piece."""
        if self.first_audio is None:
            self.first_audio = now
            self._starts = now + hold_back
        elif now > self._starts + self.audio_seconds:
            self.underruns += 1
            # the player goes on with this piece
            self._starts = now - self.audio_seconds
        self.last_audio = now
        self.audio_seconds += num_bytes / _BYTES_PER_SAMPLE / SAMPLE_RATE

    @property
    def audio_rtf(self) -> float | None:
        """Seconds from the first sound to the last for each second of sound behind the first piece."""
        if self.first_audio is None or self.last_audio is None or self.last_audio == self.first_audio:
            return None
        return (self.last_audio - self.first_audio) / self.audio_seconds


def make_requests(count: int, model: str, spoken: float, max_tokens: int, voice: str, seed: int = 0) -> list[Any]:
    """Bodies of chat completions: text, a picture, a sound, or both, in turn; some are to be spoken.

    Args:
      count: of them.
      model: that they name.
      spoken: share of those that are spoken.
      max_tokens: of a reply.
      voice: that speaks.
      seed: of media and order.
    """
    rng = np.random.default_rng(seed)
    are_spoken = rng.permutation(count) < round(count * spoken)
    bodies = []
    for number in range(count):
        parts: list[dict[str, Any]] = []
        if number % 4 in (1, 3):
            parts.append({"type": "image_url", "image_url": {"url": _make_picture(rng)}})
        if number % 4 in (2, 3):
            parts.append({"type": "input_audio", "input_audio": {"data": _make_sound(rng), "format": "wav"}})
        parts.append({"type": "text", "text": f"{_QUESTIONS[number % len(_QUESTIONS)]} ({seed}.{number})"})
        messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": parts}]
        body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
        if are_spoken[number]:
            body |= {"modalities": ["text", "audio"], "audio": {"voice": voice, "format": "pcm16"}}
        bodies.append(body)
    return bodies


def _make_picture(rng: np.random.Generator) -> str:
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (_SIDE, _SIDE, 3), dtype=np.uint8)).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _make_sound(rng: np.random.Generator) -> str:
    samples = rng.normal(0, 0.1, int(_SOUND_SECONDS * SAMPLE_RATE)).astype(np.float32)
    return base64.b64encode(encode_sound(samples, "wav")).decode()


async def ask(client: Any, url: str, body: dict[str, Any]) -> Timing:
    """Sends a request, and notes when its pieces come.

    Raises:
      InputError: if the server refuses it.
    """
    timing = Timing()
    begin = time.perf_counter()
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            raise InputError(f"{url}: status {response.status_code}: {(await response.aread())[:300].decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise InputError(f"{url}: {chunk['error']}")
            now = time.perf_counter() - begin
            for choice in chunk["choices"]:
                delta = choice["delta"]
                if delta.get("content"):
                    timing.add_text(now)
                audio = delta.get("audio") or {}
                if audio.get("data"):
                    timing.add_audio(now, len(base64.b64decode(audio["data"])), audio.get("hold_back") or 0.0)
    timing.finished = time.perf_counter() - begin
    return timing


async def ask_all(client: Any, url: str, bodies: Sequence[Any], concurrency: int, progress: Any) -> list[Timing]:
    """Sends requests, so many at a time."""
    waiting = iter(bodies)
    timings: list[Timing] = []

    async def work() -> None:
        for body in waiting:
            timings.append(await ask(client, url, body))
            progress()

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return timings


def summarize(timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """Medians and 99th percentiles, and how much came in how many seconds."""
    spoken = [timing for timing in timings if timing.first_audio is not None]
    columns = {
        "ttft": [timing.first_text for timing in timings],
        "audio_ttfp": [timing.first_audio for timing in spoken],
        "audio_rtf": [timing.audio_rtf for timing in spoken],
        "e2el": [timing.finished for timing in timings],
    }
    values: dict[str, Any] = {}
    for name, column in columns.items():
        known = [value for value in column if value is not None]
        for percent in (50, 99):
            values[f"{name}_p{percent}"] = float(np.percentile(known, percent)) if known else None
    values["requests"] = len(timings)
    values["spoken"] = len(spoken)
    values["underruns"] = sum(timing.underruns for timing in timings)
    values["audio_seconds_per_second"] = sum(timing.audio_seconds for timing in timings) / seconds
    values["requests_per_second"] = len(timings) / seconds
    return values


def serve(
    endpoint: str = "http://127.0.0.1:8000",
    model: str | None = None,
    voice: str = "Chelsie",
    concurrency: tuple[int, ...] = (1, 2, 4, 8, 16),
    requests: int = 32,
    spoken: float = 0.5,
    max_tokens: int = 64,
    json_out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None,
    picture: Path | None = None,
) -> None:
    """Asks a server that runs, and tells how long it took to the first text and sound, and how often a player ran dry.

    Any server of OpenAI's chat completions will do that streams sound as pcm16 at 24 kHz. A key is taken from the
    variable OPENAI_API_KEY.

    Args:
      endpoint: of the server, without /v1.
      model: as the server calls it; the first that it has, if none is given.
      voice: that speaks.
      concurrency: requests at a time, a round for each number.
      requests: of a round: texts, pictures and sounds in turn.
      spoken: share of those that are spoken.
      max_tokens: of a reply.
      json_out: where the figures are written, too.
      picture: draw them over the concurrency here (.png, .svg or .pdf).
    """
    check_picture(picture)
    check_at_least_one(concurrency=concurrency, requests=requests, max_tokens=max_tokens)
    found = asyncio.run(_measure(endpoint, model, voice, concurrency, requests, spoken, max_tokens))
    print_tables(_make_table(found))
    write_json(json_out, {"endpoint": endpoint, "rounds": found})
    if picture is not None:
        draw_rounds(found, picture)


async def _measure(
    endpoint: str,
    model: str | None,
    voice: str,
    concurrency: Sequence[int],
    requests: int,
    spoken: float,
    max_tokens: int,
) -> dict[str, Any]:
    # a part of the extra test; other benchmarks do without it
    import httpx

    key = os.environ.get("OPENAI_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{endpoint.rstrip('/')}/v1"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=None, limits=limits) as client:
        try:
            name = model or (await client.get(f"{url}/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, KeyError, ValueError) as e:
            raise SystemExit(f"error: {url} does not answer as OpenAI's API does: {e}") from None
        found = {}
        with Progress() as progress:
            task = progress.add_task("asking", total=len(concurrency) * requests)
            for seed, number in enumerate(concurrency):
                # other requests in each round: a server may remember what it has read
                bodies = make_requests(requests, name, spoken, max_tokens, voice, seed)
                begin = time.perf_counter()
                timings = await ask_all(
                    client, f"{url}/chat/completions", bodies, number, lambda: progress.advance(task)
                )
                found[str(number)] = summarize(timings, time.perf_counter() - begin)
    return found


def draw_rounds(found: dict[str, Any], picture: Path) -> None:
    """Draws waiting times, and how much sound came in a second, over the requests at a time."""
    from matplotlib import pyplot  # an extra, which only pictures need

    figure, (waits, rates) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rounds = list(found.values())
    for name, label in (("ttft", "first text"), ("audio_ttfp", "first sound")):
        for percent, style in ((50, "-"), (99, "--")):
            waited = [values[f"{name}_p{percent}"] for values in rounds]
            if None not in waited:
                color = "tab:blue" if name == "ttft" else "tab:orange"
                waits.plot(list(found), waited, style, color=color, marker="o", label=f"{label}, p{percent}")
    waits.set(xlabel="requests at a time", ylabel="seconds until it came", ylim=(0, None))
    waits.legend()
    rates.bar(list(found), [values["audio_seconds_per_second"] for values in rounds])
    rates.set(xlabel="requests at a time", ylabel="seconds of sound made in a second")
    save_figure(figure, picture)


def _make_table(found: dict[str, Any]) -> Table:
    names = ("ttft_p50", "ttft_p99", "audio_ttfp_p50", "audio_ttfp_p99", "audio_rtf_p50", "audio_rtf_p99")
    table = Table("at a time", *names, "underruns", "audio s/s", title="mixed requests, streamed")
    for number, values in found.items():
        cells = []
        for name in names:
            value = values[name]
            is_ratio = name.startswith("audio_rtf")
            cells.append("none" if value is None else f"{value:.2f}" if is_ratio else format_seconds(value))
        table.add_row(number, *cells, str(values["underruns"]), f"{values['audio_seconds_per_second']:.2f}")
    return table
