"""Adds to rows of speech the codes of their sounds: ``codec_ids``, and ``codec``, the fingerprint of the tokenizer.

    python tools/make_codes.py speech.jsonl codes.jsonl --model out/tokenizer

A row has ``audio``; all else that it has is kept. Training with such rows is told the fingerprint once and refuses rows
of another one (docs/data.md). The output must lie where the rows lie, for their sounds are named from there. A command
that was stopped goes on where it was.

With ``--perturb`` the codes are those of the sound in another voice, each row's its own, while the row still names its
sound and its voice: codes of such rows say less of who speaks (docs/speech-training.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int, printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Files, Row, open_rows
from omni_jax.engine.speech_tokenizer_engine import RATE, SpeechTokenizerEngine
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.voice_perturbation import VoicePerturbation

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
    perturb: bool = False
    """Make the codes of the sound with its pitch and its formants moved; all else of the row stays."""
    seed: int = 0
    """Of what --perturb draws: each row draws by this and its number."""


def read_row_sound(row: Row, values: dict[str, Any], number: int, options: Options) -> Float[np.ndarray, " n"]:
    """The samples that a row's codes are made of, at ``RATE``.

    Args:
      row: it.
      values: of it.
      number: of the row in its file, from 0; what is drawn for it does not depend on the rows before.
      options: of the command.

    Raises:
      InputError: if there is no sound.
    """
    sound = read_sound(row, values, "audio", RATE, NO_ACCESS, options.media_root)
    if not len(sound):
        raise InputError("audio has no samples")
    if options.perturb:
        sound = VoicePerturbation().apply(sound, RATE, np.random.default_rng((options.seed, number)))
    return sound


def encode_rows(
    engine: SpeechTokenizerEngine, rows: Files, numbers: Sequence[int], options: Options
) -> list[dict[str, Any] | str]:
    """Of each of the numbered rows its values with codes, or why it cannot be read.

    Raises:
      InputError: naming the row, for one that cannot be read and is not to be left out.
    """
    results: list[dict[str, Any] | str] = []
    sounds = []
    for number in numbers:
        row = rows[number]
        try:
            values = row_values(row)
            sound = read_row_sound(row, values, number, options)
        except InputError as e:
            if not options.skip_bad:
                raise InputError(f"{row.name}: {e}") from e
            results.append(str(e))
            continue
        sounds.append(sound)
        results.append(values)
    codes = iter(engine.encode(sounds))
    for result in results:
        if isinstance(result, dict):
            result |= {"codec_ids": next(codes).tolist(), "codec": engine.fingerprint}
    return results


def make_codes(options: Options) -> int:
    """Writes the rows with codes; returns how many were left out.

    Raises:
      CheckpointError, ConfigError: if there is no tokenizer.
      InputError: if the output is there or lies elsewhere, the seed is negative, or a row cannot be read.
    """
    check_int("seed", options.seed, 0)
    source = Path(options.rows)
    if options.media_root is None and source.parent.resolve() != options.out.parent.resolve():
        raise InputError(
            f"{options.out} lies elsewhere than {source}, whose sounds would not be found from there; write beside it, "
            "or name --media-root here and in training"
        )
    rows = open_rows(options.rows)
    engine = SpeechTokenizerEngine.load(resolve_checkpoint(options.model))
    settings = {
        "rows": options.rows,
        "num_rows": len(rows),
        "codec": engine.fingerprint,
        "perturbed_by": options.seed if options.perturb else None,
    }
    with ResumedRows(options.out, settings) as made:
        starts = range(made.num_done, len(rows), _ROWS_PER_CALL)
        for start in track(starts, description="encoding", console=Console(stderr=True)):
            numbers = range(start, min(start + _ROWS_PER_CALL, len(rows)))
            results = encode_rows(engine, rows, numbers, options)
            for number, result in zip(numbers, results, strict=True):
                if isinstance(result, str):
                    made.add(number, None, result)
                else:
                    made.add(number, result)
        num_rows = made.finish()
    print(f"{options.out}: {num_rows} rows")
    return len(rows) - num_rows


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
