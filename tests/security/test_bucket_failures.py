"""A bucket that fails in the middle of a run ends it with an error that says so, whatever type its libraries raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import serve
from omni_jax.data.sources import open_rows
from omni_jax.errors import InputError
from omni_jax.processing.files import bucket_errors, is_file, open_file, write_atomically
from omni_jax.serving import batch_results, batch_runner
from omni_jax.serving.batch_lines import read_lines
from omni_jax.serving.batch_results import open_results
from omni_jax.serving.batch_runner import OutputError
from tests.bucket import Bucket


class HttpError(Exception):
    """As gcsfs has it: neither an OSError nor a ValueError."""


class RefreshError(Exception):
    """As google-auth has it."""


def fail(*_: Any, **__: Any) -> Any:
    raise HttpError("Forbidden, 403: https://storage.googleapis.com/b?X-Goog-Signature=s3cret")


@pytest.fixture
def broken(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a method of the bucket fail."""

    def break_method(name: str) -> None:
        monkeypatch.setattr(Bucket, name, fail)

    return break_method


@pytest.mark.parametrize(
    ("method", "use"),
    [
        ("pipe_file", lambda: write_atomically("gs://b/a", b"")),
        ("open", lambda: open_file("gs://b/a")),
        ("isfile", lambda: is_file("gs://b/a")),
    ],
)
def test_buckets_fail_as_disks_do(broken: Callable[[str], None], method: str, use: Callable[[], Any]) -> None:
    broken(method)
    with pytest.raises(OSError, match="HttpError: Forbidden, 403") as caught:
        use()
    assert "s3cret" not in str(caught.value)


def test_other_errors_stay_what_they_are() -> None:
    for name, error in (("a", HttpError()), ("gs://b", InputError()), ("gs://b", MemoryError()), ("gs://b", OSError())):
        with pytest.raises(type(error)), bucket_errors(name):
            raise error


def test_speech_that_cannot_be_written_ends_the_run(broken: Callable[[str], None]) -> None:
    broken("pipe_file")
    with pytest.raises(OutputError, match=r"cannot write gs://b/s/a\.wav: HttpError: Forbidden.*goes on from"):
        batch_runner._write_file("gs://b/s/a.wav", b"sound")


def test_speech_where_the_bucket_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> Any:
        raise RefreshError("Reauthentication is needed")

    import fsspec

    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse)
    with pytest.raises(OutputError, match=r"cannot write gs://b/a\.wav: .*RefreshError: Reauthentication is needed"):
        batch_runner._write_file("gs://b/a.wav", b"sound")


@pytest.mark.parametrize("method", ["pipe_file", "mv", "rm", "open"])
def test_results_that_cannot_be_written_end_the_run(broken: Callable[[str], None], method: str) -> None:
    results = open_results("gs://b/r.jsonl")
    broken(method)
    with pytest.raises(InputError, match=r"cannot write gs://b/r\.jsonl: HttpError: .*goes on from"), results:
        results.add('{"id": "batch_req_00000001", "custom_id": "a", "error": null}')


def test_results_on_the_way(broken: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_results, "PART_LINES", 1)
    results = open_results("gs://b/r.jsonl")
    broken("pipe_file")
    with pytest.raises(InputError, match="cannot write"):
        results.add("{}")


@pytest.mark.parametrize("method", ["exists", "find", "isfile"])
def test_results_that_cannot_be_read(gs: Bucket, broken: Callable[[str], None], method: str) -> None:
    gs.pipe("gs://b/r.jsonl.parts/00000001.jsonl", b"")
    broken(method)
    with pytest.raises(InputError, match=r"cannot read gs://b/r\.jsonl: HttpError"):
        open_results("gs://b/r.jsonl")


def test_rows_and_requests(gs: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    gs.pipe("gs://b/rows.jsonl", b'{"text": "a"}\n')
    rows = open_rows("gs://b/rows.jsonl")
    monkeypatch.setattr(Bucket, "cat_file", fail)
    with pytest.raises(InputError, match=r"cannot read gs://b/rows\.jsonl: HttpError"):
        _ = rows[0]
    monkeypatch.setattr(Bucket, "open", fail)
    with pytest.raises(InputError, match=r"cannot read gs://b/rows\.jsonl: HttpError"):
        open_rows("gs://b/rows.jsonl")
    with pytest.raises(InputError, match=r"cannot read gs://b/rows\.jsonl: HttpError"):
        list(read_lines("gs://b/rows.jsonl"))
    monkeypatch.setattr(Bucket, "glob", fail)
    with pytest.raises(InputError, match="cannot look into the bucket"):
        open_rows("gs://b/*.jsonl")


@pytest.mark.parametrize("method", ["isfile", "open"])
def test_the_command_says_so(
    gs: Bucket,
    broken: Callable[[str], None],
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a line, and with the status of an error."""
    gs.pipe("gs://b/in.jsonl", json.dumps({}).encode())
    broken(method)
    arguments = ["batch", "--model", str(tmp_path), "-i", "gs://b/in.jsonl", "-o", str(tmp_path / "out.jsonl")]
    assert serve.main(arguments) == 1
    error = capsys.readouterr().err
    assert "HttpError: Forbidden" in error and "s3cret" not in error and "Traceback" not in error
