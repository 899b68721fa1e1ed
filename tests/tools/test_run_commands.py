"""Stages of programs, stopped and run again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.run_commands import ROOT, Stages, run

# saves when it is told to stop, as training does
PROGRAM = """
import signal, sys, time
from pathlib import Path
saved = Path(sys.argv[1])
if saved.exists():
    print("goes on", flush=True)
    sys.exit(0)
def save(*_):
    saved.write_text("half")
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
print("begins", flush=True)
time.sleep(60)
"""
DEMO = """
import sys
from pathlib import Path
from tools.run_commands import Stages, exit_on_sigterm, run
exit_on_sigterm()
folder = Path(sys.argv[1])
Stages(folder / "stages.json").run("training", lambda: run(folder / "program.py", folder / "saved"))
"""


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DEMO, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_stage_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = _start(tmp_path)
    assert process.stdout is not None
    lines = iter(process.stdout)
    while next(lines) != "begins\n":
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    # the program was told, and its end was waited for
    assert (tmp_path / "saved").read_text() == "half"
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert stages["complete"] == [] and stages["seconds"]["training"] > 0

    before = stages["seconds"]["training"]
    output, _ = _start(tmp_path).communicate(timeout=30)
    assert "goes on" in output
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert stages["complete"] == ["training"] and stages["seconds"]["training"] > before


def test_a_complete_stage_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Stages(tmp_path / "stages.json").run("data", lambda: time.sleep(0.01))
    Stages(tmp_path / "stages.json").run("data", lambda: pytest.fail("it is complete"))
    assert "data: complete" in capsys.readouterr().out


def test_a_program_that_fails_names_itself(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit, match=r"fails.py ended with 3; run the same command to go on"):
        run(program)
