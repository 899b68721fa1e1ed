"""Messages to text and media: OpenAI's chat parts, Hugging Face's, and the template that puts them in ChatML."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jinja2
import jinja2.sandbox

from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.sources import decode_base64

REPLY_HEADER = "<|im_start|>assistant\n"
"""What ChatML writes before a reply."""

SPEECH_SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
"""The system prompt that speech was trained with; under another one the model may speak badly or not at all."""

BUILT_IN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part.type == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part.type == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ROLES = ("system", "user", "assistant")
LOW_DETAIL_PIXELS = 512 * 512  # what OpenAI's detail "low" asks for

Kind: TypeAlias = Literal["image", "audio", "video"]


@dataclass(frozen=True)
class TextPart:
    text: str


@dataclass(frozen=True)
class MediaPart:
    kind: Kind
    source: Any  # what the user named; omni_jax.processing.media knows what to do with it
    where: str  # place in the request, for messages
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    role: str
    content: str | tuple[TextPart | MediaPart, ...]

    @property
    def media(self) -> tuple[MediaPart, ...]:
        return tuple(part for part in self.content if isinstance(part, MediaPart))


def parse_messages(messages: Sequence[Mapping[str, Any]] | Sequence[Message]) -> tuple[Message, ...]:
    """Reads a request's messages; such as have been read before are returned as they are.

    Raises:
      InputError: for an unknown role, part, key or value; it names the place, what was given and what is known.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise InputError(f"messages must be a list of at least one message, got {_short(messages)}")
    return tuple(m if isinstance(m, Message) else _message(m, f"messages[{i}]") for i, m in enumerate(messages))


def _message(message: Any, where: str) -> Message:
    _known_keys(message, ("role", "content"), where)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise InputError(f"{where}: unknown role {role!r}; known: {', '.join(ROLES)}")
    if isinstance(content, str):
        return Message(role, content)
    if not isinstance(content, list | tuple):
        raise InputError(f"{where}: content must be a string or a list of parts, got {_short(content)}")
    return Message(role, tuple(_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)))


def _part(part: Any, where: str) -> TextPart | MediaPart:
    if not isinstance(part, Mapping):
        raise InputError(f"{where} must be an object with a type, got {_short(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(f"{where}: unknown type {kind!r}; known: {', '.join(_READERS)}")
    return _READERS[kind](part, where)


def _text_part(part: Mapping[str, Any], where: str) -> TextPart:
    _known_keys(part, ("type", "text"), where)
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: text must be a string, got {_short(part.get('text'))}")
    return TextPart(part["text"])


def _media_part(kind: Kind) -> Callable[[Mapping[str, Any], str], MediaPart]:
    """Hugging Face's parts: ``{"type": "image", "image": source}``; the source may also stand under url or path."""

    def read(part: Mapping[str, Any], where: str) -> MediaPart:
        names = (kind, "url", "path")
        _known_keys(part, ("type", *names, *_OPTIONS[kind]), where)
        given = [name for name in names if part.get(name) is not None]
        if len(given) != 1:
            raise InputError(f"{where}: give the {kind} once, under {' or '.join(names)}; given: {given or 'nothing'}")
        return MediaPart(kind, part[given[0]], where, _options(part, kind, where))

    return read


def _url_part(kind: Kind) -> Callable[[Mapping[str, Any], str], MediaPart]:
    """OpenAI's parts and their like: ``{"type": "image_url", "image_url": {"url": ...}}``, or the URL alone."""
    name = f"{kind}_url"

    def read(part: Mapping[str, Any], where: str) -> MediaPart:
        _known_keys(part, ("type", name, *_OPTIONS[kind]), where)
        value, options = part.get(name), _options(part, kind, where)
        if isinstance(value, Mapping):
            _known_keys(value, ("url", "detail") if kind == "image" else ("url",), f"{where}.{name}")
            options = _detail(value.get("detail", "auto"), f"{where}.{name}") | options
            value = value.get("url")
        if not isinstance(value, str):
            raise InputError(f"{where}.{name} must be a URL or an object with a url, got {_short(value)}")
        return MediaPart(kind, value, where, options)

    return read


def _detail(detail: Any, where: str) -> dict[str, Any]:
    if detail not in ("auto", "low", "high"):
        raise InputError(f"{where}: unknown detail {detail!r}; known: auto, low, high")
    return {"max_pixels": LOW_DETAIL_PIXELS} if detail == "low" else {}


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm")


def _input_audio_part(part: Mapping[str, Any], where: str) -> MediaPart:
    _known_keys(part, ("type", "input_audio", *_OPTIONS["audio"]), where)
    value = part.get("input_audio")
    _known_keys(value, ("data", "format"), f"{where}.input_audio")
    assert isinstance(value, Mapping)
    data, kind = value.get("data"), value.get("format", "wav")
    if kind not in AUDIO_FORMATS:
        raise InputError(f"{where}.input_audio: unknown format {kind!r}; known: {', '.join(AUDIO_FORMATS)}")
    if isinstance(data, str) and not data.startswith("data:"):
        data = decode_base64(data, f"{where}.input_audio.data")
    if not isinstance(data, str | bytes):
        raise InputError(f"{where}.input_audio: data must be base64, got {_short(data)}")
    return MediaPart("audio", data, where, _options(part, "audio", where))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: Any) -> bool:
    return _number(value) and value == int(value) and value > 0


# what an option must be, and how to say so
_POSITIVE_WHOLE = (_whole, "a whole number over 0")
_SECONDS = (lambda v: _number(v) and v >= 0, "a number of seconds, 0 or more")
_RATE = (lambda v: _number(v) and v > 0, "a number over 0")
_SOUND = (lambda v: isinstance(v, bool) or v == "auto", 'true, false or "auto"')
_PIXELS = {"min_pixels": _POSITIVE_WHOLE, "max_pixels": _POSITIVE_WHOLE}

_OPTIONS: dict[str, Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "image": _PIXELS,
    "audio": {"audio_start": _SECONDS, "audio_end": _SECONDS, "sampling_rate": _POSITIVE_WHOLE},
    "video": {
        "use_audio_in_video": _SOUND,
        "fps": _RATE,
        "nframes": _POSITIVE_WHOLE,
        "video_start": _SECONDS,
        "video_end": _SECONDS,
        **_PIXELS,
    },
}


def _options(part: Mapping[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """The options of a media part, checked one by one and together; None is as good as none."""
    options = {name: part[name] for name in _OPTIONS[kind] if part.get(name) is not None}
    for name, value in options.items():
        valid, description = _OPTIONS[kind][name]
        if not valid(value):
            raise InputError(f"{where}: {name} must be {description}, got {value!r}")
    if "fps" in options and "nframes" in options:
        raise InputError(f"{where}: fps and nframes both say how many frames to take; give one of them")
    begin, end = options.get(f"{kind}_start", 0.0), options.get(f"{kind}_end", math.inf)
    if begin >= end:
        raise InputError(f"{where}: {kind}_start {begin} is not before {kind}_end {end}")
    if options.get("min_pixels", 0) > options.get("max_pixels", math.inf):
        raise InputError(f"{where}: min_pixels {options['min_pixels']} is over max_pixels {options['max_pixels']}")
    return options


_READERS: dict[str, Callable[[Mapping[str, Any], str], TextPart | MediaPart]] = {
    "text": _text_part,
    "image_url": _url_part("image"),
    "input_audio": _input_audio_part,
    "audio_url": _url_part("audio"),
    "video_url": _url_part("video"),
    "image": _media_part("image"),
    "audio": _media_part("audio"),
    "video": _media_part("video"),
}


def _known_keys(value: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object with {', '.join(known)}, got {_short(value)}")
    for key in value:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r} (value {_short(value[key])}); known: {', '.join(known)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}... ({type(value).__name__})"


class ChatTemplate:
    """Puts messages into the text that the model was trained on, and knows which of it a user wrote."""

    def __init__(self, source: str, where: str = "the chat template") -> None:
        self._made_of = (source, where)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = self._refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise CheckpointError(f"{where} is not a template: {e}") from e

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Compiled templates cannot be sent to another process; their sources can."""
        return ChatTemplate, self._made_of

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint: chat_template.jinja, chat_template.json or tokenizer_config.json, else our own.

        Raises:
          CheckpointError: if one of these files cannot be read.
        """
        plain = folder / "chat_template.jinja"
        if plain.exists():
            return cls(plain.read_text(encoding="utf-8"), str(plain))
        for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            try:
                source = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.exists() else None
            except (json.JSONDecodeError, AttributeError) as e:
                raise CheckpointError(f"{path} is not a JSON object: {e}") from e
            if isinstance(source, str):
                return cls(source, str(path))
        return cls(BUILT_IN_TEMPLATE)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether the template wrote it (True) or the user (False).

        The template never sees what a user wrote, but a random word in its place: so nothing in it can be taken for
        markup.
        """
        salt = secrets.token_hex(16)
        written: list[str] = []

        def stand_in(text: str) -> str:
            written.append(text)
            return f"{salt}.{len(written) - 1}."

        plain = [{"role": m.role, "content": _template_content(m, stand_in)} for m in messages]
        try:
            text = self._template.render(messages=plain, add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as e:
            raise InputError(f"the chat template refuses these messages: {e}") from e
        pieces = re.split(rf"{salt}\.(\d+)\.", text)
        return [(written[int(piece)], False) if i % 2 else (piece, True) for i, piece in enumerate(pieces)]

    @staticmethod
    def _refuse(message: str) -> None:
        raise jinja2.TemplateError(message)


def _template_content(message: Message, stand_in: Callable[[str], str]) -> str | list[dict[str, str]]:
    if isinstance(message.content, str):
        return stand_in(message.content)

    def plain(part: TextPart | MediaPart) -> dict[str, str]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": stand_in(part.text)}
        return {"type": part.kind, part.kind: ""}

    return [plain(part) for part in message.content]


def split_at_replies(pieces: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Cuts what ``ChatTemplate.render`` gives after each header of a reply.

    Encoded one by one, the parts have a reply begin at a token of its own, as it does when it is generated; in one text
    a line break that a reply begins with would melt into the header's.
    """
    parts: list[list[tuple[str, bool]]] = [[]]
    for text, trusted in pieces:
        *headers, rest = text.split(REPLY_HEADER) if trusted else [text]
        for before in headers:
            parts[-1].append((before + REPLY_HEADER, True))
            parts.append([])
        parts[-1].append((rest, trusted))
    return parts
