"""Files by name, on a disk or in a bucket (``gs://``, through fsspec)."""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from omni_jax.checks import redact
from omni_jax.errors import InputError
from omni_jax.plain_files import replace_file

_BUCKET = "gs://"
_BUCKET_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]*(/.*)?", re.DOTALL)
_MAX_REASON = 500  # characters of what a bucket says


class BucketError(OSError):
    """A bucket cannot be read or written: what its libraries raise, in the type that errors of disks have."""


def is_remote(name: str) -> bool:
    """Whether it is in a bucket."""
    return name.startswith(_BUCKET)


def check_bucket_url(url: str) -> None:
    """Raises InputError unless it names a place in a bucket, in a way that can be compared with others."""
    # without a bucket fsspec takes what follows "gs:" for a path of this machine, and "::" for a chain of file systems
    if not _BUCKET_URL.fullmatch(url) or "::" in url:
        raise InputError("a place in a bucket must look like gs://bucket/name, without '::'")
    # plain parts of a name to a bucket, but not to all that reads names
    if not {".", ".."}.isdisjoint(url.split("/")):
        raise InputError("a place in a bucket must not have '.' or '..' among its parts")


def open_bucket(url: str) -> tuple[Any, str]:
    """The file system of a ``gs://`` URL, as fsspec has it, and the path in it.

    Raises:
      InputError: if it is no such URL, the libraries that read buckets are not installed, or there is no access.
    """
    check_bucket_url(url)
    try:
        import fsspec  # only who reads buckets needs it

        return fsspec.core.url_to_fs(url)
    except ImportError as e:
        raise InputError(f"{redact(url)}: to read buckets, install gcsfs: pip install omni_jax[gcs] ({e})") from e
    except Exception as e:  # of google-auth, of aiohttp
        raise InputError(f"cannot reach the bucket of {redact(url)}: {_describe_error(e)}") from e


@contextlib.contextmanager
def bucket_errors(name: str) -> Iterator[None]:
    """Whatever a bucket's libraries raise within comes out as an OSError, so that buckets fail as disks do.

    gcsfs's HttpError, for one, is a plain Exception, and so are errors of aiohttp and google-auth. Of a name that is
    on a disk nothing is changed.
    """
    try:
        yield
    except (OSError, InputError, MemoryError):
        raise
    except Exception as e:
        if not is_remote(name):
            raise
        raise BucketError(_describe_error(e)) from e


def _describe_error(error: Exception) -> str:
    # an answer of the bucket may quote the URL that was asked for
    return redact(f"{type(error).__name__}: {error}")[:_MAX_REASON]


def open_file(name: str) -> BinaryIO:
    """Opens a file for reading.

    Raises:
      InputError: where ``open_bucket`` does.
      OSError: if it cannot be read.
    """
    if not is_remote(name):
        return open(name, "rb")
    with bucket_errors(name):
        files, path = open_bucket(name)
        return files.open(path, "rb")


def is_file(name: str) -> bool:
    """Whether it is there, and a file.

    Raises:
      InputError: where ``open_bucket`` does.
      OSError: if a bucket cannot be looked into.
    """
    if not is_remote(name):
        return os.path.isfile(name)
    with bucket_errors(name):
        files, path = open_bucket(name)
        return files.isfile(path)


def folder_of(name: str) -> str:
    """The folder that a file is in."""
    # a bare name has no folder before it: it lies in the current one
    return resolve_path(posixpath.dirname(name) if is_remote(name) else os.path.dirname(name) or ".")


def join_path(folder: str, name: str) -> str:
    """A path as seen from a folder."""
    return posixpath.join(folder, name) if is_remote(folder) else os.path.join(folder, name)


def resolve_path(name: str) -> str:
    """A path without ``..``, and on a disk from its root on and without links.

    Raises:
      OSError, ValueError: for what can be no path.
    """
    # objects have no links, and ".." is a plain part of their names; it is resolved all the same, so that a request
    # cannot leave its folder by it
    if is_remote(name):
        return _BUCKET + posixpath.normpath(name.removeprefix(_BUCKET))
    return str(Path(name).resolve())


def is_within(name: str, folder: str) -> bool:
    """Whether one path lies in another, both from ``resolve_path``."""
    if is_remote(folder):
        # with the slash, or gs://bucket/media2 would lie within gs://bucket/media
        return name.startswith(folder.rstrip("/") + "/")
    return not is_remote(name) and Path(name).is_relative_to(folder)


def write_atomically(name: str, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    if is_remote(name):
        with bucket_errors(name):
            files, path = open_bucket(name)
            files.pipe_file(path, data)  # an object is there once it is uploaded
        return
    replace_file(Path(name), data)
