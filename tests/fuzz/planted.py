"""Targets that do what must not be, each in its fifth case: what finds faults has to find these."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.fuzz.target import Case, Target

_FAULTY_CASE = 4


class Planted(Target):
    """Accepts even cases and refuses odd ones; where nothing is planted, there is no fault."""

    own_errors = (ValueError,)

    def list_seeds(self) -> list[Case]:
        return [Case("planted", b"0")]

    def make_case(self, rng: random.Random, number: int) -> Case:
        return Case("planted", str(number).encode())

    def run_case(self, case: Case) -> None:
        number = int(case.data)
        if number == _FAULTY_CASE:
            self.do_wrong()
        if number % 2:
            raise ValueError(f"case {number} is odd")

    def do_wrong(self) -> None:
        (self.work / "file").write_bytes(b"allowed")


class ForeignError(Planted):
    def do_wrong(self) -> None:
        raise KeyError("none of ours")


class OpenOutside(Planted):
    def do_wrong(self) -> None:
        Path("/etc/passwd").read_bytes()


class OpenByLink(Planted):
    def do_wrong(self) -> None:
        link = self.work / "link"
        link.symlink_to("/etc/passwd")
        link.read_bytes()


class WriteOutside(Planted):
    def do_wrong(self) -> None:
        (self.folder / "file").write_bytes(b"")


class ConnectInside(Planted):
    def do_wrong(self) -> None:
        try:
            socket.create_connection(("127.0.0.1", 9), timeout=1).close()
        except OSError as e:
            raise ValueError("refused") from e


class LookUp(Planted):
    def do_wrong(self) -> None:
        try:
            socket.getaddrinfo("localhost", 80)
        except OSError as e:
            raise ValueError("refused") from e


class StartProgram(Planted):
    def do_wrong(self) -> None:
        subprocess.run(["true"], check=True)


class Hang(Planted):
    def do_wrong(self) -> None:
        time.sleep(60)


class DeafHang(Planted):
    """As in a library of C that never comes back to Python."""

    def do_wrong(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)


class Crash(Planted):
    def do_wrong(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class Growth(Planted):
    def run_case(self, case: Case) -> None:
        self.kept = [*getattr(self, "kept", []), b"\1" * (16 << 20)]


class BadSeed(Planted):
    def list_seeds(self) -> list[Case]:
        return [Case("planted", b"1")]
