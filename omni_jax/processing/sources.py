"""Where media come from: a path, a file: or data: URL, bytes, or the web and buckets if that is allowed."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omni_jax.errors import InputError
from omni_jax.processing.files import open_bucket

MAX_FETCHED_BYTES = 2 << 30  # fetched from the web
_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class Source:
    """Media that can be opened as often as needed."""

    contents: Path | bytes

    def open(self) -> BinaryIO:
        if isinstance(self.contents, bytes):
            return io.BytesIO(self.contents)
        try:
            return self.contents.open("rb")
        except OSError as e:
            raise InputError(f"cannot read it: {e.strerror}") from e


def describe_source(value: Any) -> str:
    """How an error names a source: short, and without its data."""
    if isinstance(value, str) and value.startswith("data:"):
        return f"{value[:30].split(',')[0]},..."
    if isinstance(value, str | os.PathLike):
        name = os.fspath(value)
        return repr(name if len(name) <= 100 else f"...{name[-97:]}")
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} frames"
    return type(value).__name__


def is_located(value: Any) -> bool:
    """Whether a value says where media are, or holds a file; anything else is pictures or samples themselves."""
    return isinstance(value, Source | str | os.PathLike | bytes | bytearray | memoryview)


def locate_source(value: Any, *, allow_urls: bool = False) -> Source:
    """Finds out what a value names.

    Args:
      value: a path, a ``file:``, ``data:``, ``http:``, ``https:`` or ``gs:`` URL, the bytes of a file, or a source.
      allow_urls: whether to fetch from the web and from buckets. A server that does so lends its network, and what its
        account may read, to whoever asks.

    Raises:
      InputError: if it is none of these, is not there, or is empty.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return _check_not_empty(Source(bytes(value)))
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"expected a path, a URL or bytes, got {type(value).__name__}")
    text = os.fspath(value)
    # a colon alone makes no URL: call-12:30.wav is a path, for "call-12" is no scheme that is known
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", text)
    name = scheme.group(1).lower() if scheme else ""
    if name == "data":
        return _check_not_empty(Source(_data_url(text)))
    if name in ("http", "https"):
        return _check_not_empty(Source(_fetch_url(text, allow_urls)))
    if name == "gs":
        return _check_not_empty(Source(_fetch_from_bucket(text, allow_urls)))
    if name == "file":
        return _find_file(_file_url(text))
    # a path with these letters is rather a misspelt URL, and "no such file" would not help
    if "://" in text:
        raise InputError(f"unknown kind of URL {name!r}; known: file, data, http, https, gs")
    return _find_file(text)


def _check_not_empty(source: Source) -> Source:
    if isinstance(source.contents, bytes) and not source.contents:
        raise InputError("it is empty (0 bytes)")
    return source


def _find_file(name: str) -> Source:
    path = Path(name)
    try:
        if not path.exists():
            raise InputError("no such file")
        if not path.is_file():
            raise InputError("it is not a file")
        if not path.stat().st_size:
            raise InputError("the file is empty (0 bytes)")
    except (OSError, ValueError) as e:
        # a name that is too long, or has a zero byte in it; the errors above are ValueErrors too
        if isinstance(e, InputError):
            raise
        raise InputError(f"not a path that can be read: {e}") from e
    return Source(path)


def _file_url(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    # file://name/path would be a file of the machine called name
    if parts.netloc not in ("", "localhost"):
        raise InputError(f"a file URL must be of this machine (file:///path), got the host {parts.netloc!r}")
    return urllib.request.url2pathname(parts.path)


def _data_url(url: str) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InputError(f"a data URL must look like data:audio/wav;base64,...; got {header[:60]!r}")
    # browsers may write + and / as %2B and %2F
    return decode_base64(urllib.parse.unquote(data) if "%" in data else data, "the data URL")


def _fetch_from_bucket(url: str, allowed: bool) -> bytes:
    # before the bucket is touched: a name alone must not make this machine use its account
    _check_allowed(allowed)
    files, path = open_bucket(url)
    try:
        return files.cat_file(path)
    except FileNotFoundError as e:
        raise InputError("no such file") from e
    except (OSError, ValueError) as e:
        raise InputError(f"cannot fetch it: {e}") from e


def _check_allowed(allowed: bool) -> None:
    if not allowed:
        raise InputError(
            "fetching from the web is off; pass the file, or load the model with allow_urls=True (--allow-urls)"
        )


def _fetch_url(url: str, allowed: bool) -> bytes:
    _check_allowed(allowed)
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            # a byte more than is allowed, to tell a file that is over the limit from one that ends at it
            data = answer.read(MAX_FETCHED_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as e:
        raise InputError(f"cannot fetch it: {e}") from e
    if len(data) > MAX_FETCHED_BYTES:
        raise InputError(f"it is over the limit of {MAX_FETCHED_BYTES} bytes")
    return data


def decode_base64(text: str, where: str) -> bytes:
    """Bytes of base64 text; line breaks are allowed.

    Raises:
      InputError: for anything else, naming ``where``.
    """
    # without validate, letters that are not base64 would be dropped silently
    try:
        return base64.b64decode(re.sub(r"\s", "", text), validate=True)
    except (binascii.Error, ValueError) as e:
        raise InputError(f"{where} is not base64: {e}") from e
