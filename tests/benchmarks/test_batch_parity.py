"""The report on many requests: a run of all of it at a tiny size. No times are looked at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.batch import BatchResults, draw_results, make_requests, print_results, run_all
from benchmarks.side import ReplyRequest
from tests.benchmarks.conftest import InProcess

pytestmark = pytest.mark.long

REQUESTS = [ReplyRequest(question, 3, 6) for question in ("what do you hear", "what falls", "and what then")]


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BatchResults:
    out = tmp_path_factory.mktemp("batch") / "out" / "batch.json"
    made = run_all(folder, REQUESTS, (1, 2), 2, out, InProcess)
    assert json.loads(out.read_text()) == asdict(made)
    return made


def test_every_run_answers_all_of_them(results: BatchResults) -> None:
    """That replies have the lengths that were asked for, either side checks itself."""
    assert (results.requests, results.tokens, results.speech_seconds) == (3, 9, 18 / 50)
    assert [run.name for run in results.runs] == [
        "PyTorch, spoken one by one",
        "PyTorch, written in batches of 2",
        "omni_jax, spoken, slots: 1",
        "omni_jax, spoken, slots: 2",
        "omni_jax, written, slots: 2",
    ]
    for run in results.runs:
        assert run.rates["requests"] == pytest.approx(3 / run.throughput.seconds)
        assert ("speech" in run.rates) == run.spoken == ("spoken" in run.name)
    for run in results.runs[2:]:
        assert run.throughput.compilations == 0
        assert all(0 <= share < 1 for share in run.throughput.padding.values())
        assert 0 < sum(run.throughput.stages.values()) <= run.throughput.seconds


def test_table_and_picture(results: BatchResults, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_results(results)
    text = capsys.readouterr().out
    assert "PyTorch, spoken one by one" in text and "omni_jax, spoken, slots: 2" in text and "sound" in text
    draw_results(results, tmp_path / "deep" / "batch.png")
    assert (tmp_path / "deep" / "batch.png").read_bytes().startswith(b"\x89PNG")


def test_requests_are_the_same_every_time() -> None:
    requests = make_requests(40, (1, 3))
    assert requests == make_requests(40, (1, 3))
    assert len({request.question for request in requests}) == 40
    assert [request.num_codes for request in requests[:3]] == [50, 150, 50]
    assert all(2 <= len(request.question.split()) <= 40 for request in requests)
