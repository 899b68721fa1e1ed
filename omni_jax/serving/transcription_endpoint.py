"""OpenAI's speech to text: the model is asked to write down what it hears."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from omni_jax.checks import check_names, shown
from omni_jax.engine.outputs import Reply
from omni_jax.errors import InputError
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.engine_thread import ReplyStream
from omni_jax.serving.http_errors import make_error
from omni_jax.serving.http_requests import EventStream, form_file, form_text, read_form, until_disconnected
from omni_jax.serving.service import Service
from omni_jax.serving.transcription_request import make_transcription

_FIELDS = ("file", "model", "language", "prompt", "response_format", "temperature", "stream")
_FORMATS = ("json", "text", "verbose_json")


async def create_transcription(request: Request) -> Response:
    """POST /v1/audio/transcriptions."""
    service: Service = request.app.state.service
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.admit())
        async with read_form(request, service.spec.max_body_bytes) as form:
            check_names("field of the form", form, _FIELDS)
            data = await form_file(form, "file")
            values = {name: form_text(form, name) for name in _FIELDS if name != "file"}
        chat = _parse(service, data, values)
        response_format = values["response_format"] or "json"
        if response_format not in _FORMATS:
            known = ", ".join(_FORMATS)
            raise InputError(f"response_format is {shown(response_format)}; it must be one of {known}")
        streams = _parse_bool(values["stream"])
        stream = await until_disconnected(request, service.answer(chat, live=streams))
        if streams:
            return EventStream(_events(stream), stack.pop_all().close, stream.cancel)
        try:
            reply = await until_disconnected(request, stream.reply())
        finally:
            stream.cancel()
        return _respond(reply, response_format, values["language"])


def _parse(service: Service, data: bytes, values: dict[str, str | None]) -> ChatRequest:
    temperature = 0.0
    if values["temperature"]:
        try:
            temperature = float(values["temperature"])
        except ValueError:
            raise InputError(f"temperature is {shown(values['temperature'])}; it must be a number") from None
    request = make_transcription(
        service.spec.transcription_prompt,
        data,
        language=values["language"] or "en",
        hint=values["prompt"] or "",
        temperature=temperature,
    )
    return request.with_options(service.choose_adapter(values["model"], request.options))


def _parse_bool(value: str | None) -> bool:
    known = {None: False, "": False, "false": False, "0": False, "true": True, "1": True}
    key = value.lower() if value is not None else None
    if key not in known:
        raise InputError(f"stream is {shown(value)}; it must be true or false")
    return known[key]


def _respond(reply: Reply, response_format: str, language: str | None) -> Response:
    if response_format == "text":
        return PlainTextResponse(reply.text + "\n")
    body: dict[str, Any] = {"text": reply.text, "usage": _make_usage(reply)}
    if response_format == "verbose_json":
        body |= {"task": "transcribe", "language": language or "en", "duration": reply.usage.audio_seconds}
        body["segments"] = []
    return JSONResponse(body)


async def _events(stream: ReplyStream) -> AsyncIterator[str]:
    try:
        async for event in stream:
            if event.text:
                yield json.dumps({"type": "transcript.text.delta", "delta": event.text})
            if event.reply is not None:
                usage = _make_usage(event.reply)
                yield json.dumps({"type": "transcript.text.done", "text": event.reply.text, "usage": usage})
    except Exception as error:  # the status has been sent
        yield json.dumps({"type": "error", **make_error(error)[1]})


def _make_usage(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "type": "tokens",
        "input_tokens": usage.total,
        "input_token_details": {"text_tokens": usage.text, "audio_tokens": usage.audio},
        "output_tokens": len(reply.token_ids),
        "total_tokens": usage.total + len(reply.token_ids),
    }
