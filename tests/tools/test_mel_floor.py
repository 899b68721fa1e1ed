"""The table in docs/streaming.md is what the tool prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import mel_floor


def test_the_table_of_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    mel_floor.main()
    text = (Path(__file__).parents[2] / "docs" / "streaming.md").read_text(encoding="utf-8")
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 10
    for row in rows:
        assert row.removesuffix("|  |").rstrip() in text
