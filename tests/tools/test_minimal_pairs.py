"""Pairs of recordings whose texts are nearly the same, and the stage that they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from omni_jax.data.sources import Row
from omni_jax.data.spoken_rows import SpeechReader
from tests.processes import run
from tools import speech_stages
from tools.make_minimal_pairs import Options, Recording, make_pairs, read_recording
from tools.row_files import read_values, write_values
from tools.speech_stages import SpeechData, SpeechStages


def spoken(text: str, codes: Sequence[int], voice: Any = "slt", **more: Any) -> dict[str, Any]:
    """A row of the Talker."""
    messages = [{"role": "user", "content": "Say something."}, {"role": "assistant", "content": text}]
    speech: dict[str, Any] = {"codec_ids": list(codes), "codec": "abc"}
    if voice is not None:
        speech["voice"] = voice
    return {"messages": messages, "speech": speech, **more}


def recording(text: str, codes: Sequence[int], voice: str = "slt") -> Recording:
    found = read_recording(Row("rows.jsonl", 1, spoken(text, codes, voice)), Path("out.jsonl"))
    assert found is not None
    return found


def pair_texts(recordings: Sequence[Recording], **options: Any) -> dict[str, str]:
    """Of each text the one that it is paired with."""
    rows = make_pairs(recordings, Options(("rows.jsonl",), Path("out.jsonl"), **options))
    return {row["speech"]["chosen"]["text"]: row["speech"]["rejected"]["text"] for row in rows}


def test_one_word_is_another() -> None:
    recordings = [
        recording("The star is red.", [1, 2, 3]),
        recording("The star is blue.", [1, 2, 4]),
        recording("A moon moves up.", [5, 6, 7]),
        recording("A moon moves down.", [5, 6, 8]),
    ]
    assert pair_texts(recordings) == {
        "The star is red.": "The star is blue.",
        "The star is blue.": "The star is red.",
        "A moon moves up.": "A moon moves down.",
        "A moon moves down.": "A moon moves up.",
    }
    assert len(pair_texts(recordings, most=3)) == 3


def test_of_several_the_one_at_the_same_pace() -> None:
    """Its codes are the same for the longest."""
    recordings = [
        recording("It is red.", [1, 2, 3, 4]),
        recording("It is blue.", [1, 9, 9, 9]),
        recording("It is pink.", [1, 2, 3, 9]),
        recording("It is cyan.", [1, 2, 9, 9]),
    ]
    assert pair_texts(recordings)["It is red."] == "It is pink."


def test_where_no_word_alone_differs_it_begins_alike() -> None:
    recordings = [
        recording("A star, then a moon.", [1, 2]),
        recording("A star, and the word cat.", [1, 3]),
        recording("Two rings.", [4, 5]),
    ]
    assert pair_texts(recordings)["A star, then a moon."] == "A star, and the word cat."


def test_partners_have_the_voice_and_nearly_the_length() -> None:
    recordings = [
        recording("It is red.", [1, 2, 3, 4]),
        recording("It is blue.", [1, 2, 3, 5], voice="awb"),
        recording("It is pink.", [1, 2, 3, 4, 5, 6, 7]),
        recording("It is red.", [1, 2, 3, 5]),  # the same words
    ]
    assert pair_texts(recordings) == {}
    assert pair_texts(recordings, max_length_gap=0.75)["It is red."] == "It is pink."


def test_the_same_seed_gives_the_same_pairs() -> None:
    recordings = [recording(f"It is {word}.", [1, 2, number]) for number, word in enumerate("abcdefgh")]
    first = pair_texts(recordings, most=4)
    assert first == pair_texts(recordings, most=4) and first != pair_texts(recordings, most=4, seed=1)


def test_pairs_are_rows_of_preferences(tmp_path: Path) -> None:
    """All that the row has beside its codes stays, and paths of media hold from the new file."""
    (tmp_path / "rows").mkdir()
    picture = "media/a.png"
    rows = [spoken("<image>It is red.", [1, 2, 3]), spoken("It is pink.", [1, 2, 4], images=[picture])]
    nameless = spoken("It is cyan.", [1, 2, 5], voice=None)
    rows[0]["messages"][-1]["content"] = "It is red."
    rows[1]["messages"][0]["content"] = "<image>Which colour?"
    write_values(tmp_path / "rows" / "a.jsonl", rows[:1])
    write_values(tmp_path / "rows" / "b.jsonl", [rows[1], nameless])
    out = tmp_path / "pairs.jsonl"
    command = (
        "tools/make_minimal_pairs.py",
        tmp_path / "rows" / "a.jsonl",
        tmp_path / "rows" / "b.jsonl",
        "--out",
        out,
    )
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "2 pairs of 2 recordings that name a voice" in done.stdout
    pair = next(row for row in read_values(out) if row["speech"]["chosen"]["text"] == "It is pink.")
    assert pair["messages"] == rows[1]["messages"] and pair["images"] == [str(tmp_path / "rows" / picture)]
    assert {key: pair["speech"][key] for key in ("voice", "codec")} == {"voice": "slt", "codec": "abc"}
    answers = SpeechReader(10).read_pair(pair, 0.5).answers
    assert [list(codes) for codes in answers] == [[1, 2, 4], [1, 2, 3]]
    done = run(*command)
    assert done.returncode == 1 and "pairs.jsonl exists already" in done.stderr


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["no row"], "rows.jsonl:1: a row must be an object"),
        ({"text": "It is red."}, "rows.jsonl:1: speech is None; it must be an object with codec_ids"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "messages must end in a reply"),
        (spoken("It is red.", [1, 2], voice=["slt"]), "rows.jsonl:1: speech.voice is"),
        (spoken("It is red.", [1, 2]), "no row has a partner"),
    ],
)
def test_rows_without_pairs(tmp_path: Path, row: Any, reason: str) -> None:
    write_values(tmp_path / "rows.jsonl", [row])
    done = run("tools/make_minimal_pairs.py", tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_the_stage_scores_pairs_of_all_voices_and_trains_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []
    trained: dict[str, Any] = {}
    monkeypatch.setattr(speech_stages, "run", lambda *arguments: ran.append(tuple(map(str, arguments))))
    monkeypatch.setattr(speech_stages.SpeechStages, "_new_voice", lambda self: ("--objective.voices", "heart", 862))

    def train(name: str, *arguments: Any, **options: Any) -> None:
        trained[name] = arguments

    monkeypatch.setattr(speech_stages, "run_recipe", train)
    parts = {part: part for part in ("train", "valid")}
    data = SpeechData(tmp_path, parts, {part: [part] for part in parts})
    stages = SpeechStages(
        tmp_path, data, files=tmp_path, thinker=tmp_path, steps_scale=0.5, preferences=0, talker_size="omni-tiny"
    )
    stages.prefer_words(1000)
    for part, count in (("train", 500), ("valid", 20)):
        rows, pairs = (str(tmp_path / f"{part}_{name}.jsonl") for name in ("codes_spoken", "pairs"))
        assert ("tools/make_minimal_pairs.py", rows, "--out", pairs, "--most", str(count)) in ran
        scored = ("--data.train", pairs, "--out", str(tmp_path / f"{part}_pairs_scored.jsonl"))
        scoring = ("tools/score_pairs.py", "talker-dpo-omni-tiny", "--init", str(tmp_path / "talker3"), *scored)
        assert (*scoring, "--objective.voices", "heart", "862") in ran
    workdir, init, train_rows, valid_rows, *more = trained["talker-dpo-omni-tiny"]
    assert (workdir, init) == (tmp_path / "talker2", tmp_path / "talker3")
    assert [train_rows, valid_rows] == [[tmp_path / f"{part}_pairs_scored.jsonl"] for part in ("train", "valid")]
    assert more == ["--objective.voices", "heart", 862]
    # a short run has as many pairs as a few steps read
    short = SpeechStages(tmp_path, data, files=tmp_path, thinker=tmp_path, steps_scale=0.01, preferences=0)
    ran.clear()
    short.prefer_words(1000)
    assert [arguments[-1] for arguments in ran if arguments[0] == "tools/make_minimal_pairs.py"] == ["64", "4"]


def test_the_command_scores_with_every_recipe_of_preferences() -> None:
    done = run("tools/score_pairs.py", "--help")
    assert "talker-dpo-omni-tiny" in done.stdout and "talker-pretrain" not in done.stdout
