"""Lines in: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.serving import batch_lines
from omni_jax.serving.batch_lines import Line, LineError, SeenIds, parse_line, read_lines
from tests.serving import requests


def test_lines_and_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"one\n\n  \ntwo\nthree")
    lines = list(read_lines(str(path)))
    assert [(line.number, (line.data or b"").strip()) for line in lines] == [(1, b"one"), (4, b"two"), (5, b"three")]
    assert list(read_lines(str(path), lines[1].number, lines[1].offset)) == lines[1:]


def test_a_line_that_is_too_long_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 10)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"short\n" + b"x" * 35 + b"\nshort\n" + b"y" * 11)
    lines = list(read_lines(str(path)))
    assert [(line.number, line.data is None) for line in lines] == [(1, False), (2, True), (3, False), (4, True)]
    with pytest.raises(LineError, match="longer than 10 bytes"):
        parse_line(lines[1])


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        list(read_lines(str(tmp_path / "nothing.jsonl")))


@pytest.mark.parametrize("number", range(7))
def test_good_lines(number: int) -> None:
    custom_id, request = parse_line(Line(1, requests.good(number).encode()))
    assert custom_id == f"good-{number}" and request.return_token_ids
    assert request.options.speaks == (number % 5 == 0)
    if request.options.speaks:
        assert (request.options.noise_seed, request.options.voice) == (number, "Ethan")
    for message in request.messages:
        for part in message.media:
            assert part.kind == "audio" or part.options["max_pixels"] == requests.SMALL["max_pixels"]


def test_custom_ids() -> None:
    seen = SeenIds()
    assert seen.add("a") and seen.add("b") and not seen.add("a")
    assert seen.add("\ud800")  # half a character, which JSON can hold
