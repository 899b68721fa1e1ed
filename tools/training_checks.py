"""Whether the stages of a training have learned: held-out losses fall, and answers are better than chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from tools.row_files import read_values
from tools.score_world import Answered

_SIGNIFICANCE = 0.01  # the probability that chance alone answers so well


def find_rising(folders: Mapping[str, Path]) -> list[str]:
    """Prints the first and the last held-out loss of each stage.

    Args:
      folders: of the stages' runs, by name; those without held-out rows are passed over.

    Returns:
      Stages whose last loss is not below the first.
    """
    table = Table("stage", "first held-out loss", "last")
    rising = []
    for name, folder in folders.items():
        path = folder / "eval.jsonl"
        losses = [values["loss"] for values in read_values(path) if "loss" in values] if path.exists() else []
        if losses:
            table.add_row(name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
            if not losses[-1] < losses[0]:
                rising.append(name)
    Console().print(table)
    return rising


def count_by_chance(answered: Sequence[Answered]) -> int:
    """Answers that are right if each question is given what the other questions of its task have most often.

    Its own answer does not count: of four questions with four answers, one would always be right by hindsight.
    """
    by_task: dict[str, Counter[str]] = {}
    for a in answered:
        by_task.setdefault(a.task, Counter())[a.expected] += 1
    right = 0
    for a in answered:
        others = by_task[a.task] - Counter([a.expected])
        right += bool(others) and others.most_common(1)[0][0] == a.expected
    return right


def is_above_chance(answered: Sequence[Answered]) -> bool:
    """Prints how many answers are right, and how many would be by chance; whether that can be no accident."""
    right = sum(a.is_right for a in answered)
    by_chance = count_by_chance(answered)
    print(
        f"{right} of {len(answered)} answers are right; {by_chance} would be with the most frequent answer to "
        "others of the task"
    )
    test = binomtest(right, len(answered), by_chance / len(answered), alternative="greater")
    return bool(test.pvalue < _SIGNIFICANCE)
