"""OpenAI's text to speech: a text becomes the reply, and is spoken."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from omni_jax.checks import check_names, shown
from omni_jax.engine.outputs import Reply
from omni_jax.errors import InputError
from omni_jax.generation.options import Options
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT, parse_messages
from omni_jax.serving.chat_request import ChatRequest, parse_voice, read_yes_or_no
from omni_jax.serving.chat_response import find_words, make_words
from omni_jax.serving.engine_thread import ReplyStream
from omni_jax.serving.http_errors import make_error
from omni_jax.serving.http_requests import ByteStream, EventStream, read_json, until_disconnected
from omni_jax.serving.service import Service
from omni_jax.serving.sound_formats import CONTENT_TYPES, SoundStream

MAX_CHARACTERS = 4096  # of a text, as OpenAI has it
_FIELDS = (
    "model input voice response_format stream_format speed instructions ref_audio ref_text seed max_tokens "
    "temperature top_k top_p repetition_penalty word_timestamps"
).split()
_SAMPLING = ("seed", "max_tokens", "temperature", "top_k", "top_p", "repetition_penalty")
_FORMATS = {"pcm": "pcm16"} | {name: name for name in CONTENT_TYPES}
_STREAM_FORMATS = ("audio", "sse")


async def create_speech(request: Request) -> Response:
    """POST /v1/audio/speech."""
    service: Service = request.app.state.service
    with contextlib.ExitStack() as stack:
        stack.enter_context(service.admit())
        body = await read_json(request, service.spec.max_body_bytes)
        values = {name: value for name, value in body.items() if value is not None}
        check_names("field of the body", values, _FIELDS)
        stream_format = _choose(values, "stream_format", _STREAM_FORMATS)
        chat = _parse_speech(service, values)
        if chat.word_timestamps and stream_format != "sse":
            raise InputError('body: word_timestamps come as an event; ask for stream_format "sse" with them')
        stream = await until_disconnected(request, service.answer(chat, live=True))
        on_end = (stack.pop_all().close, stream.cancel)
        if stream_format == "sse":
            return EventStream(_events(stream, chat), *on_end)
        # the first piece is waited for, so that what goes wrong before it still has a status of its own
        pieces = _pieces(stream, chat.audio_format)
        try:
            first = await until_disconnected(request, anext(pieces, b""))
        except BaseException:
            for function in on_end:
                function()
            raise
        return ByteStream(_join(first, pieces), CONTENT_TYPES[chat.audio_format], *on_end)


def _parse_speech(service: Service, values: dict[str, Any]) -> ChatRequest:
    """The request whose reply is the text of a body.

    Raises:
      InputError: for a value that cannot be used.
      ModelNotFoundError: if there is no such model.
    """
    text = values.get("input")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"body: input is {shown(text)}; it must be the text that is to be spoken")
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"body: input has {len(text)} characters; at most {MAX_CHARACTERS} are taken")
    for name, neutral in (("speed", 1), ("instructions", "")):
        if name in values and (values[name] != neutral or isinstance(values[name], bool)):
            raise InputError(f"body: {name} is {shown(values[name])}; only {neutral!r} is supported")
    talker = {name: values[name] for name in _SAMPLING if name in values}
    options = Options.create(
        modalities=("text", "audio"),
        voice=_parse_voice(values),
        reply_text=text,
        talker=talker,
        noise_seed=values.get("seed"),
    )
    messages = parse_messages([{"role": "system", "content": SPEECH_SYSTEM_PROMPT}])
    sound_format = _FORMATS[_choose(values, "response_format", ("mp3", *_FORMATS))]
    word_timestamps = read_yes_or_no(values.get("word_timestamps", False), "word_timestamps")
    options = service.choose_adapter(values.get("model"), options)
    return ChatRequest(messages, options, sound_format, word_timestamps=word_timestamps)


def _parse_voice(values: dict[str, Any]) -> Any:
    if "ref_audio" not in values:
        if "ref_text" in values:
            raise InputError("body: ref_text is what a clip says; give the clip too, ref_audio")
        return parse_voice(values.get("voice"), "voice")
    clip = {"ref_audio": values["ref_audio"], "ref_text": values.get("ref_text"), "like": values.get("voice")}
    return parse_voice(clip, "voice")


def _choose(values: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = values.get(name, known[0])
    if not isinstance(value, str) or value not in known:
        raise InputError(f"body: {name} is {shown(value)}; it must be one of {', '.join(dict.fromkeys(known))}")
    return value


async def _pieces(stream: ReplyStream, sound_format: str) -> AsyncIterator[bytes]:
    """The bytes of a file as they are made."""
    sound = SoundStream(sound_format)
    async for event in stream:
        if event.audio is not None and (data := sound.push(event.audio)):
            yield data
    if last := sound.finish():
        yield last


async def _join(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


async def _events(stream: ReplyStream, chat: ChatRequest) -> AsyncIterator[str]:
    """The data of OpenAI's events of speech; the last one has the times of words too, where they were asked for."""
    sound = SoundStream(chat.audio_format)
    try:
        async for event in stream:
            data = b"" if event.audio is None else sound.push(event.audio)
            if event.reply is not None:
                data += sound.finish()
            if data:
                yield json.dumps({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
            if event.reply is not None:
                await find_words(chat, event.reply)
                done = {"type": "speech.audio.done", "usage": _make_usage(event.reply)}
                yield json.dumps(done | ({"words": make_words(event.reply)} if chat.word_timestamps else {}))
    except Exception as error:  # the status has been sent
        yield json.dumps({"type": "error", **make_error(error)[1]})


def _make_usage(reply: Reply) -> dict[str, int]:
    num_text = len(reply.token_ids)
    num_codes = len(reply.codec_ids)
    return {"input_tokens": num_text, "output_tokens": num_codes, "total_tokens": num_text + num_codes}
