"""Rows and requests name files only where their media may lie, and what is embedded is media."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Prepare, Reject
from omni_jax.data.packing import OmniPacking
from omni_jax.data.pipeline import batches
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import ConfigError, InputError
from omni_jax.processing import media, media_workers
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.processing.worker_pool import MediaLimits
from omni_jax.serving.batch import check_command
from omni_jax.serving.chat_request import parse_body
from omni_jax.serving.commands import BatchCommand
from omni_jax.serving.media_roots import MediaRoots
from tests.bucket import Bucket
from tests.security.internet import PUBLIC, ok, serve
from tools import make_arrayrecord
from tools.make_arrayrecord import Embedding, record, write

PICTURE = Path(__file__).parents[1] / "media" / "picture.png"


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    folder = tmp_path_factory.mktemp("processor")
    write_tokenizer(folder, OmniConfig.tiny())
    OmniConfig.tiny().save(folder)
    return Processor.load(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows' folder with a picture; a picture beside the folder, and a link to it within."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for path in (folder / "a.png", tmp_path / "secret.png"):
        path.write_bytes(PICTURE.read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder


# every shape in which a row names a medium
SHAPES: list[Callable[[str], dict[str, Any]]] = [
    lambda name: dialogue("<image>?", images=[name]),
    lambda name: dialogue("<image>?", image=name),
    lambda name: dialogue("<image>?", images=[{"bytes": None, "path": name}]),
    lambda name: dialogue([{"type": "image", "image": name}]),
    lambda name: dialogue([{"type": "image", "path": name}]),
    lambda name: dialogue([{"type": "image", "url": name}]),
    lambda name: dialogue([{"type": "image_url", "image_url": {"url": name}}]),
    lambda name: dialogue([{"type": "video", "video": [name, name]}]),
]


def dialogue(content: Any, **rest: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A fox."}], **rest}


def make_row(folder: Path | str, values: dict[str, Any]) -> Row:
    return Row(os.path.join(folder, "rows.jsonl"), 1, json.dumps(values).encode())


def make_prepare(processor: Processor, media_root: str | None = None, **access: Any) -> Prepare:
    return Prepare(processor.with_access(RemoteAccess(**access)), 4096, lambda example: None, media_root=media_root)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_read_within_their_folder(processor: Processor, folder: Path, shape: Any) -> None:
    prepare = make_prepare(processor)
    inside = ("a.png", "./a.png", str(folder / "a.png"), (folder / "a.png").as_uri(), "../rows/a.png")
    for name in inside:
        assert isinstance(prepare(make_row(folder, shape(name))), list)
    outside = str(folder.parent / "secret.png")
    for name in ("../secret.png", outside, f"file://{outside}", f"FILE:{outside}", "link.png", "/etc/passwd"):
        found = prepare(make_row(folder, shape(name)))
        assert isinstance(found, Reject) and "is not within" in found.reason and "--data.media-root" in found.reason
    for name in ("loop.png", "a\0b", "file://[x/y", "file://host/a.png"):
        found = prepare(make_row(folder, shape(name)))
        assert isinstance(found, Reject) and "is not a path that can be read" in found.reason


def test_another_root(processor: Processor, folder: Path) -> None:
    prepare = make_prepare(processor, str(folder.parent))
    assert isinstance(prepare(make_row(folder, SHAPES[0]("../secret.png"))), list)
    elsewhere = make_prepare(processor, str(folder.parent / "other"))(make_row(folder, SHAPES[0]("a.png")))
    assert isinstance(elsewhere, Reject) and "is not within" in elsewhere.reason


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_fetch_what_is_allowed(processor: Processor, folder: Path, gs: Bucket, shape: Any) -> None:
    gs.pipe("gs://b/media/a.png", PICTURE.read_bytes())
    with serve(lambda path: [ok(PICTURE.read_bytes())]) as internet:
        internet.hosts = {"a.example": [PUBLIC]}
        web, bucket = "http://a.example/a.png?signature=s3cret", "gs://b/media/a.png"
        for name in (web, bucket):
            found = make_prepare(processor)(make_row(folder, shape(name)))
            assert isinstance(found, Reject) and "is off" in found.reason and "s3cret" not in found.reason
        assert not internet.requests
        allowed = make_prepare(processor, web=("a.example",), buckets=("gs://b/media",), network=internet.network)
        for name in (web, bucket):
            assert isinstance(allowed(make_row(folder, shape(name))), list)


def test_rows_in_a_bucket(processor: Processor, gs: Bucket) -> None:
    for name in ("rows/a.png", "secret.png", "rows2/a.png"):
        gs.pipe(f"gs://b/{name}", PICTURE.read_bytes())
    prepare = make_prepare(processor, buckets=("gs://b/rows",))
    assert isinstance(prepare(make_row("gs://b/rows", SHAPES[0]("a.png"))), list)
    for name in ("../secret.png", "../rows2/a.png", str(PICTURE), f"file://{PICTURE}", "gs://b/secret.png"):
        found = prepare(make_row("gs://b/rows", SHAPES[0](name)))
        assert isinstance(found, Reject) and "is not within" in found.reason


def test_the_recipe_says_from_where(processor: Processor, folder: Path) -> None:
    """Of the processor that it is given, batches takes no permission."""
    (folder / "rows.jsonl").write_text(json.dumps(SHAPES[0]("http://a.example/a.png")) + "\n")
    data = DataConfig(train=(str(folder / "rows.jsonl"),), max_reject_share=0.0)
    with serve(lambda path: [ok(PICTURE.read_bytes())]) as internet:
        internet.hosts = {"a.example": [PUBLIC]}
        generous = processor.with_access(RemoteAccess(("*",), network=internet.network))
        with pytest.raises(InputError, match="fetching from the web is off"):
            next(batches(data, OmniPacking.create(data, generous, 1)))
        assert not internet.requests
    for wrong in (dict(allow_web=("http://x",)), dict(allow_buckets=("b/media",)), dict(allow_buckets=("gs://",))):
        with pytest.raises(ConfigError, match=r"data\.allow_"):
            DataConfig(train=("a",), **wrong).check(1)


# --- rows with their media inside ---


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_embedded_lies_where_it_may(workers: MediaWorkers, folder: Path, shape: Any) -> None:
    embedded = record(make_row(folder, shape("a.png")), folder, Embedding(), workers)
    assert b"data:application/octet-stream;base64,iVBOR" in embedded
    for name in ("../secret.png", str(folder.parent / "secret.png"), "link.png", "file:///etc/passwd"):
        with pytest.raises(InputError, match=r"is not within .*--media-root"):
            record(make_row(folder, shape(name)), folder, Embedding(), workers)
    record(make_row(folder, shape("../secret.png")), folder, Embedding(str(folder.parent)), workers)


def test_what_is_embedded_is_fetched_where_that_is_allowed(workers: MediaWorkers, folder: Path) -> None:
    row = make_row(folder, SHAPES[0]("http://a.example/a.png?signature=s3cret"))
    with serve(lambda path: [ok(PICTURE.read_bytes())]) as internet:
        internet.hosts = {"a.example": [PUBLIC]}
        with pytest.raises(InputError, match="fetching from the web is off") as caught:
            record(row, folder, Embedding(), workers)
        assert "s3cret" not in str(caught.value) and not internet.requests
        allowed = Embedding(access=RemoteAccess(("a.example",), network=internet.network))
        assert b"base64,iVBOR" in record(row, folder, allowed, workers)


@pytest.mark.parametrize(
    "data", [b"root:x:0:0:root:/root:/bin/bash\n", b"\x89PNG\r\n\x1a\n", b"#EXTM3U\n/etc/passwd\n"]
)
def test_what_is_embedded_is_media(workers: MediaWorkers, folder: Path, data: bytes) -> None:
    (folder / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="it is neither a picture, a sound nor a video"):
        record(make_row(folder, SHAPES[0]("a.png")), folder, Embedding(), workers)


@pytest.mark.parametrize("name", ["picture.jpg", "speech.wav", "video.mp4", "speech2.mp3"])
def test_media_of_all_kinds_are_embedded(workers: MediaWorkers, folder: Path, name: str) -> None:
    row = make_row(folder, dialogue("<video>?", videos=[str(PICTURE.with_name(name))]))
    assert b"base64," in record(row, folder, Embedding(str(PICTURE.parent)), workers)


def refuse(*_: object) -> None:
    raise AssertionError("it was looked into in this process")


def hang(*_: object) -> None:
    time.sleep(60)


def grow(*_: object) -> int:
    return np.ones(4 << 30, np.uint8).nbytes


def die(*_: object) -> None:
    os._exit(9)


def test_what_is_embedded_is_looked_into_within_limits(
    workers: MediaWorkers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media, "check_media", refuse)
    for name in ("read_image", "open_media"):
        monkeypatch.setattr(media, name, refuse)
    row = make_row(folder, SHAPES[0]("a.png"))
    for wrong, message in ((hang, "took over 8 s"), (grow, "over 2 GiB"), (die, "died")):
        with monkeypatch.context() as patch, pytest.raises(InputError, match=rf"'a.png': .*{message}"):
            patch.setattr(media_workers, "_check_media", wrong)
            record(row, folder, Embedding(), workers)
    assert b"base64,iVBOR" in record(row, folder, Embedding(), workers)
    # nor does a run of its own
    (folder / "rows.jsonl").write_text(json.dumps(SHAPES[0]("a.png")) + "\n")
    limits = MediaLimits(seconds=30.0, gigabytes=2.0)
    told: list[int] = []
    write(
        str(folder / "rows.jsonl"), folder / "out", embed=Embedding(limits=limits), progress=lambda n, _: told.append(n)
    )
    assert told == [0, 1]


def test_a_file_that_is_embedded_has_the_size_of_one_that_is_fetched(
    workers: MediaWorkers, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_arrayrecord, "MAX_FETCHED_BYTES", PICTURE.stat().st_size - 1)
    with pytest.raises(InputError, match=r"'a\.png': it is over the limit of"):
        record(make_row(folder, SHAPES[0]("a.png")), folder, Embedding(), workers)


# --- requests ---


def test_requests_in_a_bucket_name_no_other_objects() -> None:
    def source(name: str) -> Any:
        request = parse_body({"messages": [{"role": "user", "content": [{"type": "image", "image": name}]}]})
        return MediaRoots(("gs://b/in",)).confine(request.messages)[0].media[0].source

    assert source("a.png") == "gs://b/in/a.png"
    # what is fetched is decided where it is fetched: RemoteAccess
    assert source("gs://b/in2/a.png") == "gs://b/in2/a.png"
    for name in ("../in2/a.png", "/etc/passwd", "file:///etc/passwd", "../../other/a.png"):
        with pytest.raises(InputError, match="is not within gs://b/in"):
            source(name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(allow_web=("https://a.example",)), "allow_web: 'https://a.example' is no host"),
        (dict(allow_buckets=("b/media",)), "allow_buckets: 'b/media'"),
        (dict(media_root="gs://"), "--media-root gs://: a place in a bucket must look like"),
        (dict(output="gs:///etc/x"), "-o gs:///etc/x: a place in a bucket must look like"),
        (dict(audio_dir="gs://b/../c"), "--audio-dir gs://b/../c: a place in a bucket must not have"),
        (dict(input="gs://b/x::file:///etc/passwd"), "-i gs://b/x::file:///etc/passwd: a place in a bucket must"),
    ],
)
def test_options_are_checked_before_anything_is_done(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "in.jsonl").touch()
    places = dict(input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(InputError, match=re.escape(message)):
        check_command(BatchCommand(model=tmp_path, **{**places, **options}))


def test_rows_of_a_bucket_are_opened_by_name_alone(tmp_path: Path, gs: Bucket) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    for name in (f"gs://b/x::file://{tmp_path}/rows.jsonl", f"gs://{tmp_path}/rows.jsonl"):
        with pytest.raises(InputError, match="a place in a bucket must look like"):
            open_rows(name)
