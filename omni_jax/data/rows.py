"""Rows in the shapes that users have, to the messages that ``Processor`` takes.

A row is one of these:

* a dialogue, ``{"messages": [{"role", "content"}, ...]}``, as OpenAI, Hugging Face and ms-swift write it;
* a dialogue, ``{"conversations": [{"from", "value"}, ...]}``, as sharegpt and LLaMA-Factory write it;
* a document to learn whole, ``{"text": ...}``.

Media of a dialogue stand in its content parts; or a tag ``<image>``, ``<audio>`` or ``<video>`` in a text, or a part
without a source, takes the next of the row's list ``images``, ``audios`` or ``videos``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from omni_jax.data.sources import Row
from omni_jax.errors import InputError
from omni_jax.processing.files import join_path

VideoSound: TypeAlias = Literal["auto", "always", "never"]
Place: TypeAlias = Callable[[str | bytes], Any]

_KINDS = ("image", "audio", "video")
_TAG = re.compile(r"<(image|audio|video)>")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# keys that say what a model should read, and that are not understood here; passing over them would teach nonsense
_NOT_SUPPORTED = ("objects", "tools", "chat_template_kwargs")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


@dataclass(frozen=True)
class Dialogue:
    """What ``Processor.dialogue`` takes, and how much is learnt from each of the assistant's messages."""

    messages: Sequence[Mapping[str, Any]]
    weights: Sequence[float]


@dataclass(frozen=True)
class Document:
    """A text to learn whole."""

    text: str


def read_row(row: Row, sound: VideoSound = "auto") -> Dialogue | Document:
    """Reads a row; its media are not opened.

    Args:
      row: paths of media in it are taken from the folder of its file.
      sound: whether videos are heard that do not say so themselves: where they have sound, always, or never. Under
        "always" an ``<audio>`` tag right behind a ``<video>`` tag names the sound of that video, which is heard once.

    Raises:
      InputError: if it has none of the known shapes, or its tags and its lists differ in number.
    """
    folder = os.path.dirname(row.file)
    values = place_media(row_values(row), lambda s: s if isinstance(s, bytes) else absolute_place(s, folder))
    shapes = [key for key in ("messages", "conversations", "text") if values.get(key) is not None]
    if len(shapes) != 1:
        raise InputError(f"a row has messages, conversations or text, and one of them; this has {shapes or 'none'}")
    for key in _NOT_SUPPORTED:
        if values.get(key):
            raise InputError(f"{key} is not supported; leave it out if the text is right without it")
    media = {kind: _listed(values, kind) for kind in _KINDS}
    if shapes == ["text"]:
        return _document(values["text"], media)
    messages = _messages(values, shapes[0])
    takers = {kind: _Taker(kind, media[kind]) for kind in _KINDS}
    filled = [{**message, "content": _content(message["content"], takers, sound)} for message in messages]
    for taker in takers.values():
        taker.finish()
    weights = [_weight(message, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    return Dialogue([{key: m[key] for key in m if key not in ("loss", "loss_scale")} for m in filled], weights)


def row_values(row: Row) -> dict[str, Any]:
    """The object that a row is; keys whose value is null are left out, since columns of Parquet are filled with them.

    Raises:
      InputError: if it is not an object.
    """
    try:
        values = row.contents if isinstance(row.contents, Mapping) else json.loads(row.contents)
    except ValueError as e:
        raise InputError(f"not JSON: {e}") from e
    if not isinstance(values, Mapping):
        raise InputError(f"a row must be an object, got {type(values).__name__}")
    return _without_nulls(values)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def place_media(values: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """The row with ``place`` of every medium in it: of its path or URL, or of its bytes."""
    out = dict(values)
    for kind in _KINDS:
        for key in (kind, f"{kind}s"):
            if key in out:
                out[key] = _placed(out[key], place)
    if isinstance(out.get("messages"), list):
        out["messages"] = [_placed_message(message, place) for message in out["messages"]]
    return out


def _placed(source: Any, place: Place) -> Any:
    """A source, or a list of them. Hugging Face's are objects with bytes or a path."""
    if isinstance(source, list):
        return [_placed(one, place) for one in source]
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str | bytes):
        raise InputError(f"a medium must be a path, a URL or an object with bytes or a path, got {source!r:.80}")
    return place(source)


def _placed_message(message: Any, place: Place) -> Any:
    if not (isinstance(message, Mapping) and isinstance(message.get("content"), list)):
        return message
    return {**message, "content": [_placed_part(part, place) for part in message["content"]]}


def _placed_part(part: Any, place: Place) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind.removesuffix("_url") not in _KINDS:
        return part
    out = dict(part)
    for key in (kind, "url", "path"):
        if isinstance(out.get(key), Mapping) and "url" in out[key]:
            out[key] = {**out[key], "url": place(out[key]["url"])}
        elif key in out:
            out[key] = _placed(out[key], place)
    return out


def is_path(source: str) -> bool:
    """Whether it is a path on this machine, not a URL."""
    return not _SCHEME.match(source)


def absolute_place(source: str, folder: str) -> str:
    """A path as seen from the folder of the row's file; a URL as it is."""
    return join_path(folder, source) if is_path(source) else source


def _listed(values: Mapping[str, Any], kind: str) -> list[Any]:
    """The row's media of one kind."""
    names = [key for key in (kind, f"{kind}s") if key in values]
    if len(names) > 1:
        raise InputError(f"a row has {kind} or {kind}s, not both")
    value = values[names[0]] if names else []
    return value if isinstance(value, list) else [value]


def _document(text: Any, media: Mapping[str, Sequence[Any]]) -> Document:
    if not isinstance(text, str):
        raise InputError(f"text must be a string, got {type(text).__name__}")
    given = [f"{kind}s" for kind in _KINDS if media[kind]]
    if given:
        raise InputError(f"a row of text has no {', '.join(given)}; media belong in messages")
    return Document(text)


def _messages(values: Mapping[str, Any], shape: str) -> list[dict[str, Any]]:
    """The row's messages with role and content, the system prompt beside them put first."""
    found = values[shape]
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise InputError(f"{shape} must be a list of objects, got {found!r:.80}")
    messages = (
        [_from_sharegpt(m, i) for i, m in enumerate(found)] if shape == "conversations" else list(map(dict, found))
    )
    for i, message in enumerate(messages):
        if not {"role", "content"} <= message.keys():
            raise InputError(f"messages[{i}] needs a role and a content, got the keys {sorted(message)}")
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": values["system"]})
    return messages


def _from_sharegpt(turn: Mapping[str, Any], i: int) -> dict[str, Any]:
    who, value = turn.get("from"), turn.get("value")
    if who not in _ROLES or not isinstance(value, str):
        known = ", ".join(_ROLES)
        raise InputError(f"conversations[{i}] must be from one of {known} and have a value, got from {who!r}")
    return {"role": _ROLES[who], "content": value}


def _weight(message: Mapping[str, Any], i: int) -> float:
    """ms-swift's keys: ``loss`` turns the learning of a message on and off, ``loss_scale`` weighs it."""
    loss, scale = message.get("loss", True), message.get("loss_scale", 1.0)
    if not isinstance(loss, bool) or not isinstance(scale, int | float) or scale < 0:
        raise InputError(
            f"messages[{i}]: loss must be true or false and loss_scale at least 0, got {loss!r}, {scale!r}"
        )
    return float(scale) if loss else 0.0


class _Taker:
    """Deals out a row's media of one kind, and counts who asked."""

    def __init__(self, kind: str, media: Sequence[Any]) -> None:
        self._kind, self._media, self._asked = kind, media, 0

    def take(self) -> dict[str, Any]:
        self._asked += 1
        if self._asked > len(self._media):
            return {}  # the count in ``finish`` says it better
        return {"type": self._kind, self._kind: self._media[self._asked - 1]}

    def finish(self) -> None:
        if self._asked != len(self._media):
            raise InputError(
                f"the messages have {self._asked} <{self._kind}> tags, but {self._kind}s holds {len(self._media)}"
            )


def _content(content: Any, takers: Mapping[str, _Taker], sound: VideoSound) -> Any:
    """A message's content with its tags and its parts without a source filled in."""
    if isinstance(content, str):
        if not _TAG.search(content):
            return content
        return [_heard(part, sound) for part in _tagged(content, takers, sound)]
    if not isinstance(content, list):
        return content  # the processor says what is wrong with it
    return [_heard(_filled(part, takers), sound) for part in content]


def _tagged(text: str, takers: Mapping[str, _Taker], sound: VideoSound) -> Iterator[dict[str, Any]]:
    before = ""
    for i, piece in enumerate(_TAG.split(text)):
        if i % 2:
            part = takers[piece].take()
            if not (piece == "audio" and before == "video" and sound == "always"):
                yield part
            before = piece
        elif piece:
            yield {"type": "text", "text": piece}
            before = ""


def _filled(part: Any, takers: Mapping[str, _Taker]) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _KINDS or any(key in part for key in (kind, "url", "path")):
        return part
    return {**part, **takers[kind].take()}


def _heard(part: Any, sound: VideoSound) -> Any:
    is_video = isinstance(part, Mapping) and part.get("type") in ("video", "video_url")
    if sound == "auto" or not is_video or "use_audio_in_video" in part:
        return part
    return {**part, "use_audio_in_video": sound == "always"}
