"""Files of folders that strangers made, and files that are made where strangers may write.

A folder may come from anywhere: what is read of it must be plain files that lie in it, of a size that is known to be
harmless. A link may lead to another file of the folder, or, in a cache of the Hugging Face Hub, to where the cache
keeps contents: ``models--ORG--NAME/snapshots/REVISION/config.json -> ../../blobs/HASH``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from pathlib import Path
from typing import Any, BinaryIO

from omni_jax.checks import shown
from omni_jax.errors import CheckpointError, InputError

MAX_SMALL_FILE = 2**26
"""Bytes of any file but those of parameters; the largest published one, ``tokenizer.json``, has 11 million."""

MAX_NESTING = 64
"""Levels of lists and objects in a JSON file; published ones have up to 8."""

_MAX_NAME_BYTES = 255  # what file systems take


def resolve_file(path: Path, root: Path | None = None) -> Path:
    """Where a file of a folder is, with all links followed.

    Args:
      path: the file.
      root: the folder; the one that the file is in if None.

    Raises:
      OSError: if nothing is there.
      CheckpointError: if it is no plain file, or a link leads out of the folder or nowhere.
    """
    folder = (path.parent if root is None else root).resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: links in a circle, in Python 3.12 and older
        if path.is_symlink() or isinstance(e, RuntimeError):
            raise CheckpointError(f"{path} is a link that leads nowhere; fetch the file again") from e
        raise
    if not (real.is_relative_to(folder) or real.parent in _contents_folders(folder)):
        raise CheckpointError(f"{path} is a link to {real}, outside its folder; copy the file into the folder instead")
    if not real.is_file():
        raise CheckpointError(f"cannot read {path}: it is no plain file")
    return real


def _contents_folders(folder: Path) -> list[Path]:
    """Where a cache of the Hub that a folder lies in keeps the contents of its files."""
    found = []
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            found.append(parent.parent / "blobs")
    return found


def has_file(path: Path) -> bool:
    """Whether something stands at ``path``, which ``read_file`` then reads or refuses; a folder does not count."""
    return path.is_symlink() or (path.exists() and not path.is_dir())


def is_plain_name(name: str) -> bool:
    """Whether it names something in the folder that it is looked for in, and not a path."""
    is_path = name in ("", ".", "..") or "/" in name
    return not is_path and name.isprintable() and len(name.encode()) <= _MAX_NAME_BYTES


def read_file(path: Path) -> bytes:
    """The contents of a small file of a stranger's folder.

    Raises:
      OSError: if it cannot be read.
      CheckpointError: where ``resolve_file`` does, and if it is larger than ``MAX_SMALL_FILE``.
    """
    with resolve_file(path).open("rb") as file:
        data = file.read(MAX_SMALL_FILE + 1)
    if len(data) > MAX_SMALL_FILE:
        raise CheckpointError(f"{path} has over {MAX_SMALL_FILE:,} bytes, the most that such a file may have")
    return data


def read_object(path: Path, error: type[ValueError] = CheckpointError) -> dict[str, Any]:
    """The JSON object in a small file of a stranger's folder.

    Raises:
      ``error``: if the file cannot be read, or holds anything else: no UTF-8, no JSON, or nested too deeply.
    """
    try:
        values = json.loads(read_file(path).decode())
        _check_nesting(values)
    except OSError as e:
        raise error(f"cannot read {path}: {e.strerror}") from e
    except CheckpointError as e:  # a ValueError too, with the right message already
        raise error(str(e)) from e
    except (ValueError, RecursionError) as e:  # ValueError: not JSON, not UTF-8, or a number of thousands of digits
        raise error(f"{path} is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise error(f"{path} must hold an object, got {shown(values)}")
    return values


def _check_nesting(values: Any) -> None:
    """Checks how deep JSON is nested, so that what reads it may call itself for each level."""
    level = [values]
    for _ in range(MAX_NESTING):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
        if not below:
            return
        level = below
    raise ValueError(f"it is nested over {MAX_NESTING} levels deep")


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file of a stranger's folder to a name where nothing is yet.

    Raises:
      CheckpointError: where ``read_file`` does, and if the copy cannot be made.
    """
    try:
        data = read_file(source)
        with create_file(target) as file:
            file.write(data)
    except OSError as e:
        raise CheckpointError(f"cannot copy {source} to {target}: {e.strerror or e}") from e


def link_folder(source: Path, target: Path, root: Path) -> None:
    """One more name for each file of a folder; a copy of it where the file system has no hard links.

    Args:
      source: the folder, a part of ``root``.
      target: where to; files that are there stay as they are.
      root: a stranger's folder, which no link may lead out of.

    Raises:
      CheckpointError: where ``resolve_file`` does, and if something of the same name is there or cannot be written.
    """
    for file in list_files(source, root):
        link = target / file.relative_to(source)
        real = resolve_file(file, root)
        try:
            link.parent.mkdir(parents=True, exist_ok=True)
            # both names stand for the same bytes, which nothing changes once a checkpoint is written
            os.link(real, link, follow_symlinks=False)
        except FileExistsError as e:
            raise CheckpointError(f"{link} exists already, and is not written over") from e
        except OSError:
            _copy_large_file(real, link)


def _copy_large_file(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as file, create_file(target) as copy:
            shutil.copyfileobj(file, copy, 2**20)
    except OSError as e:
        raise CheckpointError(f"cannot copy {source} to {target}: {e.strerror or e}") from e


def list_files(folder: Path, root: Path) -> list[Path]:
    """The files in a folder and in those below it; links to folders are refused.

    Raises:
      CheckpointError: for a link to a folder, and where ``resolve_file`` does.
    """
    if not folder.resolve().is_relative_to(root.resolve()):
        raise CheckpointError(f"{folder} is a link that leads out of {root}")
    files = []
    for where, folder_names, file_names in os.walk(folder):  # links to folders are listed, and not followed
        for name in folder_names:
            if Path(where, name).is_symlink():
                raise CheckpointError(f"{Path(where, name)} is a link to a folder; copy the folder instead")
        for name in file_names:
            resolve_file(Path(where, name), root)
            files.append(Path(where, name))
    return sorted(files)


def create_file(path: Path) -> BinaryIO:
    """Makes a file to write into, where neither a file nor a link is yet.

    Raises:
      OSError: if it cannot be made.
    """
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def open_own_file(path: Path, *, append: bool = False) -> BinaryIO:
    """Opens a plain file for reading and writing, and makes it if it is not there.

    A link is not followed: whoever can write into the folder could make the writer write over any file by it.

    Args:
      path: of the file.
      append: whether all that is written goes to its end.

    Raises:
      InputError: if it is a link or no plain file.
      OSError: if it cannot be opened.
    """
    if path.is_symlink():
        raise InputError(f"{path} is a link; name the file itself")
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else 0)
    # without waiting, which the opening of a pipe would do
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path} is no plain file")
    return open(descriptor, "a+b" if append else "r+b")


def unfinished_name(path: Path) -> Path:
    """A name beside ``path`` for what becomes it by renaming; nobody can foresee it and put a link there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file that is there as a whole or not at all, over the one that was there.

    Raises:
      OSError: if it cannot be written.
    """
    unfinished = unfinished_name(path)  # in the same folder, for only within a file system is a rename one step
    try:
        with create_file(unfinished) as file:
            file.write(data)
        unfinished.replace(path)
    finally:  # gone already where all went well
        unfinished.unlink(missing_ok=True)
