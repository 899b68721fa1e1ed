"""OpenAI's chat completions: the body of a request, and the body of the answer."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import urllib.parse
import urllib.request
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.engine.outputs import Options, Reply
from omni_jax.engine.talker_engine import TalkerParams
from omni_jax.errors import InputError
from omni_jax.processing.chat import MediaPart, Message, parse_messages
from omni_jax.processing.files import is_within, join_path, resolve_path
from omni_jax.processing.sources import describe_source
from omni_jax.serving.wav import pcm16

AUDIO_FORMATS = ("wav", "pcm16")

# what a body may hold that changes nothing: there is one model, and nobody is billed
_IGNORED = ("model", "user", "metadata")
_THINKER = ("max_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "stop_token_ids")
_MEDIA = {"image": ("min_pixels", "max_pixels"), "video": ("use_audio_in_video", "fps", "min_pixels", "max_pixels")}
_EXPIRES = 24 * 3600  # seconds; OpenAI's field says until when it keeps sound, which is in the answer here


@dataclass(frozen=True)
class ChatRequest:
    """A body that was found right.

    Attributes:
      messages: what is asked.
      options: how it is to be answered.
      audio_format: of the speech.
      return_token_ids: whether the answer is to hold the ids of text and speech.
    """

    messages: tuple[Message, ...]
    options: Options
    audio_format: str = "wav"
    return_token_ids: bool = False


def read_body(body: Any) -> ChatRequest:
    """Reads the body of a chat completion.

    Args:
      body: OpenAI's ``messages``, ``modalities``, ``audio``, ``max_completion_tokens`` or ``max_tokens``,
        ``temperature``, ``top_p``, ``seed``, ``stop``, ``n`` (1); and of vLLM's ``top_k``, ``repetition_penalty``,
        ``stop_token_ids``, ``mm_processor_kwargs``, ``return_token_ids`` and ``sampling_params_list``, whose parts are
        for the Thinker, the Talker and Token2Wav.

    Raises:
      InputError: for anything else, and for a value that cannot be used.
    """
    if not isinstance(body, Mapping):
        raise InputError(f"body must be an object, got {type(body).__name__}")
    given = {name: value for name, value in body.items() if value is not None}
    unknown = sorted(set(given) - set(_READ) - set(_IGNORED))
    if unknown:
        raise InputError(f"body: unknown field {', '.join(unknown)}; known: {', '.join([*_READ, *_IGNORED])}")
    if "messages" not in given:
        raise InputError("body: messages is missing")
    options: dict[str, Any] = {}
    for name in _READ:  # in this order, so that sampling_params_list goes before what stands beside it
        if name in given:
            _READ[name](given[name], options)
    messages = _with_media_options(parse_messages(given["messages"]), options.pop("media", {}))
    audio_format = options.pop("audio_format", None)
    ids = options.pop("return_token_ids", False)
    chosen = Options.create(**options)
    if audio_format is not None and not chosen.speaks:
        raise InputError('body: audio was given, but modalities does not have "audio"')
    return ChatRequest(messages, chosen, audio_format or AUDIO_FORMATS[0], ids)


def _fields(value: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
    """The fields of an object that are not null."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object, got {type(value).__name__}")
    unknown = sorted(map(str, set(value) - set(known)))
    if unknown:
        raise InputError(f"{where}: unknown field {', '.join(unknown)}; known: {', '.join(known) or 'none'}")
    return {name: item for name, item in value.items() if item is not None}


def _messages(value: Any, options: dict[str, Any]) -> None:
    """Read at the end, when it is known what holds for all media."""


def _sampling_params(value: Any, options: dict[str, Any]) -> None:
    if not isinstance(value, list) or len(value) > 3:
        raise InputError("body: sampling_params_list must be a list of up to three: Thinker, Talker, Token2Wav")
    talk = [f.name for f in dataclasses.fields(TalkerParams)]
    for i, (part, known) in enumerate(zip(value, (_THINKER, talk, ("seed",)), strict=False)):
        fields = _fields({} if part is None else part, f"body: sampling_params_list[{i}]", known)
        if i == 0:
            options |= {name: _option(name, item) for name, item in fields.items()}
        elif i == 1:
            for name, item in fields.items():
                _check_number(f"sampling_params_list[1].{name}", item, whole=name not in _FRACTIONS)
            options["talker"] = fields
        elif "seed" in fields:
            options["noise_seed"] = fields["seed"]


_FRACTIONS = ("temperature", "top_p", "repetition_penalty")


def _check_number(name: str, value: Any, *, whole: bool) -> Any:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"body: {name} is {value!r}; it must be a {'whole ' if whole else ''}number")
    return value


def _option(name: str, value: Any) -> Any:
    """A field of the Thinker's, checked as far as ``Options`` relies on it."""
    if name == "stop":
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
            raise InputError(f"body: stop is {value!r}; it must be a string or a list of strings")
        return tuple(stops)
    if name == "stop_token_ids":
        if not isinstance(value, list):
            raise InputError(f"body: stop_token_ids is {value!r}; it must be a list of whole numbers")
        return tuple(_check_number(name, item, whole=True) for item in value)
    return _check_number(name, value, whole=name not in _FRACTIONS)


def _plain(name: str, option: str | None = None) -> Callable[[Any, dict[str, Any]], None]:
    def read(value: Any, options: dict[str, Any]) -> None:
        options[option or name] = _option(option or name, value)

    return read


def _modalities(value: Any, options: dict[str, Any]) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InputError(f'body: modalities is {value!r}; it must be ["text"] or ["text", "audio"]')
    options["modalities"] = tuple(value)


def _audio(value: Any, options: dict[str, Any]) -> None:
    fields = _fields(value, "body: audio", ("voice", "format"))
    kind, voice = fields.get("format", AUDIO_FORMATS[0]), fields.get("voice")
    if kind not in AUDIO_FORMATS:
        raise InputError(f"body: audio.format is {kind!r}; it must be one of {', '.join(AUDIO_FORMATS)}")
    if isinstance(voice, Mapping):
        voice = voice.get("id")
    if voice is not None and not isinstance(voice, str):
        raise InputError(f"body: audio.voice is {voice!r}; it must be a name")
    options |= {"audio_format": kind} | ({} if voice is None else {"voice": voice})


def _media_options(value: Any, options: dict[str, Any]) -> None:
    names = sorted({name for names in _MEDIA.values() for name in names})
    options["media"] = _fields(value, "body: mm_processor_kwargs", names)


def _flag(name: str) -> Callable[[Any, dict[str, Any]], None]:
    def read(value: Any, options: dict[str, Any]) -> None:
        if not isinstance(value, bool):
            raise InputError(f"body: {name} is {value!r}; it must be true or false")
        options[name] = value

    return read


def _only(name: str, wanted: Any, why: str) -> Callable[[Any, dict[str, Any]], None]:
    def read(value: Any, options: dict[str, Any]) -> None:
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise InputError(f"body: {name} is {value!r}; {why}")

    return read


_READ: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "messages": _messages,
    "sampling_params_list": _sampling_params,
    "modalities": _modalities,
    "audio": _audio,
    "max_tokens": _plain("max_tokens"),
    "max_completion_tokens": _plain("max_completion_tokens", "max_tokens"),
    **{name: _plain(name) for name in _THINKER if name != "max_tokens"},
    "mm_processor_kwargs": _media_options,
    "return_token_ids": _flag("return_token_ids"),
    "n": _only("n", 1, "there is one answer to each request"),
    "stream": _only("stream", False, "answers of a file are not streamed"),
}


def _with_media_options(messages: Sequence[Message], options: Mapping[str, Any]) -> tuple[Message, ...]:
    """Gives every picture and video the options that the request has for all of them, unless it has its own."""
    if not options:
        return tuple(messages)
    checked = {}
    for kind, names in _MEDIA.items():  # as if they stood in the part, so that a wrong one is found
        own = {name: options[name] for name in names if name in options}
        (message,) = parse_messages([{"role": "user", "content": [{"type": kind, kind: "?", **own}]}])
        checked[kind] = message.media[0].options
    return _each(messages, lambda p: dataclasses.replace(p, options={**checked.get(p.kind, {}), **p.options}))


def _each(messages: Sequence[Message], change: Callable[[MediaPart], MediaPart]) -> tuple[Message, ...]:
    def changed(message: Message) -> Message:
        if isinstance(message.content, str):
            return message
        return Message(message.role, tuple(change(p) if isinstance(p, MediaPart) else p for p in message.content))

    return tuple(map(changed, messages))


def confine(messages: Sequence[Message], folder: str, root: str) -> tuple[Message, ...]:
    """Takes paths of media from a folder, and none that is_main_process out of another.

    Args:
      messages: paths and file: URLs in them are of this machine.
      folder: that relative paths are taken from, a path or a ``gs://`` URL.
      root: within which files must lie, links followed; likewise.

    Raises:
      InputError: for a file outside of it.
    """
    root = resolve_path(root)

    def placed(source: Any, where: str) -> Any:
        if isinstance(source, list | tuple):
            return [placed(item, where) for item in source]
        if not isinstance(source, str) or re.match(r"(?i)(data|https?|gs):", source):
            return source
        name = urllib.request.url2pathname(urllib.parse.urlsplit(source).path) if source.startswith("file:") else source
        try:
            path = resolve_path(join_path(folder, name))
        except (OSError, ValueError) as e:
            raise InputError(f"{where}: {describe_source(source)} is not a path that can be read: {e}") from e
        if not is_within(path, root):
            raise InputError(
                f"{where}: {describe_source(source)} is not within {root}; --media-root names another folder"
            )
        return path

    return _each(messages, lambda part: dataclasses.replace(part, source=placed(part.source, part.where)))


def sound_bytes(samples: np.ndarray, rate: int, kind: str) -> bytes:
    """Speech as a file of one of ``AUDIO_FORMATS``; float32 [n] from -1 to 1."""
    if kind == "pcm16":
        return pcm16(samples)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(pcm16(samples))
    return file.getvalue()


def answer_body(
    request: ChatRequest, reply: Reply, name: str, model: str, now: int, path: str | None
) -> dict[str, Any]:
    """The body of an answer.

    Args:
      request: what was asked.
      reply: the answer.
      name: of the request, for ids.
      model: the name of the model.
      now: seconds since 1970.
      path: of the file that the speech is in; it is in the body if None.
    """
    message: dict[str, Any] = {"role": "assistant", "content": reply.text}
    if reply.audio is not None:
        audio: dict[str, Any] = {"id": f"audio-{name}", "expires_at": now + _EXPIRES, "transcript": reply.text}
        if path is None:
            data = sound_bytes(reply.audio, reply.sample_rate, request.audio_format)
            audio["data"] = base64.b64encode(data).decode()
        else:
            audio["path"] = path
        if request.return_token_ids:
            audio["codec_ids"] = list(reply.codec_ids)
        message["audio"] = audio
    choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reply.finish_reason}
    if request.return_token_ids:
        choice["token_ids"] = list(reply.token_ids)
    usage, said, spoken = reply.usage, len(reply.token_ids), len(reply.codec_ids)
    return {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "created": now,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": usage.total,
            "completion_tokens": said + spoken,
            "total_tokens": usage.total + said + spoken,
            "prompt_tokens_details": {
                "audio_tokens": usage.audio,
                "image_tokens": usage.image,
                "video_tokens": usage.video,
                "cached_tokens": 0,
            },
            "completion_tokens_details": {"text_tokens": said, "audio_tokens": spoken},
        },
    }
