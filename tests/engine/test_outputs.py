"""From tokens to text: end marks, stop strings, whole characters; and what the options must be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.engine.outputs import Options, ReplyWriter
from omni_jax.errors import InputError
from omni_jax.processing.processor import Processor


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.load(tiny_checkpoint)


def ids_of(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode([(text, False)])


def write(processor: Processor, ids: list[int], size: int = 1, **options) -> tuple[list[str], ReplyWriter]:
    """The pieces of text as ``size`` tokens at a time go in."""
    writer = ReplyWriter(processor, Options.create(**options))
    pieces = [writer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, writer.end()], writer


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=40), size=st.integers(1, 7))
def test_pieces_are_whole_characters_and_add_up(processor: Processor, text: str, size: int) -> None:
    ids = ids_of(processor, text)
    pieces, writer = write(processor, ids, size)
    assert "".join(pieces) == writer.text == processor.decode(ids)
    assert all(piece == piece.encode("utf-8", "strict").decode() for piece in pieces)
    assert "\N{REPLACEMENT CHARACTER}" in text or "\N{REPLACEMENT CHARACTER}" not in writer.text
    assert writer.finish_reason == "length"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab \n", min_size=1, max_size=30),
    stops=st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 5),
)
def test_a_stop_string_ends_the_text_before_it(processor: Processor, text: str, stops: list[str], size: int) -> None:
    pieces, writer = write(processor, ids_of(processor, text), size, stop=tuple(stops))
    places = [m.start() for s in stops if (m := re.search(re.escape(s), text))]
    assert (writer.finish_reason == "stop") == bool(places)
    assert "".join(pieces) == writer.text
    # words are pieces of several letters: of two stops, the one met first ends it, even if the other began before
    assert text.startswith(writer.text)
    assert not any(s in writer.text for s in stops)
    if size == 1 and not places:
        assert writer.text == text


def test_what_may_become_a_stop_string_waits(processor: Processor) -> None:
    ids = [*ids_of(processor, "x"), *ids_of(processor, "#"), *ids_of(processor, "#"), *ids_of(processor, "y")]
    pieces, _ = write(processor, ids, stop="##y")
    assert pieces == ["x", "", "", "", ""]
    pieces, _ = write(processor, ids, stop="##z")
    assert pieces == ["x", "", "", "##y", ""]


def test_an_end_mark_ends_the_reply(processor: Processor) -> None:
    end = processor.stop_ids[0]
    pieces, writer = write(processor, [*ids_of(processor, "x"), end, *ids_of(processor, "y")], size=3)
    assert ("".join(pieces), writer.finish_reason) == ("x", "stop")
    assert writer.ids == [*ids_of(processor, "x"), end]


def test_a_stop_id_of_the_request(processor: Processor) -> None:
    x, y = ids_of(processor, "x")[0], ids_of(processor, "y")[0]
    pieces, writer = write(processor, [x, y, x], stop_token_ids=(y,))
    assert ("".join(pieces), writer.ids, writer.finish_reason) == ("x", [x, y], "stop")


def test_what_is_spoken_ends_with_the_text(processor: Processor) -> None:
    x, y, z = (ids_of(processor, c)[0] for c in "xyz")
    assert write(processor, [x, x, y, z])[1].spoken == 4  # the last is never read by the Thinker, and not spoken
    assert write(processor, [x, x, y, z], stop="yz")[1].spoken == 3  # x, x, and the one that ends them
    assert write(processor, [y, z], stop="yz")[1].spoken == 1
    assert write(processor, [x, processor.stop_ids[0], y])[1].spoken == 2


def test_a_character_cut_by_the_end_of_the_reply(processor: Processor) -> None:
    half = ids_of(processor, "é")[:1]
    assert write(processor, half)[0] == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "unknown option max_new_tokens; known: max_tokens, temperature"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"stop": [""]}, "each must be a string of at least one character"),
        ({"top_p": 2.0}, "top_p is 2.0; it must be above 0 and at most 1"),
    ],
)
def test_a_wrong_option(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Options.create(**options)
