"""A short run of each kind of fuzzing, and proof that what must not be is found; ``make fuzz`` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import planted
from tests.fuzz.__main__ import PLANS, Name, Options, Plan, main, run_command
from tests.fuzz.report import Tally
from tests.fuzz.runner import SeedError, Spec, make_rng, make_target
from tests.fuzz.trace import Rules, is_public, read_system_calls


@pytest.mark.parametrize("name", list(PLANS))
def test_a_short_run(name: Name, tmp_path: Path) -> None:
    count = {"media": 10, "folders": 15}.get(name, 25)
    tally = run_command(name, PLANS[name], Options(name, count=count, processes=1, out=tmp_path))
    assert not tally.complaints, tally.faults
    assert tally.kinds["accepted"] and tally.kinds["refused"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(PLANS))
def test_a_case_is_always_the_same(name: Name, tmp_path: Path) -> None:
    first, second = (make_target(Spec(PLANS[name].target, 3, 1.0, tmp_path)) for _ in range(2))
    for number in range(20):
        case = first.make_case(make_rng(3, number), number)
        assert case == second.make_case(make_rng(3, number), number)
        assert case != first.make_case(make_rng(4, number), number)


def run_planted(target: type[planted.Planted], out: Path, count: int = 30) -> Tally:
    plan = Plan(f"tests.fuzz.planted:{target.__name__}", count, 60.0, 0.5)
    return run_command("images", plan, Options("images", processes=1, out=out))


def test_without_a_fault_there_is_no_complaint(tmp_path: Path) -> None:
    tally = run_planted(planted.Planted, tmp_path)
    assert not tally.complaints
    assert (tally.kinds["accepted"], tally.kinds["refused"]) == (15, 15)
    assert list(tally.errors) == ["ValueError: case * is odd"]


@pytest.mark.parametrize(
    ("target", "kind", "what"),
    [
        (planted.ForeignError, "foreign", "KeyError: *"),
        (planted.OpenOutside, "opens", "opened /etc/passwd"),
        (planted.OpenByLink, "opens", "opened /etc/passwd"),
        (planted.WriteOutside, "opens", "/file"),
        (planted.ConnectInside, "connections", "('127.0.0.1', 9)"),
        (planted.LookUp, "connections", "looked up 'localhost'"),
        (planted.StartProgram, "programs", "subprocess.Popen"),
        (planted.Hang, "hang", "over 0.5 s"),
        (planted.DeafHang, "hang", "over 0.5 s"),
        (planted.Crash, "crash", "exit code -11"),
    ],
)
def test_a_planted_fault_is_found(target: type[planted.Planted], kind: str, what: str, tmp_path: Path) -> None:
    tally = run_planted(target, tmp_path)
    assert dict(tally.fault_counts) == {kind: 1} and tally.complaints == [f"1 x {kind}"]
    ((outcome, description),) = tally.faults
    assert outcome.number == 4 and what in description
    # the cases behind it were run all the same
    assert tally.count == 30
    # what is needed to run it again
    assert (tmp_path / "images-0-4.bin").read_bytes() == b"4"
    assert what in (tmp_path / "images-0-4.txt").read_text()


def test_growth_of_memory_is_found(tmp_path: Path) -> None:
    (complaint,) = run_planted(planted.Growth, tmp_path).complaints
    assert "memory grew by" in complaint


def test_a_target_that_refuses_its_seeds_fuzzes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SeedError, match="the seed planted is not accepted: ValueError: case 1 is odd"):
        run_planted(planted.BadSeed, tmp_path)


def test_a_run_that_is_too_short_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(Options("voices", count=1000, seconds=0.01, processes=1, out=tmp_path)) == 1
    assert "FAILED: only 0 of 1000 cases were run" in capsys.readouterr().out


# --- system calls ---

CALLS = """\
10 openat(AT_FDCWD</x>, "/etc/passwd", O_RDONLY) = 3</etc/passwd>
10 openat(AT_FDCWD</x>, "/fuzz-case/begin-7", O_RDONLY) = -1 ENOENT (No such file or directory)
10 openat(AT_FDCWD</x>, "FOLDER/work/a", O_RDWR|O_CREAT, 0666) = 4<FOLDER/work/a>
11 openat(AT_FDCWD</x>, "/etc/fonts.conf", O_RDONLY) = -1 ENOENT (No such file or directory)
11 openat(4<FOLDER/work>, "../secret", O_RDONLY) = 5<FOLDER/secret>
10 connect(6<socket:[1]>, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("10.0.0.1")}, 16) = -1 EPERM (x)
10 execve("/bin/sh", ["sh"], 0x7f) = 0
10 openat(AT_FDCWD</x>, "/fuzz-case/end", O_RDONLY) = -1 ENOENT (No such file or directory)
10 openat(AT_FDCWD</x>, "/etc/passwd", O_RDONLY) = 3</etc/passwd>
10 openat(AT_FDCWD</x>, "/fuzz-case/begin-8", O_RDONLY) = -1 ENOENT (No such file or directory)
10 openat(AT_FDCWD</x>, "/proc/self/maps", O_RDONLY) = 3</proc/self/maps>
10 openat(AT_FDCWD</x>, "/fuzz-case/end", O_RDONLY) = -1 ENOENT (No such file or directory)
"""


def test_system_calls_are_judged_case_by_case(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    lines = CALLS.replace("FOLDER", str(tmp_path)).splitlines()
    (seven, bad), (eight, good) = read_system_calls(lines, Rules((str(tmp_path / "work"),)))
    assert (seven, eight) == (7, 8)
    assert bad.opens == [f"openat {tmp_path}/secret"] and bad.num_opens == 2
    assert len(bad.connections) == 1 and "10.0.0.1" in bad.connections[0]
    assert bad.programs == ["execve /bin/sh"]
    assert not (good.opens or good.connections or good.programs)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07::1", True),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("fe80::1%eth0", False),
        ("/run/docker.sock", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public
