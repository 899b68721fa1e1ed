"""An error in one of several processes ends all of them, with its message and within seconds.

Without this the others would wait for the failed one in a collective until jax gives it up, which takes minutes. What
the processes have in common is the run's folder, so a process that fails leaves a file there, which the others look
for. A process in a collective cannot be interrupted, so they end without more ado.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from omni_jax.checks import printable
from omni_jax.distributed import barrier, is_main_process
from omni_jax.errors import CheckpointError, ConfigError, InputError, TrainingError
from omni_jax.plain_files import replace_file

FAILURES_FOLDER = "failures"
_LOOK_EVERY = 1.0  # seconds
_LONGEST_WAIT = 20.0  # seconds that the process that failed waits for the others
STATUS = 1  # that a program exits with after an error


class FailureWatch:
    """Tells the other processes of an error in this one, and ends this one after an error in another."""

    def __init__(self, workdir: Path) -> None:
        """Begins to look; all processes call it, before anything that may fail in one of them alone.

        Args:
          workdir: the run's folder, which all processes see.
        """
        self._folder = workdir / FAILURES_FOLDER
        self._finish: Callable[[], None] = lambda: None
        self._stopped = threading.Event()
        if jax.process_count() == 1:
            return
        if is_main_process():
            # of an earlier start
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        barrier("looking for failures")
        threading.Thread(target=self._look, daemon=True).start()

    def before_end(self, finish: Callable[[], None]) -> None:
        """Sets what is to be called before a process ends after an error: it waits for what is being written."""
        self._finish = finish

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """A context whose errors wait for what is being written, and are told to the other processes."""
        try:
            yield
        except BaseException as e:
            self._call_finish()
            if jax.process_count() > 1:
                self._tell_others(e)
            raise

    def close(self) -> None:
        """Looks no more."""
        self._stopped.set()

    def _call_finish(self) -> None:
        try:
            self._finish()
        except Exception as e:  # the error that came first is the one to be told
            print(f"also: {printable(str(e))}", file=sys.stderr)

    def _tell_others(self, error: BaseException) -> None:
        """Leaves the message for the others, waits until they have it, and ends this process."""
        self._stopped.set()
        if not isinstance(error, (CheckpointError, ConfigError, InputError, TrainingError)):
            traceback.print_exception(error)
        message = printable(str(error) or type(error).__name__)
        value = {"process": jax.process_index(), "message": message}
        replace_file(self._path("error"), json.dumps(value).encode())
        deadline = time.monotonic() + _LONGEST_WAIT
        while time.monotonic() < deadline and len(self._found("seen")) < jax.process_count() - 1:
            time.sleep(_LOOK_EVERY / 10)
        _end(f"error: {message}")

    def _look(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY):
            for path in self._found("error"):
                value = json.loads(path.read_text(encoding="utf-8"))
                if value["process"] != jax.process_index():
                    self._call_finish()
                    replace_file(self._path("seen"), b"")
                    _end(f"error in process {value['process']}: {value['message']}")

    def _path(self, kind: str) -> Path:
        return self._folder / f"{kind}-{jax.process_index()}"

    def _found(self, kind: str) -> list[Path]:
        return sorted(self._folder.glob(f"{kind}-*[0-9]"))


def _end(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # at an ordinary end jax would wait for the processes that are gone
    os._exit(STATUS)
