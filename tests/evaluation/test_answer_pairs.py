"""Which answers become a pair, and files of rows that are resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.errors import InputError
from omni_jax.evaluation.answer_pairs import Pair, PairLimits, Reason, ScoredAnswer, choose_pair


def answer(length: int, reward: float) -> ScoredAnswer:
    return ScoredAnswer((1,) * length, reward)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([answer(10, -0.3), answer(11, 0.0), answer(12, -0.9)], Pair(1, 2)),
        # the best and the worst one differ too much; the next best is nearer
        ([answer(10, 0.0), answer(16, -0.9), answer(15, -0.2)], Pair(2, 1)),
        ([answer(10, 0.0), answer(16, -0.9)], "the lengths differ too much"),
        ([answer(10, -0.1), answer(10, -0.14)], "the answers are alike"),
        ([answer(10, -0.6), answer(10, -0.9)], "all answers are bad"),
        # the best one fits none, and the next one does
        ([answer(30, 0.0), answer(10, -0.2), answer(11, -0.9)], Pair(1, 2)),
        # a bad one is never the better one
        ([answer(30, 0.0), answer(10, -0.6), answer(11, -0.9)], "the lengths differ too much"),
    ],
)
def test_pairs(answers: list[ScoredAnswer], expected: Pair | Reason) -> None:
    assert choose_pair(answers, PairLimits()) == expected


def test_limits_are_checked() -> None:
    with pytest.raises(InputError, match=r"--pairs\.bad-below is 1"):
        PairLimits(bad_below=1).check()


def test_rows_that_are_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    partial = tmp_path / "rows.jsonl.partial"
    with pytest.raises(RuntimeError, match="stopped"), ResumedRows(out, {"seed": 1}) as rows:
        rows.add(0, {"a": "ä"})
        rows.add(1, None, "bad")
        raise RuntimeError("stopped")
    assert not out.exists()
    # a kill may cut a line short
    with partial.open("ab") as file:
        file.write(b'{"number": 2, "row": {"a"')
    with pytest.raises(InputError, match="of a command with other settings"):
        ResumedRows(out, {"seed": 2})
    with ResumedRows(out, {"seed": 1}) as rows:
        assert rows.num_done == 2 and rows.counts == {"": 1, "bad": 1}
        rows.add(2, {"a": 3})
        assert rows.finish() == 2 and rows.counts == {"": 2, "bad": 1}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"a": "ä"}, {"a": 3}]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(InputError, match="exists already"):
        ResumedRows(out, {"seed": 1})
