"""Word errors of a model's answers to rows: substitutions, deletions and insertions over the words that are expected.

    python tools/word_errors.py runs/asr valid.jsonl --out answers.jsonl

The last reply of each dialogue is what is expected; the model answers what comes before it, greedily. Case and
punctuation do not count. Needs pip install -e '.[eval]'.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jiwer
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checks import printable
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.generation.model import OmniModel


@dataclass(frozen=True)
class Options:
    """What is compared."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Dialogues as in training, each ending in a reply; each file is counted apart."""
    adapter: Path | None = None
    """Answer with this adapter (LoRA)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Write what was expected and answered here."""
    max_tokens: int = 256
    """Of an answer."""
    batch_size: int = 16
    """Dialogues that are answered at once."""


def normalize(text: str) -> str:
    """Lower case, without punctuation, with single spaces."""
    return " ".join(re.sub(r"[^\w\s']", " ", text.lower()).split())


def count_errors(expected: Sequence[str], answers: Sequence[str]) -> float:
    """Word errors over words.

    Raises:
      InputError: if nothing is expected.
    """
    wanted = [normalize(text) for text in expected]
    if not any(wanted):
        raise InputError("no word is expected in any row")
    return float(jiwer.process_words(wanted, [normalize(text) for text in answers]).wer)


def answer_rows(model: OmniModel, rows: Sequence[dict[str, Any]], options: Options) -> list[str]:
    """The model's answers; an error of one is an answer without words."""
    adapter = None if options.adapter is None else "adapter"
    answers = []
    starts = range(0, len(rows), options.batch_size)
    for start in track(starts, description="answering", console=Console(stderr=True)):
        prompts = [row["messages"][:-1] for row in rows[start : start + options.batch_size]]
        replies = model.generate_batch(
            prompts, batch_size=options.batch_size, max_tokens=options.max_tokens, adapter=adapter
        )
        for reply in replies:
            if reply.error is not None:
                print(f"not answered: {printable(str(reply.error))}", file=sys.stderr)
            answers.append(reply.text)
    return answers


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Dialogues that end in a reply.

    Raises:
      InputError: naming the line that is none.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise InputError(f"cannot read {path}: {e}") from e
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            last = row["messages"][-1]
            is_reply = last["role"] == "assistant" and isinstance(last["content"], str)
        except (ValueError, KeyError, IndexError, TypeError):
            is_reply = False
        if not is_reply:
            raise InputError(f"{path}, line {number}: there is no dialogue that ends in a reply (see docs/data.md)")
        rows.append(row)
    if not rows:
        raise InputError(f"{path} has no rows")
    return rows


def measure(options: Options) -> dict[str, float]:
    """Word errors of each file of rows.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    files = {path: read_rows(path) for path in options.rows}
    adapters = {} if options.adapter is None else {"adapter": options.adapter}
    model = omni_jax.load(options.model, components=("thinker",), adapters=adapters)
    errors = {}
    lines = []
    for path, rows in files.items():
        expected = [row["messages"][-1]["content"] for row in rows]
        answers = answer_rows(model, rows, options)
        errors[str(path)] = count_errors(expected, answers)
        for text, answer in zip(expected, answers, strict=True):
            lines.append(json.dumps({"file": str(path), "expected": text, "answer": answer}, ensure_ascii=False))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return errors


def main() -> None:
    try:
        errors = measure(tyro.cli(Options, description=__doc__))
    except (CheckpointError, ConfigError, InputError) as e:
        raise SystemExit(f"error: {printable(str(e))}") from None
    for name, value in errors.items():
        print(f"{name}: {value:.1%} word errors")


if __name__ == "__main__":
    main()
