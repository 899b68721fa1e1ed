"""Pairs and distilled rows from a tiny random model and recognisers that are made up, end to end."""

from __future__ import annotations

import dataclasses
import json
import wave
from pathlib import Path
from typing import Any

import pytest

from omni_jax import SPEECH_SYSTEM_PROMPT
from omni_jax.data.preference_pairs import PreparePairs
from omni_jax.data.sources import open_rows
from omni_jax.data.spoken_examples import PrepareSpoken, SpokenExample
from omni_jax.errors import InputError
from omni_jax.evaluation.answer_pairs import PairLimits
from omni_jax.evaluation.spoken_answers import make_seed, read_spoken_text
from omni_jax.processing.processor import Processor
from tools import make_pairs, self_distill

TEXT = "Red blue, green white."
HERE = "tests.evaluation.fake_recognizers"
SPOKEN = {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": TEXT}], "id": 7}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"text": TEXT}, SPOKEN, {"text": TEXT})) + "\n")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(kind: type[PrepareSpoken], model: Path, path: Path, **settings: Any) -> list[SpokenExample]:
    """The examples that training makes of rows."""
    made = kind(
        processor=Processor.load(model),
        max_length=512,
        check=lambda _: None,
        voices={"Ethan": 1},
        codec="0123456789abcdef",
        **settings,
    )
    return [made.example(row) for row in open_rows(str(path))]


def test_pairs(tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pairs.jsonl"
    options = make_pairs.Options(
        rows=str(rows),
        out=out,
        model=tiny_model,
        recognizer=f"{HERE}:crash_the_third_time",
        voices=("Ethan",),
        answers=6,
        max_codes=100,
        codec="0123456789abcdef",
        pairs=PairLimits(bad_below=-2.0, max_length_gap=5.0),
    )
    # a recogniser that fails ends the command, and what was made stays
    assert make_pairs.main(options) == 1
    assert f"recogniser {HERE}:crash_the_third_time: RuntimeError: out of memory" in capsys.readouterr().err
    assert not out.exists() and out.with_name("pairs.jsonl.partial").exists()
    assert make_pairs.main(options) == 0
    printed = capsys.readouterr().out
    made = read(out)
    assert f"{len(made)} pairs of 3" in printed and len(made) >= 2
    for row in made:
        speech = row["speech"]
        assert (speech["voice"], speech["codec"]) == ("Ethan", "0123456789abcdef")
        chosen = speech["chosen"]
        rejected = speech["rejected"]
        assert chosen["score"]["reward"] >= rejected["score"]["reward"] + 0.05 - 1e-4
        assert len(chosen["codec_ids"]) < 100 and chosen["score"]["num_words"] == 4
        assert row["messages"][-1] == {"role": "assistant", "content": TEXT}
    assert made[0]["messages"][0] == {"role": "system", "content": SPEECH_SYSTEM_PROMPT}
    # training takes them as they are
    pairs = prepare(PreparePairs, tiny_model, out, max_length_gap=5.0)
    assert [example.answers[0].tolist() for example in pairs] == [row["speech"]["chosen"]["codec_ids"] for row in made]
    # the same seeds give the same pairs, where nothing fails too
    again = tmp_path / "again.jsonl"
    assert make_pairs.main(dataclasses.replace(options, out=again, recognizer=f"{HERE}:hear_some_of_four")) == 0
    assert read(again) == made
    # nothing is a pair where everything is bad
    none = tmp_path / "none.jsonl"
    strict = dataclasses.replace(
        options, out=none, recognizer=f"{HERE}:hear_some_of_four", pairs=PairLimits(bad_below=0)
    )
    assert make_pairs.main(strict) == 0
    assert read(none) == [] and "3 without: all answers are bad" in capsys.readouterr().out


def test_distilled_rows(tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "distilled.jsonl"
    options = self_distill.Options(
        rows=str(rows),
        out=out,
        model=tiny_model,
        recognizer=f"{HERE}:hear_some_of_four",
        max_word_errors=0.25,
        voices=("Ethan",),
        attempts=4,
        max_codes=100,
        temperature=1.0,
        batch_size=2,
        codec="0123456789abcdef",
    )
    assert self_distill.main(options) == 0
    made = read(out)
    assert f"{len(made)} rows of 3" in capsys.readouterr().out and made
    for row in made:
        with wave.open(str(tmp_path / row["sound"])) as file:
            assert file.getnframes() == 480 * len(row["speech"]["codec_ids"])
        assert row["word_errors"] <= 0.25 and set(row["speech"]) == {"codec_ids", "voice", "codec"}
    examples = prepare(PrepareSpoken, tiny_model, out)
    assert [example.answers[0].tolist() for example in examples] == [row["speech"]["codec_ids"] for row in made]
    # none is as good as this
    none = tmp_path / "none.jsonl"
    assert (
        self_distill.main(
            dataclasses.replace(options, out=none, max_word_errors=0.0, recognizer=f"{HERE}:hear_two_words")
        )
        == 0
    )
    assert read(none) == [] and "without: too many word errors" in capsys.readouterr().out


def test_what_cannot_be_spoken(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    options = self_distill.Options(str(rows), tmp_path / "out.jsonl", tiny_model, f"{HERE}:hear_two_words")
    for row, message in (
        ({"text": " "}, "text is ' '; it must be what is to be spoken"),
        ({"messages": SPOKEN["messages"][:1]}, "messages must end in a reply with a text"),  # type: ignore[index]
    ):
        rows.write_text(json.dumps(row) + "\n")
        assert self_distill.main(options) == 1
        assert message in capsys.readouterr().err


def test_media_are_found_from_another_folder(tmp_path: Path) -> None:
    content = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "What?"}]
    row = {"messages": [{"role": "user", "content": content}, SPOKEN["messages"][1]]}  # type: ignore[index]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    source = open_rows(str(path))[0]
    beside = read_spoken_text(source, tmp_path / "out.jsonl")
    assert beside.values["messages"] == row["messages"] and beside.text == TEXT
    elsewhere = read_spoken_text(source, tmp_path / "other" / "out.jsonl")
    assert elsewhere.values["messages"][0]["content"][0]["audio"] == str(tmp_path.resolve() / "a.wav")
    with pytest.raises(InputError, match="must end in a reply"):
        path.write_text(json.dumps({"messages": []}) + "\n")
        read_spoken_text(open_rows(str(path))[0], path)


def test_seeds_are_all_different() -> None:
    seeds = {make_seed(seed, row, answer) for seed in range(3) for row in range(200) for answer in range(8)}
    assert len(seeds) == 3 * 200 * 8
