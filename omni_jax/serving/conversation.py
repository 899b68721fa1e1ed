"""The dialogue of a realtime session: items of OpenAI's, and the messages that the model reads of them."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from omni_jax.checks import check_int, check_names, shown
from omni_jax.errors import InputError
from omni_jax.processing.sources import decode_base64
from omni_jax.serving.realtime_audio import PCM_RATE, decode_samples
from omni_jax.serving.wav import pcm16

MAX_ITEMS = 1000
MAX_BYTES = 256 << 20  # of all sounds, pictures and texts of a conversation
_ITEM_FIELDS = ("id", "type", "object", "role", "status", "content")
_PARTS = {
    "system": ("input_text",),
    "user": ("input_text", "input_audio", "input_image"),
    "assistant": ("output_text", "output_audio"),
}
_PART_FIELDS = ("type", "text", "audio", "transcript", "image_url", "detail")


@dataclass(eq=False)
class Part:
    """A part of an item.

    Attributes:
      kind: OpenAI's ``type``.
      text: of text, or the transcript of sound.
      samples: of sound, at ``rate``.
      rate: of them.
      image_url: a data: URL, or an address.
    """

    kind: str
    text: str = ""
    samples: Float[np.ndarray, " n"] | None = None
    rate: int = PCM_RATE
    image_url: str = ""

    def describe(self, *, with_audio: bool = False) -> dict[str, Any]:
        """OpenAI's object; its sound is left out unless it is asked for."""
        values: dict[str, Any] = {"type": self.kind}
        if self.kind in ("input_text", "output_text"):
            values["text"] = self.text
        elif self.kind == "input_image":
            values["image_url"] = self.image_url
        else:
            values["transcript"] = self.text or None
            if with_audio and self.samples is not None:
                values["audio"] = base64.b64encode(pcm16(self.samples)).decode()
        return values


@dataclass(eq=False)
class Item:
    """A message.

    Attributes:
      id: that events name it by.
      role: of who speaks.
      parts: of what is said.
      status: OpenAI's.
    """

    id: str
    role: str
    parts: list[Part] = field(default_factory=list)
    status: str = "completed"

    @property
    def num_bytes(self) -> int:
        """Of its sounds, pictures and texts, about."""
        samples = [0 if part.samples is None else part.samples.nbytes for part in self.parts]
        return sum(samples) + sum(len(part.text) + len(part.image_url) for part in self.parts)

    def describe(self, *, with_audio: bool = False) -> dict[str, Any]:
        """OpenAI's object."""
        content = [part.describe(with_audio=with_audio) for part in self.parts]
        values = {"id": self.id, "object": "realtime.item", "type": "message", "status": self.status}
        return {**values, "role": self.role, "content": content}


class Conversation:
    """Items in their order."""

    def __init__(self) -> None:
        self.id = make_id("conv")
        self._items: list[Item] = []

    @property
    def last_id(self) -> str | None:
        return self._items[-1].id if self._items else None

    def find(self, item_id: Any) -> Item:
        """An item.

        Raises:
          InputError: if there is none of this id.
        """
        for item in self._items:
            if item.id == item_id:
                return item
        raise InputError(f"item_id is {shown(item_id)}, which is no item of this conversation")

    def insert(self, item: Item, previous_id: str | None = None) -> str | None:
        """Puts an item behind another, or at the end; returns the id of the one before it.

        Args:
          item: that is not there yet.
          previous_id: of the other; "root" for the beginning.

        Raises:
          InputError: if there is no such other one, one of the same id, or too many.
        """
        if any(other.id == item.id for other in self._items):
            raise InputError(f"item.id is {shown(item.id)}, which is an item already")
        if len(self._items) >= MAX_ITEMS:
            raise InputError(f"the conversation has {MAX_ITEMS} items, which is the limit; delete some")
        num_bytes = item.num_bytes + sum(other.num_bytes for other in self._items)
        if num_bytes > MAX_BYTES:
            raise InputError(
                f"the conversation would have {num_bytes} bytes, over the limit of {MAX_BYTES}; delete some"
            )
        place = len(self._items)
        if previous_id == "root":
            place = 0
        elif previous_id is not None:
            place = self._items.index(self.find(previous_id)) + 1
        self._items.insert(place, item)
        return self._items[place - 1].id if place else None

    def delete(self, item_id: Any) -> None:
        """Removes an item; raises as ``find``."""
        self._items.remove(self.find(item_id))

    def truncate(self, item_id: Any, content_index: Any, audio_end_ms: Any) -> None:
        """Cuts a spoken answer to what was played of it, its transcript too.

        Raises:
          InputError: if it is no spoken answer, or is shorter.
        """
        item = self.find(item_id)
        check_int("content_index", content_index, 0)
        if item.role != "assistant" or content_index >= len(item.parts) or item.parts[content_index].samples is None:
            raise InputError(f"content {content_index} of {shown(item_id)} is no spoken answer")
        part = item.parts[content_index]
        samples = part.samples
        assert samples is not None
        total = len(samples) * 1000 // part.rate
        check_int("audio_end_ms", audio_end_ms, 0, total, hint="milliseconds, no more than the answer has")
        part.text = cut_transcript(part.text, audio_end_ms, total)
        part.samples = samples[: audio_end_ms * part.rate // 1000]

    def make_messages(self, instructions: str, items: Sequence[Item] | None = None) -> list[dict[str, Any]]:
        """What the model reads.

        Args:
          instructions: the system prompt; none if it is empty.
          items: in place of the conversation's.
        """
        messages: list[dict[str, Any]] = []
        if instructions:
            messages.append({"role": "system", "content": instructions})
        for item in self._items if items is None else items:
            content = [_make_content(part) for part in item.parts]
            if item.role != "user":
                text = "".join(part.text for part in item.parts)
                # of an answer that was cut before its first word, there is nothing to read
                if text:
                    messages.append({"role": item.role, "content": text})
            elif content:
                messages.append({"role": item.role, "content": content})
        return messages


def make_id(kind: str) -> str:
    """A new id, such as item_..."""
    return f"{kind}_{uuid.uuid4().hex[:24]}"


def cut_transcript(text: str, played_ms: int, total_ms: int) -> str:
    """The whole words of a text of which so much of its sound was played, if words take time as they have letters."""
    if played_ms >= total_ms:
        return text
    num_characters = len(text) * played_ms // total_ms
    kept = text[:num_characters]
    # a word that was cut was not said
    if num_characters < len(text) and not text[num_characters].isspace():
        kept = kept[: max(kept.rfind(" "), 0)]
    return kept.rstrip()


def parse_item(value: Any, where: str = "item") -> Item:
    """An item that a client gives.

    Raises:
      InputError: if it is none.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, got {type(value).__name__}")
    check_names(f"field of {where}", value, _ITEM_FIELDS)
    if value.get("type", "message") != "message":
        raise InputError(f"{where}.type is {shown(value['type'])}; only 'message' is supported")
    role = value.get("role")
    if not isinstance(role, str) or role not in _PARTS:
        raise InputError(f"{where}.role is {shown(role)}; it must be one of {', '.join(_PARTS)}")
    content = value.get("content")
    if not isinstance(content, list) or not content:
        raise InputError(f"{where}.content must be a list of parts that is not empty, got {shown(content)}")
    item_id = value.get("id") or make_id("item")
    if not isinstance(item_id, str) or len(item_id) > 64:
        raise InputError(f"{where}.id is {shown(item_id)}; it must be a text of up to 64 characters")
    parts = [_parse_part(part, role, f"{where}.content[{i}]") for i, part in enumerate(content)]
    return Item(item_id, role, parts)


def _parse_part(value: Any, role: str, where: str) -> Part:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be an object, got {type(value).__name__}")
    check_names(f"field of {where}", value, _PART_FIELDS)
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in _PARTS[role]:
        raise InputError(f"{where}.type is {shown(kind)}; of {role} it may be {', '.join(_PARTS[role])}")
    if kind == "input_image":
        url = value.get("image_url")
        if not isinstance(url, str):
            raise InputError(f"{where}.image_url is {shown(url)}; it must be a data: URL or an address")
        return Part(kind, image_url=url)
    text = value.get("transcript" if kind.endswith("audio") else "text")
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: its text is {shown(text)}; it must be a text")
    if kind != "input_audio":
        return Part(kind, text or "")
    audio = value.get("audio")
    if not isinstance(audio, str):
        raise InputError(f"{where}.audio is {shown(audio)}; it must be 24 kHz samples of 16 bits in base64")
    return Part(kind, text or "", decode_samples(decode_base64(audio, f"{where}.audio"), "audio/pcm"))


def _make_content(part: Part) -> dict[str, Any]:
    """A part of a message of the user's."""
    if part.kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part.image_url}}
    if part.samples is not None:
        return {"type": "audio", "audio": part.samples, "sampling_rate": part.rate}
    return {"type": "text", "text": part.text}
