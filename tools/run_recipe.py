"""Runs ``train.py`` with a recipe, for longer or shorter than it says."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from configs import RECIPES
from omni_jax.data.config import DataConfig
from tools.run_commands import count_cores, find_devices, run

# a device of JAX for each core, with a part of the rows: on two cores, steps of omni-tiny take half as long as on one.
# One device that divides each operation among both gains less
_ONE_CORE_FLAGS = "--xla_force_host_platform_device_count={} --xla_cpu_multi_thread_eigen=false"
EVALUATIONS = 6  # of held-out rows in a run


def run_recipe(
    name: str,
    workdir: Path,
    init: object,
    train: Sequence[Path],
    valid: Sequence[Path],
    *more: object,
    steps_scale: float = 1.0,
    evaluations: int = EVALUATIONS,
) -> None:
    """Trains, or goes on.

    Args:
      name: of the recipe.
      workdir: of the run.
      init: the checkpoint to begin from, or the folder of its run.
      train: files of rows.
      valid: of held-out rows; the loss of none is taken if there is none.
      more: options of ``train.py``.
      steps_scale: factor of the recipe's steps, of those of its phases, and, below 1, of its warm-up.
      evaluations: how often the held-out rows are evaluated.

    Raises:
      SystemExit: if it fails.
    """
    recipe = RECIPES[name]
    steps = max(round(recipe.steps * steps_scale), 4)
    options = list(more)
    if steps_scale < 1:
        # else the rate would rise to the end of a short run, and the loss with it
        options += ["--optimizer.warmup", max(round(recipe.optimizer.warmup * steps_scale), 1)]
    # all phases but the last have a number of steps
    for number, phase in enumerate(recipe.phases[:-1]):
        options += [f"--phases.{number}.steps", max(round((phase.steps or 0) * steps_scale), 2)]
    if valid:
        options += ["--data.valid", *valid, "--eval.every", math.ceil(steps / evaluations)]
    environment = {}
    num_devices = choose_devices(recipe.data)
    if num_devices > 1:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_ONE_CORE_FLAGS.format(num_devices)}".strip()
        options += ["--mesh.data", num_devices]
    arguments = (name, "--workdir", workdir, "--init", init, "--steps", steps, "--data.train", *train, *options)
    run("train.py", *arguments, environment=environment)


def choose_devices(data: DataConfig) -> int:
    """Devices that CPU cores are made, each with as many rows of a batch; 1 on an accelerator, which stays as it is."""
    if find_devices()[0] != "cpu":
        return 1
    divisors = [count for count in range(1, count_cores() + 1) if math.gcd(data.rows, data.streams) % count == 0]
    return divisors[-1]
