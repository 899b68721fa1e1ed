"""Where media come from: a path, a file: or data: URL, or bytes; ``processing.fetch`` fetches what lies elsewhere."""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omni_jax.checks import redact, shown
from omni_jax.errors import InputError
from omni_jax.processing.files import is_within, join_path, resolve_path

WEB_IS_OFF = "fetching from the web is off; pass the file, or name its host: allow_web=(HOST,), --allow-web HOST"
BUCKETS_ARE_OFF = (
    "reading media from buckets is off; pass the file, or name where it lies: allow_buckets=(PREFIX,), "
    "--allow-buckets gs://BUCKET/FOLDER"
)


_SCHEMES = ("file", "data", "http", "https", "gs")


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
        name = redact(os.fsdecode(value))
        return repr(name if len(name) <= 100 else f"...{name[-97:]}")
    if isinstance(value, bytes | bytearray | memoryview):
        return f"{len(value)} bytes"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} frames"
    return type(value).__name__


def is_located(value: Any) -> bool:
    """Whether a value says where media are, or holds a file; anything else is pictures or samples themselves."""
    return isinstance(value, Source | str | os.PathLike | bytes | bytearray | memoryview)


def find_scheme(text: str) -> str:
    """The scheme of a URL in lower case, if it has one that is known, or is followed by ``//``; else nothing.

    A colon alone makes no URL: call-12:30.wav is a path, for "call-12" is no scheme that is known.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?", text)
    if scheme is None:
        return ""
    name = scheme[1].lower()
    return name if scheme[2] or name in _SCHEMES else ""


def locate_source(value: Any) -> Source:
    """Finds out what a value names.

    Args:
      value: a path, a ``file:`` or ``data:`` URL, the bytes of a file, or a source.

    Raises:
      InputError: if it is none of these, is not there, or is empty.
    """
    if isinstance(value, Source):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return _check_not_empty(Source(bytes(value)))
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"expected a path, a URL or bytes, got {type(value).__name__}")
    text = os.fsdecode(value)
    scheme = find_scheme(text)
    if scheme == "data":
        return _check_not_empty(Source(_data_url(text)))
    # whoever may fetch has done so, and has a source in their place
    if scheme in ("http", "https"):
        raise InputError(WEB_IS_OFF)
    if scheme == "gs":
        raise InputError(BUCKETS_ARE_OFF)
    if scheme == "file":
        return _find_file(_file_url(text))
    if scheme:
        raise InputError(f"unknown kind of URL {scheme!r}; known: {', '.join(_SCHEMES)}")
    return _find_file(text)


def confine_source(source: Any, base_dir: str, media_root: str, option: str) -> str | bytes:
    """Takes a path of media from one folder, and none that leads out of another.

    Args:
      source: the bytes of a file, a URL or a path; a path and a ``file:`` URL are of this machine.
      base_dir: that relative paths are taken from, a path or a ``gs://`` URL.
      media_root: within which it must lie, links followed; likewise.
      option: that names another, for the error.

    Returns:
      The path that is to be opened, from its root on, and without links. A URL as it is: whether the web and buckets
      are allowed is decided where they are fetched from.

    Raises:
      InputError: for a file outside of it, and for what is neither bytes, a path nor a URL that is known.
    """
    if isinstance(source, bytes):
        return source
    if not isinstance(source, str):
        raise InputError(f"expected a path or a URL, got {shown(source)}")
    scheme = find_scheme(source)
    if scheme and scheme != "file":
        return source
    try:
        name = _file_url(source) if scheme else source
        root = resolve_path(media_root)
        # links are followed here, once, and the path that comes out is the one that is opened
        path = resolve_path(join_path(base_dir, name))
    except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: links that lead in a circle
        raise InputError(f"{describe_source(source)} is not a path that can be read: {e}") from e
    if not is_within(path, root):
        raise InputError(f"{describe_source(source)} is not within {root}; {option} names another folder")
    return path


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
