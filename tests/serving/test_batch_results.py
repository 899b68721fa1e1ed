"""Results in a file and in a bucket: what a killed run leaves behind, and how the next one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import InputError
from omni_jax.serving import batch_results
from omni_jax.serving.batch_lines import Line, LineError, make_error, make_result
from omni_jax.serving.batch_results import open_results
from tests.bucket import Bucket

URL = "gs://b/out/r.jsonl"


def test_a_torn_line_is_taken_off_and_the_rest_is_known(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with open_results(str(path)) as results:
        results.add(make_result(Line(3, b""), "c", {"x": "ü"}))
        results.add(make_error(Line(1, b""), None, LineError("no")).text)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "batch_req_00000002", "cus')
    with open_results(str(path)) as results:
        assert (results.finished, results.num_failed) == ({3: "c", 1: None}, 1)
        results.add(make_result(Line(2, b""), "b", {}))
    lines = path.read_bytes().splitlines()
    assert path.read_bytes().startswith(whole) and len(lines) == 3
    assert json.loads(lines[2])["id"] == "batch_req_00000002"


def test_one_run_writes_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with open_results(str(path)), pytest.raises(InputError, match="another run is writing"):
        open_results(str(path))
    with open_results(str(path)) as results:
        assert not results.finished


@pytest.mark.parametrize("data", [b"hello\n", b"{}\n", b'{"id": "x", "custom_id": "a", "error": null}\n', b"[]\n"])
def test_another_file_is_left_as_it_is(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(data + b"the end")
    with pytest.raises(InputError, match="is no file of results: line 1"):
        open_results(str(path))
    assert path.read_bytes() == data + b"the end"


def line(number: int, *, error: bool = False) -> str:
    request = Line(number, b"")
    if error:
        return make_error(request, f"c{number}", RuntimeError("no")).text
    return make_result(request, f"c{number}", {})


def numbers(data: bytes) -> list[int]:
    return [int(json.loads(text)["custom_id"][1:]) for text in data.splitlines()]


class TestBucket:
    def test_parts_become_one_object(self, gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch_results, "PART_LINES", 2)
        with open_results(URL) as results:
            assert not results.finished
            for i in (1, 2, 3, 4, 5):
                results.add(line(i, error=i == 4))
            assert [numbers(gs.cat_file(path)) for path in sorted(gs.find("b/out"))] == [[1, 2], [3, 4]]
        assert gs.find("b") == ["/b/out/r.jsonl"]
        assert numbers(gs.cat_file(URL)) == [1, 2, 3, 4, 5]

    def test_a_part_is_written_after_a_while(self, gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch_results, "PART_SECONDS", 0.0)
        results = open_results(URL)
        results.add(line(7))
        assert numbers(gs.cat_file("gs://b/out/r.jsonl.parts/00000001.jsonl")) == [7]

    def test_a_run_that_was_killed_goes_on(self, gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(batch_results, "PART_LINES", 2)
        killed = open_results(URL)  # never closed
        for i in (1, 2, 3):
            killed.add(line(i, error=i == 2))
        with open_results(URL) as results:
            assert (results.finished, results.num_failed) == ({1: "c1", 2: "c2"}, 1)
            results.add(line(3))
        assert numbers(gs.cat_file(URL)) == [1, 2, 3]
        with open_results(URL) as results:
            assert (results.finished, results.num_failed) == ({1: "c1", 2: "c2", 3: "c3"}, 1)
        assert numbers(gs.cat_file(URL)) == [1, 2, 3]

    def test_killed_while_the_parts_were_joined(self, gs: Bucket) -> None:
        """The object is there, the parts still are, and a copy that was not finished: no line comes twice."""
        gs.pipe(URL, f"{line(1, error=True)}\n{line(2)}\n".encode())
        gs.pipe(f"{URL}.parts/00000001.jsonl", f"{line(1, error=True)}\n".encode())
        gs.pipe(f"{URL}.parts/00000002.jsonl", f"{line(2)}\n".encode())
        gs.pipe(f"{URL}.whole", line(1).encode()[:9])
        with open_results(URL) as results:
            assert (set(results.finished), results.num_failed) == ({1, 2}, 1)
            results.add(line(3))
        assert numbers(gs.cat_file(URL)) == [1, 2, 3] and gs.find("b") == ["/b/out/r.jsonl"]

    def test_broken_off_with_an_error_nothing_is_lost(self, gs: Bucket) -> None:
        with pytest.raises(KeyboardInterrupt), open_results(URL) as results:
            results.add(line(1))
            raise KeyboardInterrupt
        assert not gs.exists(URL) and set(open_results(URL).finished) == {1}

    def test_another_object_is_left_as_it_is(self, gs: Bucket) -> None:
        gs.pipe(URL, b"hello\n")
        with pytest.raises(InputError, match=r"gs://b/out/r.jsonl is no file of results: line 1"):
            open_results(URL)
        assert gs.cat_file(URL) == b"hello\n"

    def test_a_bucket_that_takes_nothing(self, gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: Any) -> None:
            raise OSError("Forbidden")

        monkeypatch.setattr(Bucket, "pipe_file", refuse)
        with (
            pytest.raises(InputError, match=r"cannot write gs://b/out/r\.jsonl: Forbidden"),
            open_results(URL) as results,
        ):
            results.add(line(1))
