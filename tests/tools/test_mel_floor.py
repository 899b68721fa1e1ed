"""The table in docs/streaming.md is what the tool prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import mel_floor

# one in the last digit: releases of FFmpeg decode compressed sound to samples that differ a little
TOLERANCES = {True: 0.1, False: 0.001}  # of a share in percent, and of a difference


def read_row(line: str) -> tuple[str, list[str]]:
    """The name of a row, and its four figures."""
    name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    return name, cells[:4]


def test_the_table_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    mel_floor.main()
    text = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
    documented = dict(read_row(line) for line in text.splitlines() if line.startswith("|"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    for line in lines[:2]:  # the heading
        assert line.removesuffix("|  |").rstrip() in text
    for name, cells in map(read_row, lines[2:]):
        for printed, expected in zip(cells, documented[name], strict=True):
            is_share = expected.endswith("%")
            difference = abs(float(printed.rstrip("%")) - float(expected.rstrip("%")))
            assert difference < 1.01 * TOLERANCES[is_share], (name, printed, expected)
