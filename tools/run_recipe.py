"""Runs ``train.py`` with a recipe, for longer or shorter than it says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs import RECIPES
from tools.run_commands import run


def run_recipe(
    name: str,
    workdir: Path,
    init: object,
    train: Sequence[Path],
    valid: Sequence[Path],
    *more: object,
    steps_scale: float = 1.0,
    evaluations: int = 6,
) -> None:
    """Trains, or goes on.

    Args:
      name: of the recipe.
      workdir: of the run.
      init: the checkpoint to begin from, or the folder of its run.
      train: files of rows.
      valid: of held-out rows; the loss of none is taken if there is none.
      more: options of ``train.py``.
      steps_scale: factor of the recipe's steps and of those of its phases.
      evaluations: how often the held-out rows are evaluated.

    Raises:
      SystemExit: if it fails.
    """
    recipe = RECIPES[name]
    steps = max(round(recipe.steps * steps_scale), 4)
    options = list(more)
    # all phases but the last have a number of steps
    for number, phase in enumerate(recipe.phases[:-1]):
        options += [f"--phases.{number}.steps", max(round((phase.steps or 0) * steps_scale), 2)]
    if valid:
        options += ["--data.valid", *valid, "--eval.every", max(steps // evaluations, 1)]
    run("train.py", name, "--workdir", workdir, "--init", init, "--steps", steps, "--data.train", *train, *options)
