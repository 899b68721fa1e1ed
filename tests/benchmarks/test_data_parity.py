"""The benchmark of the input pipeline: its media, and that both sides read them. No times are looked at."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from PIL import Image

from benchmarks import bench_data
from benchmarks.bench_timing import measure
from benchmarks.data_files import NAMES, RATE, write_media
from tests.tools.test_bench_parity import InProcess
from tools import bench


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    write_media(path, seconds=(1, 1), size=(320, 240))
    return path


def test_the_media_are_what_they_are_called(folder: Path) -> None:
    with av.open(folder / "sound.wav") as file:
        assert sum(frame.samples for frame in file.decode(audio=0)) == RATE
    assert Image.open(folder / "picture.jpg").size == (320, 240)
    for name, heard in (("silent.mp4", 0), ("video.mp4", 1)):
        with av.open(folder / name) as file:
            assert len(file.streams.audio) == heard
            assert len(list(file.decode(video=0))) == 25


def test_both_sides_read_every_kind(folder: Path) -> None:
    side = InProcess()
    cases = bench_data.cases(side, side, folder)
    assert [case.name for case in cases] == [*NAMES, "one of each, ours packed too"]
    for case in cases:
        result = measure(case, 1, warm_up=False)
        assert result["ours_seconds"] > 0 and result["theirs_seconds"] > 0


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        bench.main(["data", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("--json-out", "--repeats", "one core", "Example"))
