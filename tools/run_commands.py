"""Programs of the repository, run one after the other as on the command line."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from omni_jax.plain_files import replace_file

ROOT = Path(__file__).resolve().parents[1]
# XLA frees what a step has used, and the system hands it back page by page: in large pages a step of omni-tiny takes a
# quarter less on two cores (glibc 2.35 and newer; others do not read it)
_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def count_cores() -> int:
    """Cores that this process may use."""
    # not on every system can a process be held to some
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def find_devices() -> tuple[str, int, str]:
    """Backend, number and kind of the devices that programs here run on."""
    # asked of another process: one that has asked holds the device
    program = "import jax; print(jax.default_backend(), jax.device_count(), jax.devices()[0].device_kind)"
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    backend, count, kind = found.strip().split(maxsplit=2)
    return backend, int(count), kind


def run(*arguments: object, environment: Mapping[str, str] = MappingProxyType({})) -> str:
    """Runs a program of the repository as on the command line, and returns what it printed.

    Stopped by Ctrl-C, or by SIGTERM after ``exit_on_sigterm``, this process ends the program first and waits for it.

    Args:
      arguments: the program and what it is given.
      environment: variables that it has beside those of this process.

    Raises:
      SystemExit: if it fails.
    """
    print("$ python", *arguments, flush=True)
    command = [sys.executable, *map(str, arguments)]
    variables = {**_ENVIRONMENT, **os.environ, **environment}
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True)
    lines = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    except KeyboardInterrupt:
        # the terminal has told the program as well
        process.communicate()
        raise
    except SystemExit:
        process.terminate()
        process.communicate()
        raise
    if process.wait():
        raise SystemExit(f"error: {arguments[0]} ended with {process.returncode}; run the same command to go on")
    return "".join(lines)


def exit_on_sigterm() -> None:
    """Makes SIGTERM end this process as ``sys.exit`` does, so that ``run`` ends its program and ``Stages`` writes."""

    def stop(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, stop)


class Stages:
    """Stages that follow each other, and the time that each takes, in a file.

    A stage that is complete is not run again. One that was stopped is, and its programs go on where they were.

    Attributes:
      seconds: of each stage, over all starts.
      devices: what each stage ran on, where that is told.
    """

    def __init__(self, path: Path, device: str | None = None) -> None:
        """Reads what earlier starts have done.

        Args:
          path: the file.
          device: what this start runs on.
        """
        self._path = path
        self._device = device
        self.seconds: dict[str, float] = {}
        self.devices: dict[str, str] = {}
        self._complete: list[str] = []
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            self.seconds = values["seconds"]
            self.devices = values.get("devices", {})
            self._complete = values["complete"]

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Runs a stage, unless it is complete."""
        if name in self._complete:
            print(f"{name}: complete, {self.seconds[name] / 60:.1f} minutes", flush=True)
            return
        print(f"\n{name}", flush=True)
        before = self.seconds.get(name, 0.0)
        started = time.monotonic()
        try:
            work()
            self._complete.append(name)
        finally:
            self.seconds[name] = before + time.monotonic() - started
            if self._device is not None:
                self.devices[name] = self._device
            values = {"complete": self._complete, "seconds": self.seconds, "devices": self.devices}
            replace_file(self._path, (json.dumps(values, indent=2) + "\n").encode())
        print(f"{name}: {self.seconds[name] / 60:.1f} minutes", flush=True)
