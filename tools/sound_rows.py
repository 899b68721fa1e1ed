"""What tools have in common that add something to rows of sounds: options, resuming, rows that cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

from omni_jax.checks import printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.speech_mel import RATE

T = TypeVar("T")


@dataclass(frozen=True)
class SoundRowOptions:
    """What to read and write."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    model: Path
    """Checkpoint with the network that is needed, or the folder of its run."""
    media_root: str | None = None
    """Folder that the sounds must lie within; without it, that of the rows."""
    skip_bad: bool = False
    """Leave out rows that cannot be read, and tell how many; without it, the first one ends the command."""


def extend_rows(
    options: SoundRowOptions,
    settings: Mapping[str, Any],
    prepare: Callable[[int, Float[np.ndarray, " n"]], T],
    compute: Callable[[Sequence[T]], Sequence[Mapping[str, Any]]],
    rows_per_call: int = 1,
) -> int:
    """Writes the rows with what is computed of their sounds; returns how many were left out.

    Args:
      options: of the command.
      settings: what the result depends on beside the rows; a stopped command goes on with the same.
      prepare: of a row's number, from 0, and its samples at ``speech_mel.RATE``; it may raise InputError.
      compute: of prepared sounds the values that each row is to have too.
      rows_per_call: that are computed together.

    Raises:
      InputError: if the output is there or lies elsewhere, or a row cannot be read.
    """
    source = Path(options.rows)
    if options.media_root is None and source.parent.resolve() != options.out.parent.resolve():
        raise InputError(
            f"{options.out} lies elsewhere than {source}, whose sounds would not be found from there; write beside it, "
            "or name --media-root here and in training"
        )
    rows = open_rows(options.rows)
    settings = {"rows": options.rows, "num_rows": len(rows), **settings}
    with ResumedRows(options.out, settings) as made:
        starts = range(made.num_done, len(rows), rows_per_call)
        for start in track(starts, description="rows", console=Console(stderr=True)):
            # of each row its values, or why it cannot be read
            results: list[dict[str, Any] | str] = []
            prepared = []
            for number in range(start, min(start + rows_per_call, len(rows))):
                try:
                    values, sound = _read(rows[number], options.media_root)
                    prepared.append(prepare(number, sound))
                    results.append(values)
                except InputError as e:
                    if not options.skip_bad:
                        raise InputError(f"{rows[number].name}: {e}") from e
                    results.append(str(e))
            computed = iter(compute(prepared))
            for number, result in enumerate(results, start):
                if isinstance(result, str):
                    made.add(number, None, result)
                else:
                    made.add(number, {**result, **next(computed)})
        num_rows = made.finish()
    print(f"{options.out}: {num_rows} rows")
    return len(rows) - num_rows


def _read(row: Row, media_root: str | None) -> tuple[dict[str, Any], Float[np.ndarray, " n"]]:
    """The values of a row, and its sound."""
    values = row_values(row)
    sound = read_sound(row, values, "audio", RATE, NO_ACCESS, media_root)
    if not len(sound):
        raise InputError("audio has no samples")
    return values, sound


def run_command(make: Callable[[], int]) -> int:
    """Runs a command that returns how many rows it has left out; its exit status."""
    try:
        num_bad = make()
    except (CheckpointError, ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    if num_bad:
        print(f"{num_bad} rows could not be read and are left out", file=sys.stderr)
    return 0
