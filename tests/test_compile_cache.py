"""Where compiled programs are kept."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from omni_jax.compile_cache import default_folder, keep_compiled_programs

PROGRAM = """
import logging, jax
logging.basicConfig(level=logging.INFO)
from omni_jax.compile_cache import keep_compiled_programs
jax.jit(lambda x: x + 1)(1.0)  # compiled before, and so not kept
print(keep_compiled_programs({argument}))
jax.jit(lambda x: x + 2)(1.0)
"""


def run(argument: str, **environment: str) -> tuple[str, str]:
    """What a new process prints, and logs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    command = [sys.executable, "-c", PROGRAM.format(argument=argument)]
    done = subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_a_folder_of_the_users_own(tmp_path: Path) -> None:
    printed, logged = run("", XDG_CACHE_HOME=str(tmp_path))
    folder = Path(printed)
    assert folder.parent == tmp_path / "omni_jax" / "compiled"
    assert folder.stat().st_mode & 0o077 == 0
    assert len(list(folder.glob("*-cache"))) == 1
    assert f"compiled programs are kept in {folder}" in logged


def test_a_folder_that_was_chosen_stays(tmp_path: Path) -> None:
    printed, _ = run("", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "chosen"))
    assert printed == str(tmp_path / "chosen")
    printed, _ = run(repr(str(tmp_path / "other")), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "chosen"))
    assert printed == str(tmp_path / "other") and list((tmp_path / "other").glob("*-cache"))


def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with caplog.at_level(logging.WARNING, "omni_jax"):
            assert keep_compiled_programs() is None
        assert "compiled programs are not kept" in caplog.text
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_each_kind_of_processor_has_its_own() -> None:
    assert default_folder().name.startswith(os.uname().machine)
