"""Writes rows into an ArrayRecord file, which training reads at random and shuffles as a whole.

``python tools/make_arrayrecord.py rows.jsonl rows.arrayrecord``
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from array_record.python.array_record_module import ArrayRecordWriter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.data.rows import is_path, map_media_sources, resolve_source, row_values
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import InputError
from omni_jax.processing.sources import locate_source

Rows = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
Target = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]


def write(src: str, dst: Path, *, embed: bool = False, progress: Callable[[int, int], None]) -> int:
    """Writes every row of ``src``; ``dst`` appears only once it is whole.

    Args:
      src: files of rows, see ``omni_jax.data.sources.open_rows``.
      dst: where to.
      embed: whether media are copied into the rows.
      progress: is told how many rows of how many are written.

    Returns:
      How many rows there were.

    Raises:
      InputError: naming the row, if one is no object or a medium that is to be embedded cannot be read; or if ``dst``
        is there.
    """
    if dst.exists():
        raise InputError(f"{dst} exists already; name another file")
    rows = open_rows(src)
    dst.parent.mkdir(parents=True, exist_ok=True)
    # beside the destination, since a rename is one step only within a file system
    partial_file = dst.with_name(f"{dst.name}.partial")
    try:
        writer = ArrayRecordWriter(str(partial_file), "group_size:1")  # a row at a time is read
        for i, row in enumerate(rows):
            progress(i, len(rows))
            writer.write(record(row, dst.parent, embed))
        writer.close()
        os.replace(partial_file, dst)
    # after a rename there is none left
    finally:
        partial_file.unlink(missing_ok=True)
    progress(len(rows), len(rows))
    return len(rows)


def record(row: Row, folder: Path, embed: bool) -> bytes:
    """The JSON of a row whose media are found from ``folder``, or are in it."""
    # TypeError: what Parquet may hold and JSON cannot, such as dates
    try:
        place = partial(_embedded if embed else _linked, from_folder=os.path.dirname(row.file), to_folder=folder)
        values = map_media_sources(row_values(row), place)
        return json.dumps(values, ensure_ascii=False).encode()
    except (InputError, TypeError) as e:
        raise InputError(f"{row.name}: {e}") from e


def _linked(source: str | bytes, from_folder: str, to_folder: Path) -> str:
    """A relative path, seen from where the new file is; anything else as it is."""
    # JSON has no bytes; rows of Parquet do
    if isinstance(source, bytes):
        return _data_url(source)
    place = resolve_source(source, from_folder)
    return os.path.relpath(place, to_folder) if is_path(place) and not os.path.isabs(source) else place


def _embedded(source: str | bytes, from_folder: str, to_folder: Path) -> str:
    # inside already
    if isinstance(source, str) and source.startswith("data:"):
        return source
    # whoever runs this has chosen the rows, so what they name is fetched
    try:
        with locate_source(
            source if isinstance(source, bytes) else resolve_source(source, from_folder), allow_urls=True
        ).open() as file:
            return _data_url(file.read())
    except InputError as e:
        raise InputError(f"{source!r:.120}: {e}") from e


def _data_url(data: bytes) -> str:
    # readers look at the contents and not at the type
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def main(src: Rows, dst: Target, embed: bool = False) -> None:
    """Writes rows into an ArrayRecord file, which training reads at random and shuffles as a whole.

    The rows stay what they are (docs/data.md lists their shapes): one JSON object a record. For example:

        python tools/make_arrayrecord.py rows.jsonl out/rows.arrayrecord --embed
        python train.py thinker-sft-7b --data.train out/rows.arrayrecord

    Args:
      src: JSONL, Parquet or ArrayRecord; a pattern in quotes ('rows-*.jsonl') makes one file of many.
      dst: where to; nothing may be there yet. It appears once it is whole: stopped on the way, nothing is there.
      embed: copy the media into the file, so that it can be moved alone and a row is one read. Without it, the rows
        keep the paths, and relative ones are rewritten so that they hold from the new place.
    """
    columns = TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn()
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("", total=None)
            count = write(src, dst, embed=embed, progress=lambda n, of: bar.update(task, completed=n, total=of))
    except InputError as e:
        raise SystemExit(f"error: {e}") from None
    print(f"{dst}: {count} rows, {dst.stat().st_size:,} bytes")


if __name__ == "__main__":
    tyro.cli(main)
