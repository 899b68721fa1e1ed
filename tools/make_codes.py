"""Adds to rows of speech the codes of their sounds: ``codec_ids``, and ``codec``, the fingerprint of the tokenizer.

    python tools/make_codes.py speech.jsonl codes.jsonl --model out/tokenizer

A row has ``audio``; all else that it has is kept. Training with such rows is told the fingerprint once and refuses rows
of another one (docs/data.md). The output must lie where the rows lie, for their sounds are named from there. A command
that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import printable
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row, open_rows
from omni_jax.engine.speech_tokenizer_engine import RATE, SpeechTokenizerEngine
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.plain_files import replace_file
from omni_jax.processing.fetch import NO_ACCESS

_ROWS_PER_CALL = 16  # whose sounds are read and encoded together


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    model: Path
    """Checkpoint with a speech tokenizer, or the folder of a run."""
    media_root: str | None = None
    """Folder that the sounds must lie within; without it, that of the rows."""
    skip_bad: bool = False
    """Leave out rows that cannot be read, and tell how many; without it, the first one ends the command."""


def count_done(partial: Path, fingerprint: str) -> int:
    """Rows that an earlier command has got through.

    Raises:
      InputError: if they are of another tokenizer.
    """
    if not partial.exists():
        return 0
    complete = b""
    for line in partial.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        complete += line
    # what a kill has cut short is made again
    partial.write_bytes(complete)
    done = 0
    for line in complete.splitlines():
        values = json.loads(line)
        if values["codec"] != fingerprint:
            raise InputError(
                f"{partial} has codes of {values['codec']}, and this tokenizer is {fingerprint}; remove it"
            )
        done = values["row"] + 1
    return done


def encode_rows(engine: SpeechTokenizerEngine, rows: Sequence[tuple[int, Row]], options: Options) -> Iterator[str]:
    """A line for each row that can be read: its values with codes, and its number.

    Raises:
      InputError: naming the row, for one that cannot be read.
    """
    numbers = []
    all_values: list[dict[str, Any]] = []
    sounds = []
    for number, row in rows:
        try:
            values = row_values(row)
            sound = read_sound(row, values, "audio", RATE, NO_ACCESS, options.media_root)
            if not len(sound):
                raise InputError("audio has no samples")
        except InputError as e:
            if not options.skip_bad:
                raise InputError(f"{row.name}: {e}") from e
            continue
        numbers.append(number)
        all_values.append(values)
        sounds.append(sound)
    for number, values, codes in zip(numbers, all_values, engine.encode(sounds), strict=True):
        made = {**values, "codec_ids": codes.tolist(), "codec": engine.fingerprint, "row": number}
        yield json.dumps(made, ensure_ascii=False) + "\n"


def make_codes(options: Options) -> int:
    """Writes the rows with codes; returns how many were left out.

    Raises:
      CheckpointError, ConfigError: if there is no tokenizer.
      InputError: if the output is there or lies elsewhere, or a row cannot be read.
    """
    if options.out.exists():
        raise InputError(f"{options.out} exists already; name another file")
    source = Path(options.rows)
    if options.media_root is None and source.parent.resolve() != options.out.parent.resolve():
        raise InputError(
            f"{options.out} lies elsewhere than {source}, whose sounds would not be found from there; write beside it, "
            "or name --media-root here and in training"
        )
    rows = open_rows(options.rows)
    engine = SpeechTokenizerEngine.load(resolve_checkpoint(options.model))
    partial = options.out.with_name(f"{options.out.name}.partial")
    done = count_done(partial, engine.fingerprint)
    starts = range(done, len(rows), _ROWS_PER_CALL)
    with open(partial, "a", encoding="utf-8") as file:
        for start in track(starts, description="encoding", console=Console(stderr=True)):
            batch = [(number, rows[number]) for number in range(start, min(start + _ROWS_PER_CALL, len(rows)))]
            file.writelines(encode_rows(engine, batch, options))
            file.flush()
    return _finish(partial, options.out, len(rows))


def _finish(partial: Path, out: Path, num_rows: int) -> int:
    """Takes the numbers out of the rows and gives the file its name; returns how many rows it lacks."""
    lines = []
    for line in partial.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        del values["row"]
        lines.append(json.dumps(values, ensure_ascii=False) + "\n")
    replace_file(out, "".join(lines).encode())
    partial.unlink()
    print(f"{out}: {len(lines)} rows")
    return num_rows - len(lines)


def main(options: Options) -> int:
    try:
        num_bad = make_codes(options)
    except (CheckpointError, ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    if num_bad:
        print(f"{num_bad} rows could not be read and are left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
