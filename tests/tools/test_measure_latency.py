"""Latency of spoken answers is told by task and by stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from omni_jax.errors import InputError
from tests.tools.tone_world import make_test_rows
from tools.measure_latency import Options, measure, show, summarize


def test_each_figure_has_its_median() -> None:
    timed = [{"first text": 1.0, "sound": 0.0}, {"first text": 3.0, "first sound": 4.0, "sound": 1.0}]
    found = summarize(timed)
    assert found["first text"] == {"median": 2.0, "p95": pytest.approx(2.9)}
    assert found["first sound"] == {"median": 4.0, "p95": 4.0} and found["sound"]["median"] == 0.5


def test_spoken_answers_are_timed(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = make_test_rows(tmp_path, ("day",))
    options = Options(tiny_model, rows, tmp_path / "out.json", ("day",), items=1, max_tokens=6, max_codes=8)
    found = measure(options)
    figures = {name: figure["median"] for name, figure in found["day"].items()}
    assert 0 < figures["first text"] < figures["whole reply"] and 0 < figures["first sound"] <= figures["whole reply"]
    assert figures["sound"] > 0 and all(figures[name] > 0 for name in ("prefill", "decode", "talker", "token2wav"))
    show(found)
    assert "first sound" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"has no rows of opposite-voice, .*; it has day, day-voice"):
        measure(Options(tiny_model, rows, tmp_path / "out.json"))
