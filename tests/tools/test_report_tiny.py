"""The report on omni-tiny: what is there is told with its numbers, what is not has no section."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from tools.ablate_tmrope import TIMING_TASKS
from tools.report_tiny import MARKERS, count_confusions, insert, make_sections, make_table
from tools.score_world import Answered

PAGE = f"# A page\n\nbefore\n\n{MARKERS[0]}\n## Speech\n\nold\n\n{MARKERS[1]}\n\nafter\n"


def answer(task: str, expected: str, answered: str) -> Answered:
    return Answered(task, "row", expected, answered)


ANSWERED = [
    answer("colour", "The star is red.", "The star is red."),
    answer("colour", "The star is red.", "The star is blue."),
    answer("colour-voice", "The ring is blue.", "The ring is"),
    answer("count", "There are two red stars.", "There are three red stars."),
    answer("order-text", "The ring came last.", "The ring came last."),
    answer("transcribe", "The dog is old.", "The dog is cold."),
]


def test_a_table_is_markdown() -> None:
    assert make_table(("a", "b"), [("x", "1")]) == "| a | b |\n|---|---:|\n| x | 1 |\n"


def test_confusions_are_counted_by_the_last_word_of_the_kind() -> None:
    counts = count_confusions(ANSWERED, ("red", "blue"), ("colour",))
    # by voice too; an answer without such a word is in the last column
    assert counts.tolist() == [[1, 1, 0], [0, 0, 1]]
    # colours of other tasks do not count, nor do plurals hide a word
    assert count_confusions(ANSWERED, ("star",), ("count",)).tolist() == [[1, 0]]


def test_the_report_stands_between_the_markers() -> None:
    page = insert(PAGE, {"Speech": "new\n"})
    assert "old" not in page and "before" in page and "after" in page
    assert insert(page, {"Speech": "new"}) == page == insert(page, {})
    # what another run has told stays, and all are in their order
    both = insert(page, {"Stages": "first"})
    assert 0 < both.index("## Stages\n\nfirst") < both.index("## Speech\n\nnew") < both.index("after")
    for wrong in ("no markers", MARKERS[1] + MARKERS[0], PAGE + PAGE):
        with pytest.raises(InputError, match="once and in this order"):
            insert(wrong, {})
    with pytest.raises(InputError, match="not of the report: 'Notes'"):
        insert(PAGE.replace(MARKERS[1], f"## Notes\n\nby hand\n\n{MARKERS[1]}"), {})


def write(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values) + "\n")


def test_tells_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    page = tmp_path / "omni-tiny.md"
    out.mkdir()
    with pytest.raises(InputError, match="nothing to report"):
        make_sections(out, page)

    log = {"complete": ["texts", "lists"], "seconds": {"texts": 60, "lists": 90}, "devices": {}}
    log["devices"] = dict.fromkeys(log["seconds"], "2 CPU cores")
    write(out / "stages.json", log)
    write(out / "lists" / "best.json", {"step": 9, "loss": 0.25})
    lines = [{"step": 5, "loss": 0.5, "since": 0}, {"step": 9, "loss": 0.25, "since": 0}]
    (out / "lists" / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = insert(PAGE, make_sections(out, page))
    assert "| texts | 1.0 | 2 CPU cores |  |" in report and "| lists | 1.5 | 2 CPU cores | 0.2500 |" in report
    assert (tmp_path / "omni_tiny_curves.png").stat().st_size > 1000
    assert "Answers" not in report and "Ablation" not in report

    (out / "answers.jsonl").write_text("".join(json.dumps(vars(a)) + "\n" for a in ANSWERED))
    write(
        out / "ablation.json",
        {
            f"tmrope {seed}": {task: {"right": 1 + seed, "asked": 4, "nats": 3.0, "tokens": 6} for task in TIMING_TASKS}
            for seed in (0, 1)
        },
    )
    write(out / "robustness.json", {"5 % lost": {"order": {"right": 9, "asked": 10, "refused": 3, "failed": 1}}})
    errors = {"word_errors": 0.125, "interval": [0.05, 0.2]}
    judged = {"sentences": 12, "whisper": errors, "pocketsphinx_closed": errors, "own_voice": 0.75, "dnsmos": 2.5}
    judged["word_times"] = {"all": {"words": 70, "median": 0.0625, "percentile_90": 0.2}, "right": None}
    write(out / "speech.json", {"model": "m", "judges": ["Whisper", "Resemblyzer"], "spoken": judged})
    write(out / "speech_replies.json", {"judges": ["Whisper"], "spoken": {**judged, "sentences": 7}})
    second = {"median": 1.0, "p95": 2.0}
    tasks = {"order": {"first text": second, "sound": second}, "day": {"first text": second}}
    write(out / "latency.json", {"device": "2 cores", "items": 20, "tasks": tasks})
    report = insert(PAGE, make_sections(out, page))
    assert "| stage | order | day |" in report and "| sound | 1.00 (2.00) |  |" in report
    assert "| packets | order | pictures refused | of 10 sessions ended in an error |" in report
    assert "| 5 % lost | 90.0 % (59.6 to 98.2) | 3 | 1 |" in report
    # one of two in text, none of one by voice (Wilson)
    assert "| colour |  | 50.0 % (9.5 to 90.5) of 2 | 0.0 % (0.0 to 79.3) of 1 |" in report
    assert "| order | 100.0 % (20.7 to 100.0) of 1 |  |  |" in report
    assert "Word errors of 1 items of transcribe: 25.0 %" in report
    assert (tmp_path / "omni_tiny_confusions.png").stat().st_size > 1000
    # of 25 and 50 %: the mean, and 12.7 times the standard error
    assert "| as published | 37.5 ± 158.8 |" in report
    assert "| as published | 0.500 ± 0.000 |" in report
    assert "| 5 % lost | 90.0 % (59.6 to 98.2) |" in report
    assert "| spoken | 12 | 12.5 % (5.0 to 20.0) | 12.5 % (5.0 to 20.0) | 75.0 % | 2.50 | 62 ms of 70 |  |" in report
    assert "Judges: Whisper; Resemblyzer." in report
    assert report.index("## Speech\n") < report.index("## Spoken replies\n") < report.index("| spoken | 7 |")
