from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.checkpoint import torch_file
from omni_jax.errors import CheckpointError

VALUE = {
    "a": {"id": 151872, "row": np.arange(6, dtype=np.float32).reshape(2, 3), "half": np.array([[1, 2]], np.float16)},
    "b": {"id": -1, "row": np.ones((1, 2, 3), ml_dtypes.bfloat16), "yes": True, "word": "sød"},
}


def archive(path: Path, program: bytes, entries: dict[str, bytes] | None = None, **options: Any) -> Path:
    """A file of torch.save with this pickle."""
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in ({"data.pkl": program} | (entries or {})).items():
            file.writestr(f"any/{name}", data)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        torch_file.read(path)
    assert str(path) in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor(
    *, offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,), count: int = 4, kind="Float"
) -> bytes:
    """A program that makes one tensor of data/0."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text("0") + text("cpu") + number(count)
    axes = [b"(" + b"".join(map(number, axis)) + b"t" for axis in (shape, strides)]
    rest = number(offset) + b"".join(axes) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + rest + b"tR."


FOUR = {"data/0": np.arange(4, dtype=np.float32).tobytes()}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    torch_file.write(tmp_path / "x.pt", VALUE)
    read = torch_file.read(tmp_path / "x.pt")
    assert list(read) == ["a", "b"] and list(read["b"]) == ["id", "row", "yes", "word"]
    for name, entry in VALUE.items():
        for key, value in entry.items():
            found = read[name][key]
            if isinstance(value, np.ndarray):
                assert found.dtype == value.dtype and found.shape == value.shape
                np.testing.assert_array_equal(found, value)
            else:
                assert found == value and type(found) is type(value)


def test_equal_values_give_equal_files(tmp_path: Path) -> None:
    torch_file.write(tmp_path / "x.pt", VALUE)
    first = (tmp_path / "x.pt").read_bytes()
    torch_file.write(tmp_path / "x.pt", VALUE)
    assert (tmp_path / "x.pt").read_bytes() == first


def test_strides_and_offsets_are_followed(tmp_path: Path) -> None:
    program = tensor(offset=1, shape=(2, 2), strides=(1, 1))
    np.testing.assert_array_equal(torch_file.read(archive(tmp_path / "x", program, FOUR)), [[1, 2], [2, 3]])
    scalar = tensor(offset=3, shape=(), strides=())
    assert torch_file.read(archive(tmp_path / "x", scalar, FOUR)) == 3


class Hostile:
    """What a pickle of Python would run when it is read."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
def test_a_call_is_neither_made_nor_imported(tmp_path: Path, protocol: int) -> None:
    trace = tmp_path / "trace"
    program = pickle.dumps({"Chelsie": Hostile(os.system, f"touch {trace}")}, protocol=protocol)
    told = complaint(archive(tmp_path / "x", program))
    assert "only dictionaries, strings, numbers and tensors" in told
    assert ("the name posix.system" in told) == (protocol in (1, 2, 3))  # the others have instructions of their own
    assert not trace.exists()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (b"cbuiltins\neval\n.", "the name builtins.eval"),
        (b"cbuiltins\ngetattr\n(ctorch\nFloatStorage\nX\x01\x00\x00\x00atR.", "the name builtins.getattr"),
        (b"ctorch._utils\n_rebuild_parameter\n.", "the name torch._utils._rebuild_parameter"),
        (b"ctorch\nload\n.", "the name torch.load"),
        (b"\x82\x01.", "the pickle instruction EXT1"),
        (b"\x83\x01\x01.", "the pickle instruction EXT2"),
        (b"\x84\x01\x01\x01\x01.", "the pickle instruction EXT4"),
        (b"(ios\nsystem\n.", "the pickle instruction INST"),
        (b"}}b.", "the pickle instruction BUILD"),
        (b"ccollections\nOrderedDict\n)\x81.", "the pickle instruction NEWOBJ"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "the pickle instruction STACK_GLOBAL"),
        (b"]\x8c\x01aa.", "the pickle instruction EMPTY_LIST"),
        (b"Pid\n.", "the pickle instruction PERSID"),
        (b"C\x01a.", "the pickle instruction SHORT_BINBYTES"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "a call of collections.OrderedDict"),
        (b"ctorch\nFloatStorage\n)R.", "a call of torch.FloatStorage"),
        (b"K\x01)R.", "a call of what is no function"),
        (b"}K\x01K\x02s.", "a dictionary with a int as key"),
        (b"(X\x03\x00\x00\x00abcK\x01K\x01K\x01K\x01tQ.", "a reference to something else than the storage of a tensor"),
    ],
)
def test_anything_else_than_data_is_refused_by_name(tmp_path: Path, program: bytes, told: str) -> None:
    assert told in complaint(archive(tmp_path / "x", program))


@pytest.mark.parametrize(
    "program",
    [
        b"",
        b".",
        b"R.",
        b"t.",
        b"(u.",
        b"}(X\x01\x00\x00\x00au.",
        b"h\x05.",
        b"Q.",
        b"K\x01Q.",
        b"q\x00.",
        b"s.",
        b"\x80\x02}",
        b"X\xff\xff\xff\xffabc.",
        b"X\x01\x00\x00\x00\xff.",
        b"\xfe.",
        b"\x87.",
        tensor(shape=(-1,)),
        tensor(offset=-1),
        tensor(strides=(1, 1)),
    ],
)
def test_a_malformed_program_is_told(tmp_path: Path, program: bytes) -> None:
    complaint(archive(tmp_path / "x", program, FOUR))


def test_no_program_does_more_than_fail(tmp_path: Path) -> None:
    path = tmp_path / "x"

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60), st.integers(0, 300))
    def check(noise: bytes, at: int) -> None:
        program = tensor()
        try:
            torch_file.read(archive(path, program[:at] + noise + program[at:], FOUR))
        except CheckpointError as e:
            assert str(path) in str(e)

    check()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (tensor(shape=(5,)), r"a tensor [5] that 4 values do not fill"),
        (tensor(shape=(2,), strides=(4,)), "do not fill"),
        (tensor(offset=1), "do not fill"),
        (tensor(shape=(2**31 - 1, 2**31 - 1), strides=(0, 0)), "do not fill"),
        (tensor(shape=(0,)), "do not fill"),
        (tensor(count=5), "data/0 has 16 bytes, not 5 of float32"),
        (tensor(kind="Double"), "data/0 has 16 bytes, not 4 of float64"),
        (tensor(kind="ComplexFloat"), "the name torch.ComplexFloatStorage"),
    ],
)
def test_a_tensor_stays_within_its_numbers(tmp_path: Path, program: bytes, told: str) -> None:
    assert told in complaint(archive(tmp_path / "x", program, FOUR))


def test_numbers_are_not_multiplied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "LARGEST_FILE", 100_000)
    one = tensor(shape=(4000,), count=4000)[2:-1]
    numbers = {"data/0": bytes(16_000)}
    for count in (6, 7):
        program = b"\x80\x02}" + b"".join(text(f"t{i}") + one + b"s" for i in range(count)) + b"."
        path = archive(tmp_path / f"x{count}", program, numbers)
        if count == 6:
            assert len(torch_file.read(path)) == 6
        else:
            assert "makes more than 100,000 bytes of tensors" in complaint(path)


class TestArchive:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        torch_file.write(tmp_path / "x.pt", VALUE)
        return tmp_path / "x.pt"

    def test_missing(self, tmp_path: Path) -> None:
        assert "cannot read" in complaint(tmp_path / "nowhere")
        assert "cannot read" in complaint(tmp_path)

    def test_truncated_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for size in range(0, len(whole), 37):
            path.write_bytes(whole[:size])
            complaint(path)

    def test_a_changed_byte_is_never_more_than_an_error(self, path: Path) -> None:
        whole = path.read_bytes()
        for at in range(0, len(whole), 11):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            try:
                torch_file.read(path)
            except CheckpointError as e:
                assert str(path) in str(e)

    def test_no_archive(self, path: Path) -> None:
        path.write_bytes(pickle.dumps({"a": 1}))  # what torch.save wrote before 1.6
        assert "no file of torch.save" in complaint(path)

    def test_no_program_or_two(self, path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("any/version", b"3")
        assert "must hold one data.pkl" in complaint(path)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", b"}.")
            file.writestr("b/data.pkl", b"}.")
        assert "must hold one data.pkl" in complaint(path)

    def test_missing_numbers(self, path: Path) -> None:
        assert "it has no data/0" in complaint(archive(path, tensor()))

    def test_compressed(self, path: Path) -> None:
        bomb = {"data/0": bytes(4 * 10**6)}
        told = complaint(archive(path, tensor(shape=(10**6,), count=10**6), bomb, compression=zipfile.ZIP_DEFLATED))
        assert "is compressed" in told

    def test_too_large(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_file, "LARGEST_FILE", 500)
        assert f"has {path.stat().st_size:,} bytes; a file of voices has 500 at most" in complaint(path)

    def test_claims_too_much(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        archive(path, tensor(), FOUR)
        whole = bytearray(path.read_bytes())
        at = whole.rindex(b"any/data/0") - 46  # its line in the directory at the end
        whole[at + 20 : at + 28] = struct.pack("<II", 2**30, 2**30)
        path.write_bytes(whole)
        assert "claims to hold 1,073,7" in complaint(path)

    def test_a_long_program(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_file, "_LARGEST_PROGRAM", 100)
        assert "data.pkl has" in complaint(path)

    def test_big_endian(self, path: Path) -> None:
        assert "big-endian" in complaint(archive(path, tensor(), FOUR | {"byteorder": b"big"}))
