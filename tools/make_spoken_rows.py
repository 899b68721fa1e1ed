"""Makes rows for the Talker of speech with its text and its codes (``tools/make_codes.py``).

    python tools/make_spoken_rows.py codes.jsonl spoken.jsonl --clips 0.5

Each row asks for the text to be read aloud (``--question``), under the system prompt of speech, and its answer is the
text, spoken by the row's codes in the row's ``voice``. A share of them (``--clips``) is given another utterance of the
voice to go on from, so that the Talker learns voices that it is shown; of those half have no name of a voice.
The same seed gives the same rows.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_float, shown
from omni_jax.data.rows import row_values
from omni_jax.data.sources import Row, open_rows
from omni_jax.errors import InputError
from omni_jax.plain_files import replace_file
from omni_jax.processing.read_aloud import QUESTION, make_dialogue
from tools.command_errors import exit_on_error


@dataclass(frozen=True)
class Options:
    """What to read and write."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CODES.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SPOKEN.jsonl")]
    question: str = QUESTION
    """What each row asks; {text} is its text."""
    clips: float = 0.0
    """Share of the rows that go on from another utterance of their voice."""
    seed: int = 0


def read_utterance(row: Row) -> dict[str, Any]:
    """The values of a row.

    Raises:
      InputError: naming the row, if it has no text or no codes.
    """
    try:
        values = row_values(row)
        if not isinstance(values.get("text"), str):
            raise InputError(f"text is {shown(values.get('text'))}; it must be what is said")
        if not isinstance(values.get("codec_ids"), list):
            raise InputError("it has no codec_ids; tools/make_codes.py adds them")
        return values
    except InputError as e:
        raise InputError(f"{row.name}: {e}") from e


def make_row(
    values: Mapping[str, Any], question: str, clip: Mapping[str, Any] | None, names_voice: bool
) -> dict[str, Any]:
    """The row of an utterance.

    Args:
      values: of the utterance.
      question: what is asked.
      clip: another utterance, from which it goes on; None: there is none.
      names_voice: whether the row says whose voice it is.
    """
    speech: dict[str, Any] = {"codec_ids": values["codec_ids"]}
    if names_voice and "voice" in values:
        speech["voice"] = values["voice"]
    if "codec" in values:
        speech["codec"] = values["codec"]
    if clip is not None:
        speech["ref"] = {"codec_ids": clip["codec_ids"], "text": clip["text"]}
    return {"messages": make_dialogue(values["text"], question), "speech": speech}


def make_rows(utterances: Sequence[Mapping[str, Any]], options: Options) -> list[dict[str, Any]]:
    """The rows of all utterances."""
    rng = np.random.default_rng(options.seed)
    by_voice: dict[str, list[int]] = {}
    for number, values in enumerate(utterances):
        by_voice.setdefault(str(values.get("voice")), []).append(number)
    rows = []
    for number, values in enumerate(utterances):
        others = by_voice[str(values.get("voice"))]
        # drawn for every row, so that the share of clips changes nothing else
        has_clip, is_anonymous, place = rng.random(3)
        clip = None
        if has_clip < options.clips and len(others) > 1:
            other = others[int(place * len(others))]
            # its neighbour, where the utterance itself was drawn
            clip = utterances[other if other != number else others[(others.index(other) + 1) % len(others)]]
        rows.append(make_row(values, options.question, clip, clip is None or is_anonymous < 0.5))
    return rows


def main(options: Options) -> None:
    with exit_on_error():
        check_float("clips", options.clips, 0, 1)
        if options.out.exists():
            raise InputError(f"{options.out} exists already; name another file")
        utterances = [read_utterance(row) for row in open_rows(options.rows)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_rows(utterances, options)]
        replace_file(options.out, "".join(lines).encode())
    print(f"{options.out}: {len(lines)} rows")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
