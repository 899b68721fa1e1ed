"""Writes rows into an ArrayRecord file, which training reads at random and shuffles as a whole.

``python tools/make_arrayrecord.py rows.jsonl rows.arrayrecord``
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import redact
from omni_jax.data.rows import is_path, map_media_sources, resolve_source, row_values
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import InputError
from omni_jax.plain_files import unfinished_name
from omni_jax.processing.fetch import MAX_FETCHED_BYTES, NO_ACCESS, RemoteAccess, fetch_source
from omni_jax.processing.files import folder_of
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.sources import Source, confine_source, describe_source, locate_source
from omni_jax.processing.worker_pool import MediaLimits, WorkerStartError
from tools.command_errors import exit_on_error

Rows = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]

DEFAULT_LIMITS = MediaLimits()


@dataclass(frozen=True)
class Embedding:
    """Which media are copied into the rows.

    Attributes:
      media_root: the folder that they must lie within; None: that of the row's file.
      access: from which hosts and buckets they may be fetched.
      limits: of time and memory, for the process that looks into each of them.
    """

    media_root: str | None = None
    access: RemoteAccess = NO_ACCESS
    limits: MediaLimits = DEFAULT_LIMITS


def write(src: str, dst: Path, *, embed: Embedding | None = None, progress: Callable[[int, int], None]) -> int:
    """Writes every row of ``src``; ``dst`` appears only once it is whole.

    Args:
      src: files of rows, see ``omni_jax.data.sources.open_rows``.
      dst: where to.
      embed: which media are copied into the rows; None: none are.
      progress: is told how many rows of how many are written.

    Returns:
      How many rows there were.

    Raises:
      InputError: naming the row, if one is no object or a medium that is to be embedded cannot be read; or if ``dst``
        is there.
    """
    if dst.exists() or dst.is_symlink():
        raise InputError(f"{dst} exists already; name another file")
    rows = open_rows(src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # beside the destination, since a rename is one step only within a file system
    partial_file = unfinished_name(dst)
    try:
        writer = ArrayRecordWriter(str(partial_file), "group_size:1")  # a row at a time is read
        with MediaWorkers(None, 1, DEFAULT_LIMITS if embed is None else embed.limits) as workers:
            for i, row in enumerate(rows):
                progress(i, len(rows))
                writer.write(record(row, dst.parent, embed, workers))
        writer.close()
        os.replace(partial_file, dst)
    # after a rename there is none left
    finally:
        partial_file.unlink(missing_ok=True)
    progress(len(rows), len(rows))
    return len(rows)


def record(row: Row, folder: Path, embed: Embedding | None, workers: MediaWorkers) -> bytes:
    """The JSON of a row whose media are found from ``folder``, or are in it once ``workers`` have looked into them.

    Raises:
      InputError: naming the row, as ``write`` does.
    """
    # TypeError: what Parquet may hold and JSON cannot, such as dates
    try:
        if embed is None:
            place = partial(_linked, from_folder=os.path.dirname(row.file), to_folder=folder)
        else:
            place = partial(_embedded, from_folder=folder_of(row.file), embedding=embed, workers=workers)
        values = map_media_sources(row_values(row), place)
        return json.dumps(values, ensure_ascii=False).encode()
    except (InputError, TypeError) as e:
        raise InputError(f"{row.name}: {redact(str(e))}") from e


def _linked(source: str | bytes, from_folder: str, to_folder: Path) -> str:
    """A relative path, seen from where the new file is; anything else as it is."""
    # JSON has no bytes; rows of Parquet do
    if isinstance(source, bytes):
        return _data_url(source)
    place = resolve_source(source, from_folder)
    return os.path.relpath(place, to_folder) if is_path(place) and not os.path.isabs(source) else place


def _embedded(source: str | bytes, from_folder: str, embedding: Embedding, workers: MediaWorkers) -> str:
    # whoever wrote the rows need not be who runs this: what they name must lie where it may, and be media
    try:
        found = confine_source(source, from_folder, embedding.media_root or from_folder, "--media-root")
        # read once, so that what is embedded is what has been looked into
        data = _read_bytes(locate_source(fetch_source(found, embedding.access)))
        workers.check_media(Source(data))
        return _data_url(data)
    except WorkerStartError:
        raise
    except InputError as e:
        raise InputError(f"{describe_source(source)}: {e}") from e


def _read_bytes(source: Source) -> bytes:
    with source.open() as file:
        data = file.read(MAX_FETCHED_BYTES + 1)
    if len(data) > MAX_FETCHED_BYTES:
        raise InputError(f"it is over the limit of {MAX_FETCHED_BYTES} bytes")
    return data


def _data_url(data: bytes) -> str:
    # readers look at the contents and not at the type
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def main(
    src: Rows,
    dst: Target,
    embed: bool = False,
    media_root: str | None = None,
    allow_web: tuple[str, ...] = (),
    allow_buckets: tuple[str, ...] = (),
    media: MediaLimits = DEFAULT_LIMITS,
) -> None:
    """Writes rows into an ArrayRecord file, which training reads at random and shuffles as a whole.

    The rows stay what they are (docs/data.md lists their shapes): one JSON object a record. For example:

        python tools/make_arrayrecord.py rows.jsonl out/rows.arrayrecord --embed
        python train.py thinker-sft-7b --data.train out/rows.arrayrecord

    Args:
      src: JSONL, Parquet or ArrayRecord; a pattern in quotes ('rows-*.jsonl') makes one file of many.
      dst: where to; nothing may be there yet. It appears once it is whole: stopped on the way, nothing is there.
      embed: copy the media into the file, so that it can be moved alone and a row is one read. Without it, the rows
        keep the paths, and relative ones are rewritten so that they hold from the new place.
      media_root: with --embed: the folder that media must lie within; without it, that of the file of each row.
      allow_web: with --embed: hosts that media may be fetched from: example.com, '*.example.com' for all below it, '*'
        for every public one.
      allow_buckets: with --embed: where in buckets media may be read: gs://BUCKET/FOLDER.
      media: with --embed: limits for the process that looks whether a file is media.
    """
    columns = TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn()
    with exit_on_error():
        embedding = Embedding(media_root, RemoteAccess(allow_web, allow_buckets), media) if embed else None
        with Progress(*columns) as bar:
            task = bar.add_task("", total=None)
            count = write(src, dst, embed=embedding, progress=lambda n, of: bar.update(task, completed=n, total=of))
    print(f"{dst}: {count} rows, {dst.stat().st_size:,} bytes")


if __name__ == "__main__":
    tyro.cli(main)
