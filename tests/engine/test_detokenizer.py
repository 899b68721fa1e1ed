"""From tokens to text: end marks, stop strings, whole characters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.engine.detokenizer import Detokenizer
from omni_jax.processing.processor import Processor


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Processor:
    return Processor.load(tiny_checkpoint)


def ids_of(processor: Processor, text: str) -> list[int]:
    return processor.tokenizer.encode([(text, False)])


def write(
    processor: Processor,
    ids: list[int],
    size: int = 1,
    stop: tuple[str, ...] = (),
    stop_token_ids: tuple[int, ...] = (),
) -> tuple[list[str], Detokenizer]:
    """The pieces of text as ``size`` tokens at a time go in."""
    stop_ids = (*processor.stop_ids, *stop_token_ids)
    detokenizer = Detokenizer(processor.text_stream(), stop_ids, stop)
    pieces = [detokenizer.push(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [*pieces, detokenizer.finish()], detokenizer


@settings(max_examples=100, deadline=None)
@given(text=st.text(min_size=1, max_size=40), size=st.integers(1, 7))
def test_pieces_are_whole_characters_and_add_up(processor: Processor, text: str, size: int) -> None:
    ids = ids_of(processor, text)
    pieces, detokenizer = write(processor, ids, size)
    assert "".join(pieces) == detokenizer.text == processor.decode(ids)
    assert all(piece == piece.encode("utf-8", "strict").decode() for piece in pieces)
    assert "\N{REPLACEMENT CHARACTER}" in text or "\N{REPLACEMENT CHARACTER}" not in detokenizer.text
    assert detokenizer.finish_reason == "length"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab \n", min_size=1, max_size=30),
    stops=st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=3),
    size=st.integers(1, 5),
)
def test_a_stop_string_ends_the_text_before_it(processor: Processor, text: str, stops: list[str], size: int) -> None:
    pieces, detokenizer = write(processor, ids_of(processor, text), size, stop=tuple(stops))
    places = [m.start() for s in stops if (m := re.search(re.escape(s), text))]
    assert (detokenizer.finish_reason == "stop") == bool(places)
    assert "".join(pieces) == detokenizer.text
    # words are pieces of several letters: of two stops, the one met first ends it, even if the other began before
    assert text.startswith(detokenizer.text)
    assert not any(s in detokenizer.text for s in stops)
    if size == 1 and not places:
        assert detokenizer.text == text


def test_what_may_become_a_stop_string_waits(processor: Processor) -> None:
    ids = [*ids_of(processor, "x"), *ids_of(processor, "#"), *ids_of(processor, "#"), *ids_of(processor, "y")]
    pieces, _ = write(processor, ids, stop=("##y",))
    assert pieces == ["x", "", "", "", ""]
    pieces, _ = write(processor, ids, stop=("##z",))
    assert pieces == ["x", "", "", "##y", ""]


def test_an_end_mark_ends_the_reply(processor: Processor) -> None:
    end = processor.stop_ids[0]
    pieces, detokenizer = write(processor, [*ids_of(processor, "x"), end, *ids_of(processor, "y")], size=3)
    assert ("".join(pieces), detokenizer.finish_reason) == ("x", "stop")
    assert detokenizer.token_ids == [*ids_of(processor, "x"), end]


def test_a_stop_id_of_the_request(processor: Processor) -> None:
    x, y = ids_of(processor, "x")[0], ids_of(processor, "y")[0]
    pieces, detokenizer = write(processor, [x, y, x], stop_token_ids=(y,))
    assert ("".join(pieces), detokenizer.token_ids, detokenizer.finish_reason) == ("x", [x, y], "stop")


def test_what_is_spoken_ends_with_the_text(processor: Processor) -> None:
    x, y, z = (ids_of(processor, c)[0] for c in "xyz")
    assert write(processor, [x, x, y, z])[1].num_spoken == 4  # the last is never read by the Thinker, and not spoken
    assert write(processor, [x, x, y, z], stop=("yz",))[1].num_spoken == 3  # x, x, and the one that ends them
    assert write(processor, [y, z], stop=("yz",))[1].num_spoken == 1
    assert write(processor, [x, processor.stop_ids[0], y])[1].num_spoken == 2


def test_a_character_cut_by_the_end_of_the_reply(processor: Processor) -> None:
    half = ids_of(processor, "é")[:1]
    assert write(processor, half)[0] == ["", "\N{REPLACEMENT CHARACTER}"]
