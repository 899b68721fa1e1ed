"""The page that goes from a folder of sounds to a model, at a small size; rows from a table, and word errors."""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from omni_jax.errors import InputError
from omni_jax.training.metrics_log import EVALUATIONS_FILE, read_metrics
from tests.test_readme import ROOT, read_commands
from tools import make_rows
from tools.word_errors import Options, measure

SMALLER = {"train.py": ["--steps", "2", "--data.tokens", "256"], "tools/word_errors.py": ["--max-tokens", "2"]}


def test_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sounds = tmp_path / "sounds"
    sounds.mkdir()
    for number in range(1, 11):
        shutil.copy(ROOT / "tests" / "media" / "speech.wav", sounds / f"{number}.wav")
    lines = [f"{number}.wav,the fox {number}" for number in range(1, 11)]
    (sounds / "table.csv").write_text("\n".join(["file,text", *lines]))
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(command) for command in read_commands(ROOT / "docs" / "training.md")]
    begin = commands.index(["pip", "install", "-e", ".[eval,plots]"])
    files = ["tools/make_rows.py", "train.py", "tools/word_errors.py", "serve.py"]
    assert [command[1] for command in commands[begin + 1 : begin + 5]] == files
    for _, file, *arguments in commands[begin + 1 : begin + 5]:
        if file == "serve.py":
            arguments += ["--max-tokens", "2", "--no-isolate-media"]
        monkeypatch.setattr(sys, "argv", [file, *arguments, *SMALLER.get(file, [])])
        try:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        except SystemExit as e:
            assert not e.code, (file, e.code)
    out = capsys.readouterr().out
    assert "9 rows to train on, 1 held out" in out and "valid.jsonl: " in out and "% word errors" in out
    assert read_metrics(tmp_path / "runs" / "asr" / EVALUATIONS_FILE)
    (answer,) = (json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines())
    assert answer["expected"] == "the fox 10"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,text\na.wav,x\n", "has no column 'file'; it has path, text"),
        ("file,text\nb.wav,x\n", r"line 2: there is no file .*b.wav"),
        ("file,text\na.wav,x\na.wav, \n", "line 3: there is no text"),
        ("file,text\n", "has no lines below its heading"),
        (b"file,text\n\xff", "is no csv file in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used(text: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    table = tmp_path / "table.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        make_rows.make_rows(make_rows.Options(table, tmp_path / "rows.jsonl"))
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_without_a_reply(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    question = {"role": "user", "content": "a"}
    rows.write_text("\n".join(json.dumps(row) for row in ({"text": "a"}, {"messages": [question]})) + "\n")
    with pytest.raises(InputError, match="no row is a dialogue that ends in a reply"):
        measure(Options(tmp_path, (rows,)))
    with pytest.raises(InputError, match="--batch-size is 0"):
        measure(Options(tmp_path, (rows,), batch_size=0))
