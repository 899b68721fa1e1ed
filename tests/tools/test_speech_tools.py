"""Tools that make rows of speech: sentences of a grammar, and rows for the Talker."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from omni_jax.data.sources import Row
from omni_jax.evaluation.spoken_answers import read_spoken_text
from tests.processes import run
from tools import speech_stages
from tools.make_speech import VOICES, Options, make_rows, plan_utterances
from tools.make_spoken_rows import Options as SpokenOptions
from tools.make_spoken_rows import make_rows as make_spoken_rows
from tools.row_files import write_values
from tools.speech_stages import SpeechData, SpeechStages


def test_sentences_are_held_out() -> None:
    planned = plan_utterances(Options(Path("out"), sentences=50, held_out=5))
    texts = {part: [utterance.text for utterance in own] for part, own in planned.items()}
    assert len(texts["train"]) == 50 * len(VOICES) and len(texts["test"]) == 5 * len(VOICES)
    everything = [text for own in texts.values() for text in own]
    assert len(set(everything)) == len(everything)
    # the same seed gives the same sentences, another one others
    assert plan_utterances(Options(Path("out"), sentences=50, held_out=5)) == planned
    assert plan_utterances(Options(Path("out"), sentences=50, held_out=5, seed=1)) != planned


def test_the_words_of_held_out_sentences_are_in_others() -> None:
    planned = plan_utterances(Options(Path("out"), sentences=400, held_out=24))
    words = {}
    for part, own in planned.items():
        text = " ".join(utterance.text for utterance in own)
        words[part] = set(re.findall(r"[a-z]+", text.lower()))
    assert words["test"] <= words["train"]


def test_phrases_have_a_file_of_their_own() -> None:
    """Those of sentences stay as they are."""
    plain = plan_utterances(Options(Path("out"), sentences=30, held_out=2))
    planned = plan_utterances(Options(Path("out"), sentences=30, held_out=2, phrases=20))
    phrases = planned.pop("phrases")
    assert planned == plain and len(phrases) == 20 * len(VOICES)
    assert len({utterance.path for utterance in phrases}) == len(phrases)
    for phrase in phrases:
        text = phrase.text
        assert 1 <= len(re.findall("[A-Za-z]+", text)) <= 4 and text[0].isupper() and text.endswith(".")


def test_clips_are_of_the_same_voice() -> None:
    planned = plan_utterances(Options(Path("out"), sentences=3, held_out=1))
    for row in make_rows(planned["train"]):
        assert Path(row["ref_audio"]).name.startswith(row["voice"]) and row["ref_audio"] != row["audio"]


def utterances(count: int) -> list[dict]:
    return [
        {"text": f"Text {n}.", "codec_ids": [n], "codec": "0f", "voice": "ab"[n % 2], "audio": f"{n}.wav"}
        for n in range(count)
    ]


def test_rows_for_the_talker() -> None:
    rows = make_spoken_rows(utterances(400), SpokenOptions("rows", Path("out"), clips=0.5))
    # the prompt of what the model is asked to speak
    spoken = read_spoken_text(Row("rows.jsonl", 1, {"text": "Text 0."}), Path("out"))
    assert rows[0]["messages"] == spoken.values["messages"]
    with_clip = 0
    without_name = 0
    for number, row in enumerate(rows):
        assert row["messages"][-1] == {"role": "assistant", "content": f"Text {number}."}
        speech = row["speech"]
        assert speech["codec_ids"] == [number] and speech["codec"] == "0f"
        if "ref" in speech:
            with_clip += 1
            (clip,) = speech["ref"]["codec_ids"]
            assert clip % 2 == number % 2 and clip != number and speech["ref"]["text"] == f"Text {clip}."
        assert "voice" in speech or "ref" in speech
        without_name += "voice" not in speech
    # of 400 draws with a chance of a half and a quarter, more than four deviations around the mean
    assert 160 < with_clip < 240 and 65 < without_name < 135


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"text": "a"}', "rows.jsonl:1: it has no codec_ids; tools/make_codes.py adds them"),
        ('{"codec_ids": [1]}', "text is None; it must be what is said"),
    ],
)
def test_rows_that_cannot_be_spoken(tmp_path: Path, row: str, reason: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    done = run("tools/make_spoken_rows.py", tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 1 and reason in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_as_a_command(tmp_path: Path) -> None:
    lines = [json.dumps(values) for values in utterances(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    done = run("tools/make_spoken_rows.py", tmp_path / "rows.jsonl", tmp_path / "out.jsonl", "--question", "Say {text}")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["messages"][1]["content"] for row in found] == ["Say Text 0.", "Say Text 1.", "Say Text 2."]


def test_the_talker_begins_from_the_thinker_and_token2wav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []
    initial: dict[str, Path] = {}
    monkeypatch.setattr(speech_stages, "run", lambda *arguments: ran.append(tuple(map(str, arguments))))
    trained: list[Path] = []

    def train(name: str, workdir: Path, init: Path, rows: list[Path], *rest: object, **options: object) -> None:
        initial[name] = init
        trained[:] = rows

    monkeypatch.setattr(speech_stages, "run_recipe", train)
    for part in ("train", "valid"):
        write_values(tmp_path / f"{part}_codes.jsonl", utterances(2))
    parts = {part: part for part in ("train", "valid")}
    data = SpeechData(tmp_path, parts, {part: [part] for part in parts})
    thinker = tmp_path / "thinker"
    stages = SpeechStages(tmp_path, data, files=tmp_path / "files", thinker=thinker, steps_scale=1.0, preferences=0)
    stages.train_talker()
    joined = tmp_path / "joined"
    assert initial == {"talker-pretrain-mini": joined}
    assert ("tools/pack_checkpoint.py", str(tmp_path / "distilled"), str(joined), "--thinker", str(thinker)) in ran
    assert not any("--question" in arguments for arguments in ran)  # all is read aloud
    assert [path.name for path in trained] == ["train_flite_spoken.jsonl"]
    # with replies texts are answers, too, that stand in no question
    replying = dataclasses.replace(data, replies=parts)
    stages = SpeechStages(tmp_path, replying, files=tmp_path / "files", thinker=thinker, steps_scale=1.0, preferences=0)
    stages.train_talker()
    answers = tmp_path / "train_flite_answers.jsonl"
    made = ("tools/make_spoken_rows.py", str(tmp_path / "train_flite.jsonl"), str(answers))
    assert (*made, "--question", "Say something.") in ran
    assert answers in trained
