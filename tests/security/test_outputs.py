"""What is written: no file but our own is changed, by whatever name; and a terminal is told nothing but text."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import serve
from omni_jax.checks import printable
from omni_jax.data.examples import Reject
from omni_jax.data.rejects import RejectsFile
from omni_jax.errors import InputError
from omni_jax.plain_files import create_file, open_own_file, replace_file
from omni_jax.serving.batch_lines import Line, make_result
from omni_jax.serving.batch_progress import BatchProgress
from omni_jax.serving.batch_results import KnownResults, open_results
from omni_jax.serving.batch_runner import _write_file
from omni_jax.serving.wav import GrowingWav
from omni_jax.training.metrics_log import MetricsLog

LINE = make_result(Line(1, b""), "a", {}).encode() + b"\n"
ESCAPE = "\x1b]0;title\x07\x1b[31m[bold]red[/bold]\x9b2J"


def open_as_results(path: Path) -> None:
    with open_results(str(path)):
        pass


def open_as_wav(path: Path) -> None:
    with GrowingWav(path, 24_000):
        pass


def open_as_rejects(path: Path) -> None:
    RejectsFile(path).add(Reject("rows.jsonl", 1, "no"))


OPENERS = [open_as_results, open_as_wav, open_as_rejects]


class TestFilesOfOthers:
    """A file that is not ours stays as it is."""

    @pytest.mark.parametrize("use", OPENERS)
    @pytest.mark.parametrize(
        "data",
        [
            b"my notes",
            b"my notes\nand more",
            b'{"id": "batch_req_',
            b"RIFF but no sound",
            b"[" * 100_000 + b"\n",
            b"\xff\xfe\n",
            b"\n",
            b"\0" * 20,
        ],
    )
    def test_it_is_refused(self, tmp_path: Path, use: Callable[[Path], None], data: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"/file "):
            use(path)
        assert path.read_bytes() == data

    @pytest.mark.parametrize("use", OPENERS)
    @pytest.mark.parametrize("exists", [True, False])
    def test_a_link_is_not_followed(self, tmp_path: Path, use: Callable[[Path], None], exists: bool) -> None:
        target = tmp_path / "target"
        if exists:
            target.write_bytes(b"")
        (tmp_path / "file").symlink_to(target)
        with pytest.raises(InputError, match="is a link; name the file itself"):
            use(tmp_path / "file")
        assert target.read_bytes() == b"" if exists else not target.exists()

    @pytest.mark.parametrize("use", OPENERS)
    def test_a_pipe_is_not_waited_for(self, tmp_path: Path, use: Callable[[Path], None]) -> None:
        os.mkfifo(tmp_path / "file")
        with pytest.raises(InputError, match="is no plain file"):
            use(tmp_path / "file")

    @pytest.mark.parametrize("use", OPENERS)
    def test_our_own_is_taken_again(self, tmp_path: Path, use: Callable[[Path], None]) -> None:
        use(tmp_path / "file")
        use(tmp_path / "file")

    def test_a_torn_line_is_cut_behind_a_whole_one(self, tmp_path: Path) -> None:
        path = tmp_path / "results.jsonl"
        path.write_bytes(LINE + b'{"id": "batch')
        open_as_results(path)
        assert path.read_bytes() == LINE

    def test_an_earlier_sound_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "reply.wav"
        for length in (1000, 10):
            with GrowingWav(path, 24_000) as wav:
                wav.write(np.zeros(length, np.float32))
        assert path.stat().st_size == 44 + 2 * 10


class TestUnfinishedFiles:
    """Whoever can write into a folder may lay links where a file is about to be written."""

    def plant(self, folder: Path, *names: str) -> Path:
        victim = folder / "victim"
        victim.write_text("mine")
        for name in names:
            (folder / name).symlink_to(victim)
        return victim

    def test_speech(self, tmp_path: Path) -> None:
        victim = self.plant(tmp_path, ".a.wav.part", "a.wav")
        _write_file(str(tmp_path / "a.wav"), b"sound")
        assert victim.read_text() == "mine"
        assert (tmp_path / "a.wav").read_bytes() == b"sound" and not (tmp_path / "a.wav").is_symlink()

    def test_metrics(self, tmp_path: Path) -> None:
        victim = self.plant(tmp_path, "metrics.tmp", "metrics.jsonl")
        MetricsLog(tmp_path, 0, 1, 1).close()
        assert victim.read_text() == "mine"

    def test_a_new_file_takes_no_name_that_is_taken(self, tmp_path: Path) -> None:
        victim = self.plant(tmp_path, "link")
        for path in (victim, tmp_path / "link"):
            with pytest.raises(FileExistsError):
                create_file(path)
        with pytest.raises(InputError, match="is a link"):
            open_own_file(tmp_path / "link")
        assert victim.read_text() == "mine"

    def test_a_link_that_is_laid_after_it_was_looked_for(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        victim = self.plant(tmp_path, "link")
        monkeypatch.setattr(Path, "is_symlink", lambda path: False)
        with pytest.raises(OSError, match="symbolic links"):
            open_own_file(tmp_path / "link")
        assert victim.read_text() == "mine"

    def test_nothing_is_left_of_what_fails(self, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError):
            replace_file(tmp_path / "folder", b"")
        assert [path.name for path in tmp_path.iterdir()] == ["folder"]


class TestTerminal:
    """Escape sequences and markup of files and requests are shown, and not obeyed."""

    def test_text_stays_and_control_characters_do_not(self) -> None:
        assert printable("Grüße\t你好\n[bold]") == "Grüße\t你好\n[bold]"
        assert printable(ESCAPE) == r"\x1b]0;title\x07\x1b[31m[bold]red[/bold]\x9b2J"
        assert printable("a\rb\ud800") == r"a\rb\ud800"

    def test_errors(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert serve.main(["chat", "--model", f"/nowhere/{ESCAPE}", "--text", "a"]) == 1
        printed = capsys.readouterr()
        assert r"\x1b]0;title\x07\x1b[31m[bold]red[/bold]\x9b2J" in printed.err.replace("\n", "")
        assert not set("\x1b\x07\x9b") & set(printed.err + printed.out)

    def test_progress_of_a_batch(self) -> None:
        file = io.StringIO()
        progress = BatchProgress(Console(file=file, width=200, markup=False), 1, KnownResults({}))
        with progress:
            progress.set_phase(f"loading {ESCAPE}")
        assert "[bold]red[/bold]" in file.getvalue() and not set("\x1b\x07\x9b") & set(file.getvalue())

    def test_what_a_run_prints(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        log = MetricsLog(tmp_path, 0, 1, 1)
        log.print(f"checkpoint {ESCAPE}")
        log.close()
        printed = capsys.readouterr().out
        assert "[bold]red[/bold]" in printed and not set("\x1b\x07\x9b") & set(printed)

    def test_answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from omni_jax.engine.outputs import Event
        from omni_jax.serving import chat

        out = io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        events = iter([Event(text=ESCAPE), Event(text="end", reply=object())])  # type: ignore[arg-type]
        chat._play(events, None, lambda: None)
        assert out.getvalue() == printable(ESCAPE) + "end"
