"""OpenAI's chat completions over HTTP: an answer as a whole, or its pieces as server-sent events."""

from __future__ import annotations

import base64
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from omni_jax.checks import check_names, shown
from omni_jax.engine.outputs import Event, Reply
from omni_jax.errors import InputError
from omni_jax.serving.chat_request import ChatRequest, parse_body
from omni_jax.serving.chat_response import EXPIRY_SECONDS, find_words, make_body, make_usage, make_words
from omni_jax.serving.engine_thread import ReplyStream, Timeline
from omni_jax.serving.http_errors import make_error
from omni_jax.serving.http_requests import EventStream, read_json, until_disconnected
from omni_jax.serving.service import Service
from omni_jax.serving.sound_formats import SoundStream


@dataclass(frozen=True)
class _Streaming:
    """How an answer is to be sent.

    Attributes:
      stream: whether in pieces.
      include_usage: whether a last piece is to say how many tokens there were.
    """

    stream: bool = False
    include_usage: bool = False


async def complete_chat(request: Request) -> Response:
    """POST /v1/chat/completions."""
    service: Service = request.app.state.service
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.admit())
        body = await read_json(request, service.spec.max_body_bytes)
        streaming = _take_streaming(body)
        chat = parse_chat(service, body)
        name = uuid.uuid4().hex
        if not streaming.stream:
            answer = await until_disconnected(request, service.answer_whole(chat))
            await find_words(chat, answer)
            service.transcripts.add(f"audio-{name}", answer.text)
            return JSONResponse(make_body(chat, answer, name, service.spec.model_name, int(time.time()), None))
        stream = await until_disconnected(request, service.answer(chat, live=True))
        # the place is given back when all pieces are sent
        events = _Chunks(service, chat, streaming, name).events(stream)
        return EventStream(events, stack.pop_all().close, stream.cancel)


def parse_chat(service: Service, body: dict[str, Any]) -> ChatRequest:
    """The request of a body, with the adapter that its model names, and the transcripts of sounds that it names.

    Raises:
      InputError: if it cannot be served.
      ModelNotFoundError: if there is no such model.
    """
    if "messages" in body:
        body = {**body, "messages": service.transcripts.fill_in(body["messages"])}
    chat = parse_body(body)
    return chat.with_options(service.choose_adapter(body.get("model"), chat.options))


def _take_streaming(body: dict[str, Any]) -> _Streaming:
    """Takes ``stream`` and ``stream_options`` out of a body.

    Raises:
      InputError: if they are wrong.
    """
    stream = body.pop("stream", None)
    options = body.pop("stream_options", None)
    if stream is None:
        stream = False
    if not isinstance(stream, bool):
        raise InputError(f"body: stream is {shown(stream)}; it must be true or false")
    if options is None:
        return _Streaming(stream)
    if not isinstance(options, dict):
        raise InputError(f"body: stream_options is {shown(options)}; it must be an object")
    # obfuscation hides the lengths of pieces from who reads along; TLS ends before this server
    check_names("field of stream_options", options, ("include_usage", "include_obfuscation"))
    include_usage = options.get("include_usage") or False
    if not isinstance(include_usage, bool):
        raise InputError(f"body: stream_options.include_usage is {shown(include_usage)}; it must be true or false")
    return _Streaming(stream, include_usage)


class _Chunks:
    """The chunks of one answer."""

    def __init__(self, service: Service, chat: ChatRequest, streaming: _Streaming, name: str):
        self._service = service
        self._chat = chat
        self._streaming = streaming
        self._name = name
        self._created = int(time.time())
        self._sound = SoundStream(chat.audio_format) if chat.options.speaks else None

    async def events(self, stream: ReplyStream) -> AsyncIterator[str]:
        """The data of each server-sent event."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            async for event in stream:
                for delta in self._make_deltas(event):
                    yield self._chunk(delta)
                if event.reply is not None:
                    await find_words(self._chat, event.reply)
                    for chunk in self._end(event.reply, stream.timeline):
                        yield chunk
        except Exception as error:  # the status has been sent, so the error comes as a piece
            yield json.dumps(make_error(error)[1])
            return
        yield "[DONE]"

    def _make_deltas(self, event: Event) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = []
        if event.text:
            delta: dict[str, Any] = {"content": event.text}
            # OpenAI has the text of a spoken answer here alone
            if self._sound is not None:
                delta["audio"] = {"id": self._audio_id, "transcript": event.text}
            deltas.append(delta)
        if event.audio is not None and self._sound is not None:
            audio = self._make_audio(self._sound.push(event.audio))
            # no field of OpenAI's: how long a player had better wait with the first sound
            if event.hold_back is not None:
                audio["hold_back"] = round(event.hold_back, 3)
            deltas.append({"audio": audio})
        return deltas

    def _end(self, reply: Reply, timeline: Timeline) -> list[str]:
        chunks = []
        ids: dict[str, Any] = {"token_ids": list(reply.token_ids)} if self._chat.return_token_ids else {}
        if self._sound is not None:
            self._service.transcripts.add(self._audio_id, reply.text)
            if last := self._sound.finish():
                chunks.append(self._chunk({"audio": self._make_audio(last)}))
            audio: dict[str, Any] = {"id": self._audio_id, "expires_at": self._created + EXPIRY_SECONDS}
            if self._chat.return_token_ids:
                audio["codec_ids"] = list(reply.codec_ids)
            if self._chat.word_timestamps:
                audio["words"] = make_words(reply)
            chunks.append(self._chunk({"audio": audio}))
        # no field of OpenAI's: when what was there, in seconds since the request came
        chunks.append(self._chunk({}, reply.finish_reason, **ids, timeline=timeline.describe()))
        if self._streaming.include_usage:
            chunks.append(self._dump([], make_usage(reply)))
        return chunks

    @property
    def _audio_id(self) -> str:
        return f"audio-{self._name}"

    def _make_audio(self, data: bytes) -> dict[str, Any]:
        return {"id": self._audio_id, "data": base64.b64encode(data).decode()}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        return self._dump([{"index": 0, "delta": delta, "finish_reason": finish_reason, **more}], None)

    def _dump(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> str:
        values = {
            "id": f"chatcmpl-{self._name}",
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._service.spec.model_name,
            "choices": choices,
        }
        if self._streaming.include_usage:
            values["usage"] = usage
        return json.dumps(values)
