"""Rows in the shapes that users have, to the messages that ``Processor`` takes.

A row is one of these:

* a dialogue, ``{"messages": [{"role", "content"}, ...]}``, as OpenAI, Hugging Face and ms-swift write it;
* a dialogue, ``{"conversations": [{"from", "value"}, ...]}``, as sharegpt and LLaMA-Factory write it;
* a document, ``{"text": ...}``, every token of which is a target.

Media of a dialogue stand in its content parts; or a tag ``<image>``, ``<audio>`` or ``<video>`` in a text, or a part
without a source, takes the next of the row's list ``images``, ``audios`` or ``videos``. A tag for which no medium is
left is text: HTML has tags of the same names.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from omni_jax.checks import check_float, shown
from omni_jax.data.sources import Row
from omni_jax.errors import InputError
from omni_jax.processing.files import folder_of, join_path
from omni_jax.processing.sources import confine_source, find_scheme

VideoSound: TypeAlias = Literal["auto", "always", "never"]
MapSource: TypeAlias = Callable[[str | bytes], Any]
Part: TypeAlias = Mapping[str, Any]

MAX_LOSS_SCALE = 1e4  # that each factor of a message's weight may be

_KINDS = ("image", "audio", "video")
_SHAPES = ("messages", "conversations", "text")
_TAG = re.compile(r"<(image|audio|video)>")
# sharegpt's names of the speakers, beside the roles themselves
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# a regular pair is one character once JSON is read, so any surrogate that is left is half of one
_SURROGATE = re.compile("[\ud800-\udfff]")
# keys of a message that say how much of it is a target
_WEIGHT_KEYS = ("loss", "loss_scale", "weight")
# keys that change what a model should read; a row that needs them would be read wrongly without
_UNSUPPORTED_KEYS = ("objects", "tools", "chat_template_kwargs")
# keys that mark the answer of a dialogue as a good or a bad one (KTO)
_LABEL_KEYS = ("label", "kto_tag")
_BAD_LABELS = (False, 0, "false", "0")


@dataclass(frozen=True)
class Dialogue:
    """What ``Processor.dialogue`` takes, and the weight of the loss on each of the assistant's messages."""

    messages: Sequence[Mapping[str, Any]]
    weights: Sequence[float]


@dataclass(frozen=True)
class Document:
    """A text of which every token is a target."""

    text: str


def read_row(row: Row, sound: VideoSound = "auto", media_root: str | None = None) -> Dialogue | Document:
    """Reads a row; its media are not opened.

    Args:
      row: paths of media in it are taken from the folder of its file.
      sound: whether the sound of videos is used that do not say so themselves: where they have any, always, or never.
        Under "always" an ``<audio>`` tag right behind a ``<video>`` tag names the sound of that video, which is read
        once.
      media_root: the folder that media must lie within; None: that of the row's file.

    Raises:
      InputError: if a medium lies elsewhere; if it has none of the known shapes, holds more media than places for them,
        or says itself that its answer is a bad one.
    """
    folder = folder_of(row.file)

    # rows are published by strangers, and must not name what only this machine's user may read
    def resolve(source: str | bytes) -> str | bytes:
        return confine_source(source, folder, media_root or folder, "data.media_root (--data.media-root)")

    # what kind of row it is, and whether it can be trained on
    values = map_media_sources(row_values(row), resolve)
    shape = _find_shape(values)
    _check_keys(values)
    # its media, which the messages then take in their order
    media = {kind: _media_list(values, kind) for kind in _KINDS}
    if shape == "text":
        return _read_document(values["text"], media)
    return _read_dialogue(_read_messages(values, shape), media, sound)


def row_values(row: Row) -> dict[str, Any]:
    """The object that a row is; keys whose value is null are left out, since columns of Parquet are filled with them.

    Raises:
      InputError: if it is not an object.
    """
    try:
        values = row.contents if isinstance(row.contents, Mapping) else json.loads(row.contents)
        if isinstance(values, Mapping):
            return _drop_nulls(values)
    except RecursionError:
        raise InputError("its lists and objects are nested too deeply") from None
    except ValueError as e:
        raise InputError(f"not JSON: {e}") from e
    raise InputError(f"a row must be an object, got {type(values).__name__}")


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_nulls(inner) for key, inner in value.items() if inner is not None}
    # a null in a list is kept: without it the others would have other places
    if isinstance(value, list):
        return [_drop_nulls(inner) for inner in value]
    return value


# --- media ---


def is_path(source: str) -> bool:
    """Whether it is a path, not a URL."""
    return not find_scheme(source)


def resolve_source(source: str, folder: str) -> str:
    """A path as seen from the folder of the row's file; a URL as it is."""
    return join_path(folder, source) if is_path(source) else source


def map_media_sources(values: Mapping[str, Any], map_source: MapSource) -> dict[str, Any]:
    """The row with ``map_source`` of every medium in place of the medium: of its path or URL, or of its bytes.

    Raises:
      InputError: for a medium that is none of these.
    """
    out = dict(values)
    # the row's own lists, whose keys are singular or plural
    for kind in _KINDS:
        for key in (kind, f"{kind}s"):
            if out.get(key):
                out[key] = _map_source(out[key], map_source)
    # parts of messages that name their medium themselves; ``conversations`` have texts alone
    if isinstance(out.get("messages"), list):
        out["messages"] = [_map_message(message, map_source) for message in out["messages"]]
    return out


def relocate_row(row: Row, out: Path) -> dict[str, Any]:
    """The values of a row for another file.

    Args:
      row: as ``row_values`` reads it.
      out: the file that is written; paths of media become absolute where it lies in another folder.

    Raises:
      InputError: for a row that is not JSON, or a medium that is none.
    """
    values = row_values(row)
    folder = folder_of(row.file)
    if folder == folder_of(str(out)):
        return values

    def to_absolute(source: str | bytes) -> str | bytes:
        return resolve_source(source, str(Path(folder).resolve())) if isinstance(source, str) else source

    return map_media_sources(values, to_absolute)


def _map_source(source: Any, map_source: MapSource) -> Any:
    """A source, or a list of them. Those of Hugging Face are objects with bytes or a path."""
    if isinstance(source, list):
        return [_map_source(inner, map_source) for inner in source]
    if isinstance(source, Mapping):
        source = source.get("bytes") or source.get("path")
    if not isinstance(source, str | bytes):
        raise InputError(f"a medium must be a path, a URL or an object with bytes or a path, got {shown(source)}")
    return map_source(source)


def _map_message(message: Any, map_source: MapSource) -> Any:
    if not (isinstance(message, Mapping) and isinstance(message.get("content"), list)):
        return message
    content = [_map_part(part, map_source) for part in message["content"]]
    return {**message, "content": content}


def _map_part(part: Any, map_source: MapSource) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind.removesuffix("_url") not in _KINDS:
        return part
    # a source is the value of one of these keys; OpenAI puts it one level deeper, {"image_url": {"url": ...}}
    out = dict(part)
    for key in (kind, "url", "path"):
        if isinstance(out.get(key), Mapping) and "url" in out[key]:
            out[key] = {**out[key], "url": _map_source(out[key]["url"], map_source)}
        elif key in out:
            out[key] = _map_source(out[key], map_source)
    return out


def _media_list(values: Mapping[str, Any], kind: str) -> list[Any]:
    """The row's media of one kind; an empty string or list is none."""
    singular = values.get(kind)
    plural = values.get(f"{kind}s")
    if singular and plural:
        raise InputError(f"a row has {kind} or {kind}s, not both")
    media = singular or plural
    if not media:
        return []
    return media if isinstance(media, list) else [media]


# --- what a row says about itself ---


def _find_shape(values: Mapping[str, Any]) -> str:
    """Which of the shapes a row has; an empty value counts only where there is no other."""
    # Parquet has all columns in every row, and those that a row does not use may be empty
    present: list[str] = []
    filled: list[str] = []
    for key in _SHAPES:
        if key in values:
            present.append(key)
            if values[key]:
                filled.append(key)
    shapes = filled or present
    if len(shapes) != 1:
        raise InputError(f"a row has messages, conversations or text, and one of them; this has {shapes or 'none'}")
    return shapes[0]


def _check_keys(values: Mapping[str, Any]) -> None:
    """Refuses a row which, without keys that are not understood here, would teach something else."""
    # what the model should have read besides the dialogue
    for key in _UNSUPPORTED_KEYS:
        if not _is_empty(values.get(key)):
            raise InputError(f"{key} is not supported; leave it out if the text is right without it")
    # a dialogue that is there to show what not to answer
    for key in _LABEL_KEYS:
        label = values.get(key)
        if isinstance(label, str):
            label = label.strip().lower()
        if key in values and label in _BAD_LABELS:
            raise InputError(
                f"{key} is {shown(values[key])}: it marks the answer as a bad one, which training would teach; leave "
                f"out such rows, or the key {key} if it means something else"
            )
    # a preference pair, whose answers are beside the dialogue; a number or a flag of this name is something else
    if isinstance(values.get("chosen"), str | Mapping | list) and values["chosen"]:
        raise InputError(
            "chosen is not supported: there is no training on preferences; put the chosen answer at the end of the "
            "dialogue, and leave out chosen and rejected"
        )


def _is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, "", "[]", or an object or list of such."""
    # a column of objects is often text that holds JSON: only what may be a list, an object or null is parsed
    if isinstance(value, str):
        text = value.strip()
        if text[:1] not in ("[", "{", "n"):
            return not text
        try:
            return _is_empty(json.loads(text))
        except (ValueError, RecursionError):
            return False
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    if isinstance(value, list):
        return all(map(_is_empty, value))
    return value is None


# --- documents and dialogues ---


def _read_document(text: Any, media: Mapping[str, Sequence[Any]]) -> Document:
    if not isinstance(text, str):
        raise InputError(f"text must be a string, got {type(text).__name__}")
    unused: list[str] = []
    for kind in _KINDS:
        if media[kind]:
            unused.append(f"{kind}s")
    if unused:
        raise InputError(f"a row of text has no {', '.join(unused)}; media belong in messages")
    return Document(_clean_text(text))


def _clean_text(text: str) -> str:
    """Half a surrogate pair, which no token can hold, becomes U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


def _read_messages(values: Mapping[str, Any], shape: str) -> list[dict[str, Any]]:
    """The row's messages with role and content, the system prompt beside them put first."""
    found = values[shape]
    if not isinstance(found, list) or not all(isinstance(message, Mapping) for message in found):
        raise InputError(f"{shape} must be a list of objects, got {shown(found)}")
    messages = []
    for i, message in enumerate(found):
        if shape == "conversations":
            messages.append(_from_sharegpt(message, i))
            continue
        if not {"role", "content"} <= message.keys():
            raise InputError(f"messages[{i}] needs a role and a content, got the keys {sorted(message)}")
        messages.append(dict(message))
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": values["system"]})
    return messages


def _from_sharegpt(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    sender = message.get("from")
    value = message.get("value")
    if not isinstance(sender, str) or sender not in _ROLES or not isinstance(value, str):
        known = ", ".join(_ROLES)
        raise InputError(f"conversations[{i}] must be from one of {known} and have a value, got from {shown(sender)}")
    renamed: dict[str, Any] = {"role": _ROLES[sender], "content": value}
    for key in _WEIGHT_KEYS:
        if key in message:
            renamed[key] = message[key]
    return renamed


def _read_dialogue(
    messages: Sequence[Mapping[str, Any]], media: Mapping[str, Sequence[Any]], sound: VideoSound
) -> Dialogue:
    """The messages with their media in place; these are taken from a queue of each kind, in the order of the texts."""
    queues = {kind: deque(media[kind]) for kind in _KINDS}
    filled = []
    weights = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            weights.append(_loss_weight(message, i))
        # the processor knows no weights of a loss
        plain = dict(message)
        for key in _WEIGHT_KEYS:
            plain.pop(key, None)
        plain["content"] = _fill_content(message["content"], queues, sound)
        filled.append(plain)

    # a medium that no text has a place for would be left out unnoticed
    for kind, queue in queues.items():
        if queue:
            num_media = len(media[kind])
            raise InputError(f"the messages have {num_media - len(queue)} <{kind}> tags, but {kind}s holds {num_media}")
    return Dialogue(filled, weights)


def _loss_weight(message: Mapping[str, Any], i: int) -> float:
    """The weight of the loss on a message.

    ``loss`` (ms-swift) makes it a target or not, ``loss_scale`` (ms-swift) and ``weight`` (OpenAI) multiply the loss.
    """
    loss = message.get("loss", True)
    if not isinstance(loss, bool):
        raise InputError(f"messages[{i}]: loss must be true or false, got {shown(loss)}")
    product = float(loss)
    for key in ("loss_scale", "weight"):
        product *= check_float(f"messages[{i}].{key}", message.get(key, 1.0), 0.0, MAX_LOSS_SCALE)
    return product


def _fill_content(content: Any, queues: Mapping[str, deque[Any]], sound: VideoSound) -> Any:
    """A message's content; tags in a text, and parts without a source, take the next medium of their kind."""
    if isinstance(content, str):
        parts = _split_at_tags(content, queues, sound)
        # without a medium the text stays as it is, tags that are none included
        if all(part["type"] == "text" for part in parts):
            return _clean_text(content)
    elif isinstance(content, list):
        parts = [_fill_part(part, queues) for part in content]
    else:
        return content  # the processor says what is wrong with it
    return [_set_video_sound(part, sound) for part in parts]


def _split_at_tags(text: str, queues: Mapping[str, deque[Any]], sound: VideoSound) -> list[Part]:
    """Parts of a text: a tag is a medium where one is left of its kind, and text where none is."""
    parts: list[Part] = []
    begin = 0  # of the text that is not yet in a part
    end_of_video = -1  # where the tag of a video ended, if it was the last one
    for tag in _TAG.finditer(text):
        kind = tag[1]
        if not queues[kind]:
            continue
        _append_text(parts, text[begin : tag.start()])
        source = queues[kind].popleft()
        # under "always" the video brings its own sound, so that the one that is listed beside it is not read as well
        is_sound_of_video = kind == "audio" and end_of_video == tag.start() and sound == "always"
        if not is_sound_of_video:
            parts.append({"type": kind, kind: source})
        begin = tag.end()
        end_of_video = begin if kind == "video" else -1
    _append_text(parts, text[begin:])
    return parts


def _append_text(parts: list[Part], text: str) -> None:
    if text:
        parts.append({"type": "text", "text": _clean_text(text)})


def _fill_part(part: Any, queues: Mapping[str, deque[Any]]) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {**part, "text": _clean_text(part["text"])}
    # a part of another kind, for the processor to judge, or a medium with a source of its own
    if not isinstance(kind, str) or kind not in _KINDS or {kind, "url", "path"} & part.keys():
        return part
    if not queues[kind]:
        raise InputError(f'a part {{"type": "{kind}"}} without a source takes one of {kind}s, but none is left')
    return {**part, kind: queues[kind].popleft()}


def _set_video_sound(part: Any, sound: VideoSound) -> Any:
    is_video = isinstance(part, Mapping) and part.get("type") in ("video", "video_url")
    # "auto" is what the processor does by itself; and what a part says is stronger
    if sound == "auto" or not is_video or "use_audio_in_video" in part:
        return part
    return {**part, "use_audio_in_video": sound == "always"}
