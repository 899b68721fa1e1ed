"""Items of a realtime session's dialogue."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.serving.conversation import Conversation, Item, Part, cut_transcript, parse_item
from omni_jax.serving.realtime_config import SessionConfig

HELLO = {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}


def make_conversation() -> Conversation:
    conversation = Conversation()
    conversation.insert(parse_item({**HELLO, "id": "a"}))
    answer = Part("output_audio", "One two three four.", np.zeros(24_000, np.float32))
    conversation.insert(Item("b", "assistant", [answer]))
    conversation.insert(Item("c", "user", [Part("input_audio", samples=np.ones(10, np.float32), rate=8000)]))
    return conversation


def test_items_become_messages_in_their_order() -> None:
    conversation = make_conversation()
    conversation.insert(parse_item({**HELLO, "id": "first"}), "root")
    conversation.insert(parse_item({**HELLO, "id": "between"}), "a")
    roles = [message["role"] for message in conversation.make_messages("Be kind.")]
    assert roles == ["system", "user", "user", "user", "assistant", "user"]
    *_, answer, last = conversation.make_messages("")
    assert answer["content"] == "One two three four."
    (part,) = last["content"]
    assert part["type"] == "audio" and part["sampling_rate"] == 8000


def test_an_answer_is_cut_to_what_was_played() -> None:
    conversation = make_conversation()
    conversation.truncate("b", 0, 500)
    part = conversation.find("b").parts[0]
    assert part.text == "One two" and part.samples is not None and len(part.samples) == 12_000
    conversation.truncate("b", 0, 0)
    assert [message["role"] for message in conversation.make_messages("")] == ["user", "user"]


@pytest.mark.parametrize("item_id, index, milliseconds", [("b", 0, 1001), ("b", 1, 0), ("a", 0, 0), ("x", 0, 0)])
def test_what_cannot_be_cut_is_an_error(item_id: str, index: int, milliseconds: int) -> None:
    with pytest.raises(InputError):
        make_conversation().truncate(item_id, index, milliseconds)


@pytest.mark.parametrize(
    "played, text",
    [(0, ""), (150, ""), (299, "One"), (400, "One two"), (999, "One two three"), (1000, "One two three four.")],
)
def test_a_transcript_is_cut_at_words(played: int, text: str) -> None:
    assert cut_transcript("One two three four.", played, 1000) == text


@pytest.mark.parametrize(
    "item, message",
    [
        ([], "object"),
        ({"role": "tool", "content": []}, "role"),
        ({"role": "user", "content": []}, "content"),
        ({"role": "user", "content": [{"type": "output_text", "text": "x"}]}, "output_text"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "audio"),
        ({"role": "user", "content": [{"type": "input_audio", "audio": "!"}]}, "base64"),
        ({**HELLO, "colour": "red"}, "colour"),
        ({**HELLO, "type": "function_call"}, "function_call"),
        ({**HELLO, "id": "x" * 65}, "id"),
    ],
)
def test_what_is_no_item_is_told(item: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_item(item)


def test_an_item_is_there_once() -> None:
    conversation = make_conversation()
    with pytest.raises(InputError, match="already"):
        conversation.insert(parse_item({**HELLO, "id": "a"}))
    conversation.delete("a")
    with pytest.raises(InputError):
        conversation.find("a")


def test_settings_are_changed_one_by_one() -> None:
    config = SessionConfig().update({"instructions": "Be kind.", "audio": {"output": {"voice": "Ethan"}}})
    assert (config.instructions, config.voice) == ("Be kind.", "Ethan")
    assert config.turn_detection is not None
    off = config.update({"audio": {"input": {"turn_detection": None, "format": {"type": "audio/pcmu"}}}})
    assert off.turn_detection is None and off.input_format == "audio/pcmu" and off.voice == "Ethan"
    on = off.update({"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 200}}}})
    assert on.turn_detection is not None and on.turn_detection.silence_duration_ms == 200
    assert on.update({"output_modalities": ["text"]}).options.modalities == ("text",)
    assert on.update({}) == on


@pytest.mark.parametrize(
    "values",
    [
        {"type": "transcription"},
        {"output_modalities": ["audio", "text"]},
        {"colour": "red"},
        {"tools": [{"type": "function"}]},
        {"max_output_tokens": 0},
        {"instructions": 3},
        {"audio": {"input": {"format": {"type": "audio/opus"}}}},
        {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16_000}}}},
        {"audio": {"input": {"turn_detection": {"type": "semantic_vad"}}}},
        {"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 2}}}},
        {"audio": {"output": {"speed": 2}}},
        {"sampling": {"temperature": -1}},
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        SessionConfig().update(values)
