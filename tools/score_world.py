"""How many questions of the small world a model answers rightly, by task, on rows of ``tools/make_world.py``.

    python tools/score_world.py runs/omni-tiny out/world/test.jsonl --out answers.jsonl

The model answers the last question of each row greedily. An answer is right if all its words are those expected; case
and punctuation do not count. Of the task ``transcribe`` the word errors are told too. Needs pip install -e '.[eval]'.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checks import check_int
from omni_jax.evaluation.word_errors import count_word_errors, normalize
from omni_jax.plain_files import replace_file
from tools.command_errors import exit_on_error
from tools.task_rows import read_by_task
from tools.word_errors import answer

TRANSCRIBE = "transcribe"  # the task whose word errors are told


@dataclass(frozen=True)
class Options:
    """What is asked."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with a task."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Write what was expected and answered here."""
    most: int | None = None
    """Rows of each task, at most; all if nothing is said."""
    max_tokens: int = 48
    """Of an answer."""
    batch_size: int = 16
    """Dialogues that are answered at once."""


@dataclass(frozen=True)
class Answered:
    """A question with the answer that it was given."""

    task: str
    row: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        return normalize(self.answer) == normalize(self.expected)


@dataclass(frozen=True)
class Score:
    """Of a task.

    Attributes:
      right: questions that were answered rightly.
      asked: all of them.
    """

    right: int
    asked: int

    @property
    def interval(self) -> tuple[float, float]:
        """In which the share of right answers lies with a probability of 95 % (Wilson)."""
        found = binomtest(self.right, self.asked).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


def ask(options: Options) -> list[Answered]:
    """Answers to all rows.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--batch-size", options.batch_size, 1)
    if options.most is not None:
        check_int("--most", options.most, 1)
    by_task = read_by_task(options.rows)
    chosen = [(task, reply) for task, own in by_task.items() for reply in own[: options.most]]
    model = omni_jax.load(options.model, components=("thinker",))
    prompts = [reply.prompt for _, reply in chosen]
    answers = answer(model, prompts, batch_size=options.batch_size, max_tokens=options.max_tokens)
    return [Answered(task, reply.row, reply.text, text) for (task, reply), text in zip(chosen, answers, strict=True)]


def score(answered: Sequence[Answered]) -> dict[str, Score]:
    """The score of each task, by name."""
    scores = {}
    for task in sorted({a.task for a in answered}):
        of_task = [a.is_right for a in answered if a.task == task]
        scores[task] = Score(sum(of_task), len(of_task))
    return scores


def show(answered: Sequence[Answered]) -> None:
    """Prints the scores."""
    table = Table("task", "asked", "right", "95 %")
    for task, found in score(answered).items():
        low, high = found.interval
        table.add_row(task, str(found.asked), f"{found.right / found.asked:.1%}", f"{low:.1%} to {high:.1%}")
    Console().print(table)
    transcribed = [a for a in answered if a.task == TRANSCRIBE]
    if transcribed:
        errors = count_word_errors([a.expected for a in transcribed], [a.answer for a in transcribed])
        print(f"{TRANSCRIBE}: {errors}")


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    with exit_on_error():
        answered = ask(options)
    if options.out is not None:
        lines = [json.dumps(vars(a), ensure_ascii=False) + "\n" for a in answered]
        replace_file(options.out, "".join(lines).encode())
    show(answered)


if __name__ == "__main__":
    main()
