"""The report on many requests: a run of all of it at a tiny size. No times are looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_batch
from benchmarks.batch_requests import Dialogue, make_dialogues
from tests.tools.test_latency_parity import CONFIG, InProcess
from tools import bench

DIALOGUES = tuple(Dialogue(question, 3, 6) for question in ("what do you hear", "what falls", "and what then"))
SLOTS = (1, 2)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("batch")
    out = folder / "out" / "batch.json"
    made = bench_batch.report(CONFIG, folder, DIALOGUES, SLOTS, 2, side=InProcess, json_out=out)
    assert json.loads(out.read_text()) == made
    return made


def test_every_run_answers_all_of_them(results: dict[str, Any]) -> None:
    """That replies have the lengths that were asked for, either side checks itself."""
    assert (results["requests"], results["tokens"], results["speech_seconds"]) == (3, 9, 18 / 50)
    assert [run["name"] for run in results["runs"]] == [
        "PyTorch, spoken one by one",
        "PyTorch, written in batches of 2",
        "omni_jax, spoken, slots: 1",
        "omni_jax, spoken, slots: 2",
        "omni_jax, written, slots: 2",
    ]
    for run in results["runs"]:
        assert run["rates"]["requests"] == pytest.approx(3 / run["seconds"])
        assert ("speech" in run["rates"]) == ("spoken" in run["name"])
    for run in results["runs"][2:]:
        assert run["compilations"] == 0 and all(0 <= share < 1 for share in run["padding"].values())
        assert 0 < sum(run["stages"].values()) <= run["seconds"]


def test_table_and_picture(results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_batch.show(results)
    text = capsys.readouterr().out
    assert "PyTorch, spoken one by one" in text and "omni_jax, spoken, slots: 2" in text and "sound" in text
    bench_batch.draw(results, tmp_path / "deep" / "batch.png")
    assert (tmp_path / "deep" / "batch.png").read_bytes().startswith(b"\x89PNG")


def test_requests_are_the_same_every_time() -> None:
    made = make_dialogues(40, (1, 3))
    assert made == make_dialogues(40, (1, 3)) and len({d.question for d in made}) == 40
    assert [d.codes for d in made[:3]] == [50, 150, 50]
    assert all(2 <= len(d.question.split()) <= 40 for d in made)


def test_wrong_options() -> None:
    with pytest.raises(SystemExit, match="must all be at least 1"):
        bench.main(["batch", "--slots", "0"])
