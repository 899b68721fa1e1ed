"""Makes rows for training of a table of sounds: a csv file with the path of a sound and what is said in it a line.

    python tools/make_rows.py sounds.csv rows.jsonl --valid valid.jsonl

Each row asks for the text of a sound; ``--question`` says how. Every tenth row is held out. The csv file has a heading;
``--audio`` and ``--text`` name its columns. Paths are relative to the csv file, or to ``--media-root``.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.errors import InputError
from tools.command_errors import exit_on_error


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    table: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.csv")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    valid: Path | None = None
    """Write the rows that are held out here; without it, none are."""
    every: int = 10
    """Hold out one of so many."""
    audio: str = "file"
    """Column with the path of a sound."""
    text: str = "text"
    """Column with what is said."""
    question: str = "What is said?"
    """What each row asks."""
    media_root: Path | None = None
    """Where relative paths start; without it, the folder of the csv file."""


def read_table(options: Options) -> list[dict[str, Any]]:
    """A row for training of each line of the table.

    Raises:
      InputError: naming the line, for one without a text or a file.
    """
    root = options.table.parent if options.media_root is None else options.media_root
    rows = []
    try:
        with open(options.table, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            for name in (options.audio, options.text):
                if name not in (table.fieldnames or ()):
                    columns = ", ".join(table.fieldnames or ())
                    raise InputError(f"{options.table} has no column {name!r}; it has {columns}")
            for line in table:
                where = f"{options.table}, line {table.line_num}"
                path = (root / (line[options.audio] or "")).resolve()
                text = (line[options.text] or "").strip()
                if not path.is_file():
                    raise InputError(f"{where}: there is no file {path}")
                if not text:
                    raise InputError(f"{where}: there is no text")
                question = {"type": "text", "text": options.question}
                content = [{"type": "audio", "audio": str(path)}, question]
                answer = {"role": "assistant", "content": text}
                rows.append({"messages": [{"role": "user", "content": content}, answer]})
    except OSError as e:
        raise InputError(f"cannot read {options.table}: {e.strerror or e}") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{options.table} is no csv file in UTF-8: {e}") from e
    if not rows:
        raise InputError(f"{options.table} has no lines below its heading")
    return rows


def make_rows(options: Options) -> tuple[int, int]:
    """Writes the rows; returns how many are trained on and how many are held out.

    Raises:
      InputError: for a table that cannot be used.
    """
    if options.every < 2:
        raise InputError(f"--every is {options.every}; it must be at least 2")
    train = []
    valid = []
    for number, row in enumerate(read_table(options)):
        is_held_out = options.valid is not None and number % options.every == options.every - 1
        (valid if is_held_out else train).append(row)
    write_rows(options.out, train)
    if options.valid is not None:
        write_rows(options.valid, valid)
    return len(train), len(valid)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    with exit_on_error():
        trained, held_out = make_rows(tyro.cli(Options, description=__doc__))
    print(f"{trained} rows to train on, {held_out} held out")


if __name__ == "__main__":
    main()
