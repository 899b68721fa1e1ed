"""The tool that writes ArrayRecord."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tyro

from omni_jax.config import OmniConfig
from omni_jax.data.examples import Prepare
from omni_jax.data.sources import open_rows
from omni_jax.errors import InputError
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.processing.worker_pool import MediaLimits
from tools import make_arrayrecord
from tools.make_arrayrecord import Embedding, record, write

MEDIA = Path(__file__).parents[1] / "media"


def talk(content: Any, **rest: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A fox."}], **rest}


ROWS = [
    {"text": "once é"},
    talk("<image>?", images=["media/picture.png"]),
    talk([{"type": "audio_url", "audio_url": {"url": "media/speech.wav"}}]),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of rows with media beside it."""
    path = tmp_path / "in" / "rows.jsonl"
    (path.parent / "media").mkdir(parents=True)
    for name in ("picture.png", "speech.wav"):
        (path.parent / "media" / name).write_bytes((MEDIA / name).read_bytes())
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    folder = tmp_path / "processor"
    folder.mkdir()
    write_tokenizer(folder, OmniConfig.tiny())
    OmniConfig.tiny().save(folder)
    return Prepare(Processor.load(folder), 512, lambda example: None, media_root=str(tmp_path))


@pytest.mark.parametrize("embed", [None, Embedding()])
def test_rows_say_the_same_from_another_place(
    rows: Path, prepare: Prepare, tmp_path: Path, embed: Embedding | None
) -> None:
    steps: list[tuple[int, int]] = []
    path = tmp_path / "out" / "deep" / "rows.arrayrecord"
    assert write(str(rows), path, embed=embed, progress=lambda n, of: steps.append((n, of))) == 3
    assert steps == [(i, 3) for i in range(4)] and list(path.parent.iterdir()) == [path]
    expected = [prepare(row) for row in open_rows(str(rows))]
    if embed:
        (rows.parent / "media").rename(tmp_path / "gone")
    for row, example in zip(open_rows(str(path)), expected, strict=True):
        (found,) = prepare(row)
        jax.tree.map(np.testing.assert_array_equal, found, example[0].replace(name=found.name))
    if not embed:
        assert b'"../../in/media/picture.png"' in open_rows(str(path))[1].contents


def test_nothing_is_left_of_what_failed(rows: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.arrayrecord"
    with rows.open("a") as file:
        file.write("[]\n")
    with pytest.raises(InputError, match=r"rows.jsonl:4: a row must be an object, got list"):
        write(str(rows), path, progress=lambda n, of: None)
    (rows.parent / "media" / "picture.png").unlink()
    with pytest.raises(InputError, match=r"rows.jsonl:2: 'media/picture.png': no such file"):
        write(str(rows), path, embed=Embedding(), progress=lambda n, of: None)
    assert not list(tmp_path.glob("rows.arrayrecord*"))
    path.touch()
    with pytest.raises(InputError, match="exists already"):
        write(str(rows), path, progress=lambda n, of: None)


def test_the_command_line(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.arrayrecord"
    # once as a file that runs by itself; the rest in this process, for it is the same code
    tool = [sys.executable, make_arrayrecord.__file__, rows, path]
    done = subprocess.run(tool, capture_output=True, text=True, check=True)
    assert f"{path}: 3 rows" in done.stdout.replace("\n", "")
    with pytest.raises(SystemExit, match=r"error: .*rows.arrayrecord exists already"):
        tyro.cli(make_arrayrecord.main, args=[str(rows), str(path)])
    with pytest.raises(SystemExit) as shown:
        tyro.cli(make_arrayrecord.main, args=["--help"])
    assert shown.value.code == 0
    text = capsys.readouterr().out
    assert "--embed" in text
    assert "--data.train" in text


def test_names_with_colons_are_paths(rows: Path, tmp_path: Path) -> None:
    """They stay so when they are rewritten, and are found when they are embedded."""
    sound = rows.parent / "call-12:30.wav"
    (rows.parent / "media" / "speech.wav").rename(sound)
    rows.write_text(json.dumps(talk("<audio>?", audios=[sound.name])))
    (row,) = open_rows(str(rows))
    workers = MediaWorkers(None, 1, MediaLimits())
    moved = json.loads(record(row, rows.parent, None, workers))
    assert moved["audios"] == ["call-12:30.wav"]
    moved = json.loads(record(row, tmp_path, None, workers))
    assert moved["audios"] == ["in/call-12:30.wav"]
    (embedded,) = json.loads(record(row, tmp_path, Embedding(), workers))["audios"]
    assert base64.b64decode(embedded.partition(",")[2]) == sound.read_bytes()
