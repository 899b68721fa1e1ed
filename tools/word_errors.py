"""Word errors of a model's answers to rows: substitutions, deletions and insertions over the words that are expected.

    python tools/word_errors.py runs/asr valid.jsonl --out answers.jsonl

The last reply of each dialogue is what is expected; the model answers what comes before it, greedily. Case, punctuation
and how numbers are written do not count. Needs pip install -e '.[eval]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checks import check_int, printable
from omni_jax.data.replies import find_last_replies
from omni_jax.data.sources import open_rows
from omni_jax.errors import InputError
from omni_jax.evaluation.word_errors import WordErrors, count_word_errors
from omni_jax.generation.model import OmniModel
from tools.command_errors import exit_on_error

_ADAPTER = "adapter"  # the name of the only one


@dataclass(frozen=True)
class Options:
    """What is compared."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Files of rows as in training; each is counted apart. Rows that answer nothing are passed over."""
    media_root: Path | None = None
    """Media must lie within this folder; without it, within that of the rows."""
    language: str = "en"
    """Of the replies; that of zh, ja and th is counted in characters."""
    adapter: Path | None = None
    """Answer with this adapter (LoRA)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Write what was expected and answered here."""
    max_tokens: int = 256
    """Of an answer."""
    batch_size: int = 16
    """Dialogues that are answered at once."""


def answer(
    model: OmniModel,
    prompts: Sequence[Sequence[Mapping[str, Any]]],
    *,
    batch_size: int,
    max_tokens: int,
    adapter: str | None = None,
) -> list[str]:
    """What the model says to each prompt; where it fails, there is an answer without words.

    Args:
      model: which answers.
      prompts: messages of each.
      batch_size: prompts that are answered at once.
      max_tokens: of an answer.
      adapter: name of the one that answers.
    """
    answers = []
    starts = range(0, len(prompts), batch_size)
    for start in track(starts, description="answering", console=Console(stderr=True)):
        batch = prompts[start : start + batch_size]
        for found in model.generate_batch(batch, batch_size=batch_size, max_tokens=max_tokens, adapter=adapter):
            if found.error is not None:
                print(f"not answered: {printable(str(found.error))}", file=sys.stderr)
            answers.append(found.text)
    return answers


def measure(options: Options) -> dict[str, WordErrors]:
    """Word errors of each file of rows.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--batch-size", options.batch_size, 1)
    media_root = None if options.media_root is None else str(options.media_root)
    files = {}
    for path in options.rows:
        files[path] = find_last_replies(open_rows(str(path)), media_root=media_root)
        if not files[path]:
            raise InputError(f"{path}: no row is a dialogue that ends in a reply (see docs/data.md)")
    adapters = {} if options.adapter is None else {_ADAPTER: options.adapter}
    model = omni_jax.load(options.model, components=("thinker",), adapters=adapters)
    errors = {}
    lines = []
    for path, replies in files.items():
        answers = answer(
            model,
            [reply.prompt for reply in replies],
            batch_size=options.batch_size,
            max_tokens=options.max_tokens,
            adapter=next(iter(adapters), None),
        )
        errors[str(path)] = count_word_errors([reply.text for reply in replies], answers, options.language)
        for reply, text in zip(replies, answers, strict=True):
            line = {"row": reply.row, "expected": reply.text, "answer": text}
            lines.append(json.dumps(line, ensure_ascii=False))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return errors


def main() -> None:
    with exit_on_error():
        errors = measure(tyro.cli(Options, description=__doc__))
    for name, value in errors.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
