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
import jinja2.runtime

from omni_jax.checks import check_float, check_int, shown
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import has_file, read_file, read_object
from omni_jax.processing import template_sandbox
from omni_jax.processing.sources import decode_base64
from omni_jax.processing.tokenizer import replace_surrogates

REPLY_HEADER = "<|im_start|>assistant\n"
"""What ChatML writes before a reply."""

SPEECH_SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory and "
    "visual inputs, as well as generating text and speech."
)
"""The system prompt that speech was trained with; under another one the model may speak badly or not at all."""

MEDIA_MARKUP = {
    "image": "<|vision_bos|><|IMAGE|><|vision_eos|>",
    "audio": "<|audio_bos|><|AUDIO|><|audio_eos|>",
    "video": "<|vision_bos|><|VIDEO|><|vision_eos|>",
}
"""What stands for media in a prompt, by their kind."""

# for folders without a template: ChatML, and a system message in front if the dialogue has none
BUILT_IN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    f"{{% if part.type == 'image' %}}{MEDIA_MARKUP['image']}"
    f"{{% elif part.type == 'audio' %}}{MEDIA_MARKUP['audio']}"
    f"{{% elif part.type == 'video' %}}{MEDIA_MARKUP['video']}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ROLES = ("system", "user", "assistant")
LOW_DETAIL_PIXELS = 512 * 512  # what OpenAI's detail "low" asks for
MAX_SECONDS = 1e9  # of a place in a medium: far beyond any, and still whole nanoseconds in 64 bits
MAX_FPS = 1000.0
_MAX_INDENT = 16  # characters, of JSON
_MAX_REPEATS = 8  # how often a template may write what a user wrote, on average
SAMPLING_RATES = (1_000, 1_000_000)  # Hz, of an array of samples; beyond these, resampling costs without end

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
        raise InputError(f"messages must be a list of at least one message, got {shown(messages)}")
    parsed = []
    for i, message in enumerate(messages):
        parsed.append(message if isinstance(message, Message) else _parse_message(message, f"messages[{i}]"))
    return tuple(parsed)


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be an object with role, content, got {shown(message)}")
    # an answer that is sent back has empty fields for all that it might have held
    message = {key: value for key, value in message.items() if key == "content" or value not in ([], None)}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: unknown role {shown(role)}; known: {', '.join(ROLES)}")
    # only an answer that is sent back has its sound beside its text
    _check_keys(message, ("role", "content", "audio") if role == "assistant" else ("role", "content"), where)
    content = message.get("content")
    if "audio" in message:
        # OpenAI's content is null where an answer was spoken: its text is the transcript
        transcript = _read_transcript(message["audio"], f"{where}.audio")
        content = transcript if content is None else content
    if isinstance(content, str):
        return Message(role, replace_surrogates(content))
    if not isinstance(content, list | tuple):
        raise InputError(f"{where}: content must be a string or a list of parts, got {shown(content)}")
    return Message(role, tuple(_parse_part(part, f"{where}.content[{j}]") for j, part in enumerate(content)))


def _read_transcript(audio: Any, where: str) -> str | None:
    """The text of an answer that was spoken, as this and OpenAI's models write it; its sound is not heard again."""
    _check_keys(audio, ("id", "expires_at", "transcript", "data", "path", "codec_ids"), where)
    transcript = audio.get("transcript")
    if transcript is not None and not isinstance(transcript, str):
        raise InputError(f"{where}: transcript must be a string, got {shown(transcript)}")
    return transcript


def _parse_part(part: Any, where: str) -> TextPart | MediaPart:
    if not isinstance(part, Mapping):
        raise InputError(f"{where} must be an object with a type, got {shown(part)}")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _READERS:
        raise InputError(f"{where}: unknown type {shown(kind)}; known: {', '.join(_READERS)}")
    return _READERS[kind](part, where)


def _parse_text(part: Mapping[str, Any], where: str) -> TextPart:
    _check_keys(part, ("type", "text"), where)
    if not isinstance(part.get("text"), str):
        raise InputError(f"{where}: text must be a string, got {shown(part.get('text'))}")
    return TextPart(replace_surrogates(part["text"]))


def _make_media_reader(kind: Kind) -> Callable[[Mapping[str, Any], str], MediaPart]:
    """Hugging Face's parts: ``{"type": "image", "image": source}``; the source may also stand under url or path."""

    def read(part: Mapping[str, Any], where: str) -> MediaPart:
        # which of them a data set uses depends on its age
        names = (kind, "url", "path")
        _check_keys(part, ("type", *names, *_OPTIONS[kind]), where)
        given = [name for name in names if part.get(name) is not None]
        if len(given) != 1:
            raise InputError(f"{where}: give the {kind} once, under {' or '.join(names)}; given: {given or 'nothing'}")
        return MediaPart(kind, part[given[0]], where, _read_options(part, kind, where))

    return read


def _make_url_reader(kind: Kind) -> Callable[[Mapping[str, Any], str], MediaPart]:
    """OpenAI's parts and their like: ``{"type": "image_url", "image_url": {"url": ...}}``, or the URL alone."""
    name = f"{kind}_url"

    def read(part: Mapping[str, Any], where: str) -> MediaPart:
        _check_keys(part, ("type", name, *_OPTIONS[kind]), where)
        value = part.get(name)
        options = _read_options(part, kind, where)
        if isinstance(value, Mapping):
            _check_keys(value, ("url", "detail") if kind == "image" else ("url",), f"{where}.{name}")
            # a max_pixels beside it says more exactly what is wanted, and is stronger
            options = _parse_detail(value.get("detail") or "auto", f"{where}.{name}") | options
            value = value.get("url")
        if not isinstance(value, str):
            raise InputError(f"{where}.{name} must be a URL or an object with a url, got {shown(value)}")
        return MediaPart(kind, value, where, options)

    return read


def _parse_detail(detail: Any, where: str) -> dict[str, Any]:
    if not isinstance(detail, str) or detail not in ("auto", "low", "high"):
        raise InputError(f"{where}: unknown detail {shown(detail)}; known: auto, low, high")
    return {"max_pixels": LOW_DETAIL_PIXELS} if detail == "low" else {}


AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "m4a", "aac", "webm")


def _parse_input_audio(part: Mapping[str, Any], where: str) -> MediaPart:
    _check_keys(part, ("type", "input_audio", *_OPTIONS["audio"]), where)
    value = part.get("input_audio")
    _check_keys(value, ("data", "format"), f"{where}.input_audio")
    assert isinstance(value, Mapping)
    data = value.get("data")
    kind = value.get("format") or "wav"
    if not isinstance(kind, str) or kind not in AUDIO_FORMATS:
        raise InputError(f"{where}.input_audio: unknown format {shown(kind)}; known: {', '.join(AUDIO_FORMATS)}")
    # some clients put a data: URL where OpenAI has bare base64; the decoder finds the true format in the bytes
    if isinstance(data, str) and not data.startswith("data:"):
        data = decode_base64(data, f"{where}.input_audio.data")
    if not isinstance(data, str | bytes):
        raise InputError(f"{where}.input_audio: data must be base64, got {shown(data)}")
    return MediaPart("audio", data, where, _read_options(part, "audio", where))


def _check_positive(name: str, value: Any) -> int:
    return check_int(name, value, 1)


def _check_seconds(name: str, value: Any) -> float:
    return check_float(name, value, 0, MAX_SECONDS, hint="seconds")


def _check_fps(name: str, value: Any) -> float:
    return check_float(name, value, 0, MAX_FPS, above=True)


def _check_sampling_rate(name: str, value: Any) -> int:
    return check_int(name, value, *SAMPLING_RATES, hint="Hz")


def _check_use_audio(name: str, value: Any) -> bool | str:
    if isinstance(value, bool) or (isinstance(value, str) and value == "auto"):
        return value
    raise InputError(f'{name} is {shown(value)}; it must be true, false or "auto"')


_PIXELS = {"min_pixels": _check_positive, "max_pixels": _check_positive}
_OPTIONS: dict[str, Mapping[str, Callable[[str, Any], Any]]] = {
    "image": _PIXELS,
    "audio": {
        "audio_start": _check_seconds,
        "audio_end": _check_seconds,
        "sampling_rate": _check_sampling_rate,
    },
    "video": {
        "use_audio_in_video": _check_use_audio,
        "fps": _check_fps,
        "nframes": _check_positive,
        "video_start": _check_seconds,
        "video_end": _check_seconds,
        **_PIXELS,
    },
}


def _read_options(part: Mapping[str, Any], kind: Kind, where: str) -> dict[str, Any]:
    """The options of a media part, checked one by one and together; None is as good as none."""
    options: dict[str, Any] = {}
    for name, check in _OPTIONS[kind].items():
        if part.get(name) is not None:
            options[name] = check(f"{where}: {name}", part[name])
    if "fps" in options and "nframes" in options:
        raise InputError(f"{where}: fps and nframes both say how many frames to take; give one of them")
    start = options.get(f"{kind}_start", 0.0)
    end = options.get(f"{kind}_end", math.inf)
    if start >= end:
        raise InputError(f"{where}: {kind}_start {start:g} is not before {kind}_end {end:g}")
    if options.get("min_pixels", 0) > options.get("max_pixels", math.inf):
        raise InputError(f"{where}: min_pixels {options['min_pixels']} is over max_pixels {options['max_pixels']}")
    return options


_READERS: dict[str, Callable[[Mapping[str, Any], str], TextPart | MediaPart]] = {
    "text": _parse_text,
    "image_url": _make_url_reader("image"),
    "input_audio": _parse_input_audio,
    "audio_url": _make_url_reader("audio"),
    "video_url": _make_url_reader("video"),
    "image": _make_media_reader("image"),
    "audio": _make_media_reader("audio"),
    "video": _make_media_reader("video"),
}


def _check_keys(value: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be an object with {', '.join(known)}, got {shown(value)}")
    for key in value:
        if key not in known and value[key] is not None:  # a field that is null says nothing, whatever its name
            raise InputError(
                f"{where}: unknown key {shown(key)} (value {shown(value[key])}); known: {', '.join(known)}"
            )


class ChatTemplate:
    """Puts messages into the text that the model was trained on, and knows which of it a user wrote.

    Templates have what transformers gives them: ``raise_exception``, ``strftime_now``, a ``tojson`` that escapes
    nothing for HTML, and ``{% generation %}``.
    """

    def __init__(self, source: str, where: str = "the chat template") -> None:
        self._source = source
        self._where = where
        # a template comes with a checkpoint, from anywhere, and is a program
        environment = template_sandbox.Environment()
        environment.filters["tojson"] = _to_json
        if len(source) > template_sandbox.MAX_SOURCE:
            raise CheckpointError(
                f"{where} has {len(source):,} characters; a template may have {template_sandbox.MAX_SOURCE:,}"
            )
        try:
            self._template = environment.from_string(source)
        except Exception as e:  # its own errors, and those of Python, whose code it becomes: blocks nested too deeply
            raise CheckpointError(f"{where} is not a template: {e}") from e

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        """Compiled templates cannot be sent to another process; their sources can."""
        return ChatTemplate, (self._source, self._where)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate:
        """The template of a checkpoint: chat_template.jinja, chat_template.json or tokenizer_config.json, else our own.

        Raises:
          CheckpointError: if one of these files cannot be read.
        """
        plain = folder / "chat_template.jinja"
        if has_file(plain):
            try:
                return cls(read_file(plain).decode(), str(plain))
            except OSError as e:
                raise CheckpointError(f"cannot read {plain}: {e.strerror}") from e
            except UnicodeDecodeError as e:
                raise CheckpointError(f"{plain} is not UTF-8: {e}") from e
        for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
            source = read_object(path).get("chat_template") if has_file(path) else None
            if isinstance(source, str):
                return cls(source, str(path))
        return cls(BUILT_IN_TEMPLATE)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether the template wrote it (True) or the user (False).

        The template never sees what a user wrote, but a random word in its place: so nothing in it can be taken for
        markup.

        Raises:
          InputError: if the template refuses the messages, or fails.
        """
        stand_ins = _StandIns()
        values = {
            "messages": [_template_message(message, stand_ins) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            _STAND_INS: stand_ins,
        }
        try:
            text = template_sandbox.render(self._template, values)
            # words are looked for here too: a template may have made some that stand for nothing
            return stand_ins.split(text)
        except InputError:
            raise
        except template_sandbox.TemplateLimitError as e:
            raise InputError(f"the chat template asks for too much: {e}") from e
        except jinja2.TemplateError as e:
            raise InputError(f"the chat template refuses these messages: {e}") from e
        except Exception as e:  # a template is a program, and may fail like one
            raise InputError(f"the chat template fails at these messages: {type(e).__name__}: {e}") from e


_STAND_INS = "_stand_ins"  # the variable that filters find them in


class _StandIns:
    """Random words that stand for pieces of text while a template works."""

    def __init__(self) -> None:
        # random, so that nothing that a user writes can pass for one of these words
        self._salt = secrets.token_hex(16)
        self._pattern = re.compile(rf"{self._salt}\.(\d+)\.")
        self._pieces: list[tuple[str, bool]] = []  # with whether it is markup

    def add(self, text: str, *, is_markup: bool = False) -> str:
        """The word that stands for a text."""
        self._pieces.append((text, is_markup))
        return f"{self._salt}.{len(self._pieces) - 1}."

    def _find(self, number: str) -> tuple[str, bool]:
        """A piece by the number in its word."""
        # a template may cut words up and put another number into one
        if len(number) > 9 or int(number) >= len(self._pieces):
            raise InputError("the chat template changes the words of messages, which is not supported")
        return self._pieces[int(number)]

    def escape(self, text: str) -> str:
        """Text inside of JSON, with words that stand for what JSON writes."""

        def replace(match: re.Match[str]) -> str:
            piece, is_markup = self._find(match[1])
            # without quotes: the word already stands between those that JSON put around it
            encoded = json.dumps(piece, ensure_ascii=False)[1:-1]
            return self.add(template_sandbox.count_text(encoded), is_markup=is_markup)

        return self._pattern.sub(replace, text)

    def split(self, text: str) -> list[tuple[str, bool]]:
        """The pieces of a text, each with whether it is markup.

        Raises:
          InputError: if the template has changed a word, by ``upper`` for instance, so that its text would be lost.
        """
        pieces = []
        remaining = template_sandbox.MAX_SIZE + _MAX_REPEATS * sum(len(piece) for piece, _ in self._pieces)
        for i, piece in enumerate(self._pattern.split(text)):
            if i % 2:  # the number in a word; even ones are the text between words
                pieces.append(self._find(piece))
                # a short text of the template may have a long one of the user's many times
                remaining -= len(pieces[-1][0])
                if remaining < 0:
                    raise InputError(f"the chat template repeats messages over {_MAX_REPEATS} times")
            elif self._salt in piece.lower():
                raise InputError("the chat template changes the letters of messages, which is not supported")
            else:
                pieces.append((piece, True))
        return pieces


class _Parts(list[dict[str, str]]):
    """The parts of a message as templates know them; for one that takes it for a string, it is their text."""

    def __init__(self, parts: Sequence[dict[str, str]], text: str) -> None:
        super().__init__(parts)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: Any) -> Any:
        return self._text + other if isinstance(other, str) else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return other + self._text if isinstance(other, str) else NotImplemented

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pickling and copying look for such before there is a text
            raise AttributeError(name)
        return getattr(self._text, name)  # strip, split, startswith ...


def _template_message(message: Message, stand_ins: _StandIns) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": stand_ins.add(message.content)}
    parts: list[dict[str, str]] = []
    text = ""
    for part in message.content:
        if isinstance(part, TextPart):
            word = stand_ins.add(part.text)
            parts.append({"type": "text", "text": word})
        else:
            word = stand_ins.add(MEDIA_MARKUP[part.kind], is_markup=True)
            # templates look at the kind, or at which key is there
            parts.append({"type": part.kind, part.kind: ""})
        text += word
    return {"role": message.role, "content": _Parts(parts, text)}


@jinja2.pass_context
def _to_json(
    context: jinja2.runtime.Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson`` as transformers has it: jinja's own escapes what HTML does not take."""
    if indent is not None:
        indent = check_int("the chat template: indent of tojson", indent, 0, _MAX_INDENT)
    if separators is not None and sum(map(len, separators)) > _MAX_INDENT:
        raise jinja2.TemplateError(f"tojson: separators may have {_MAX_INDENT} characters")
    template_sandbox.count_output(value)
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return template_sandbox.count_text(context[_STAND_INS].escape(text))


def split_at_replies(pieces: Sequence[tuple[str, bool]]) -> list[list[tuple[str, bool]]]:
    """Cuts what ``ChatTemplate.render`` gives after each header of a reply.

    Encoded one by one, the parts have a reply begin at a token of its own, as it does when it is generated; in one text
    a line break that a reply begins with would melt into the header's.
    """
    parts: list[list[tuple[str, bool]]] = [[]]
    for text, trusted in pieces:
        # a header that a user typed is plain text, and cuts nothing
        *headers, rest = text.split(REPLY_HEADER) if trusted else [text]
        for before in headers:
            parts[-1].append((before + REPLY_HEADER, True))
            parts.append([])
        parts[-1].append((rest, trusted))
    return parts
