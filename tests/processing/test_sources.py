import base64
import re

import pytest

from omni_jax.errors import InputError
from omni_jax.processing.sources import describe_source, locate_source


def contents(value):
    with locate_source(value).open() as file:
        return file.read()


def test_every_kind_of_source(tmp_path):
    path = tmp_path / "a b.bin"
    path.write_bytes(b"data")
    data = base64.b64encode(b"data").decode()
    kinds = [path, str(path), path.as_uri(), f"file://localhost{path}".replace(" ", "%20"), b"data", bytearray(b"data")]
    kinds += [memoryview(b"data"), f"data:;base64,{data}", f"data:audio/wav;base64,{data[:4]}\n{data[4:]}"]
    kinds += [locate_source(b"data"), f"data:audio/wav;base64,{data.replace('=', '%3D')}"]
    assert [contents(kind) for kind in kinds] == [b"data"] * len(kinds)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.wav", "no such file"),
        ("/", "it is not a file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "not a path that can be read"),
        (b"", "it is empty (0 bytes)"),
        ("data:audio/wav;base64,", "it is empty (0 bytes)"),
        ("data:audio/wav,abc", "a data URL must look like data:audio/wav;base64,...; got 'data:audio/wav'"),
        ("data:audio/wav;base64,a*b", "the data URL is not base64"),
        ("file://elsewhere/a.wav", "a file URL must be of this machine (file:///path), got the host 'elsewhere'"),
        ("s3://bucket/a.wav", "unknown kind of URL 's3'; known: file, data, http, https, gs"),
        ("gs://bucket/a.wav", "reading media from buckets is off; pass the file, or name where it lies: allow_buckets"),
        ("https://example.org/a.wav", "fetching from the web is off; pass the file, or name its host: allow_web"),
        (5, "expected a path, a URL or bytes, got int"),
    ],
)
def test_sources_that_are_refused(value, message):
    with pytest.raises(InputError, match=re.escape(message)):
        locate_source(value)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(InputError, match=re.escape("the file is empty (0 bytes)")):
        locate_source(tmp_path / "a.wav")


def test_names_for_messages():
    assert describe_source("a.mp4") == "'a.mp4'"
    assert describe_source("data:audio/wav;base64,AAAA") == "data:audio/wav;base64,..."
    assert describe_source(b"abc") == "3 bytes"
    assert describe_source(["a", "b"]) == "a list of 2 frames"
    assert len(describe_source("/very" * 100)) < 110
