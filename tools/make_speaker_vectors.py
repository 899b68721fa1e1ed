"""Adds to rows of speech the vectors of their speakers, ``speaker``: what the DiT is given of a voice in training.

    python tools/make_speaker_vectors.py codes.jsonl spoken.jsonl --model runs/verifier

A row has ``audio``, half a second of it at least; all else that it has is kept. Clips of voices must go through the
same network when the model speaks (docs/speech-training.md). The output must lie where the rows lie, for their sounds
are named from there. A command that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row, open_rows
from omni_jax.engine.speaker_engine import SpeakerEngine
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.speech_mel import RATE


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    model: Path
    """Checkpoint with a speaker verifier, or the folder of a run."""
    media_root: str | None = None
    """Folder that the sounds must lie within; without it, that of the rows."""
    skip_bad: bool = False
    """Leave out rows that cannot be read, and tell how many; without it, the first one ends the command."""


def add_vector(engine: SpeakerEngine, row: Row, media_root: str | None) -> dict[str, Any]:
    """The row's values with its speaker vector.

    Raises:
      InputError: if it cannot be read, or its sound gives none.
    """
    values = row_values(row)
    sound = read_sound(row, values, "audio", RATE, NO_ACCESS, media_root)
    return {**values, "speaker": engine(sound).tolist()}


def make_speaker_vectors(options: Options) -> int:
    """Writes the rows with vectors; returns how many were left out.

    Raises:
      CheckpointError, ConfigError: if there is no speaker verifier.
      InputError: if the output is there or lies elsewhere, or a row cannot be read.
    """
    source = Path(options.rows)
    if options.media_root is None and source.parent.resolve() != options.out.parent.resolve():
        raise InputError(
            f"{options.out} lies elsewhere than {source}, whose sounds would not be found from there; write beside it, "
            "or name --media-root here and in training"
        )
    rows = open_rows(options.rows)
    engine = SpeakerEngine.load(resolve_checkpoint(options.model))
    settings = {"rows": options.rows, "num_rows": len(rows), "speaker_verifier": engine.fingerprint}
    with ResumedRows(options.out, settings) as made:
        numbers = range(made.num_done, len(rows))
        for number in track(numbers, description="speaker vectors", console=Console(stderr=True)):
            try:
                made.add(number, add_vector(engine, rows[number], options.media_root))
            except InputError as e:
                if not options.skip_bad:
                    raise InputError(f"{rows[number].name}: {e}") from e
                made.add(number, None, str(e))
        num_rows = made.finish()
    print(f"{options.out}: {num_rows} rows")
    return len(rows) - num_rows


def main(options: Options) -> int:
    try:
        num_bad = make_speaker_vectors(options)
    except (CheckpointError, ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    if num_bad:
        print(f"{num_bad} rows could not be read and are left out", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
