"""What ``train.py`` does with its arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from omni_jax.checks import printable
from omni_jax.compile_cache import keep_programs_of_run
from omni_jax.distributed import join_processes
from omni_jax.errors import CheckpointError, ConfigError, InputError, TrainingError
from omni_jax.training.dry_run import print_dry_run
from omni_jax.training.loop import PREEMPTED, train
from omni_jax.training.recipe import Recipe


@dataclass(frozen=True)
class Run:
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    workdir: Path | None = None
    """Folder of the run: checkpoints, metrics.jsonl, TensorBoard files, and in the end a picture of the loss."""
    dry_run: bool = False
    """Show what would train, how it is spread over the mesh, the memory of a device and how full the batches are."""
    distributed: bool = False
    """One of several processes. On a pod of TPUs, under Slurm and on Kubernetes they find each other."""
    coordinator: str | None = None
    """host:port of process 0, where they do not."""
    processes: int | None = None
    """How many there are, where they do not find each other."""
    process: int | None = None
    """Which one this is, from 0."""


def run_command(recipes: Mapping[str, Recipe], description: str | None) -> int:
    """Runs what the arguments of the process ask for.

    Args:
      recipes: by the name of their command.
      description: of all, for ``--help``.

    Returns:
      The exit status.
    """
    commands = {name: (recipe.about, Run(recipe)) for name, recipe in recipes.items()}
    run = tyro.extras.overridable_config_cli(commands, description=description)
    try:
        if run.dry_run:
            jax.config.update("jax_platforms", "cpu")  # an accelerator may be busy with something else
            print_dry_run(run.recipe, run.workdir)
            return 0
        if run.workdir is None:
            raise ConfigError("--workdir is needed; --dry-run shows what a recipe would do without one")
        if run.distributed:
            join_processes(run.coordinator, run.processes, run.process)
        keep_programs_of_run(run.workdir)
        return 0 if train(run.recipe, run.workdir) else PREEMPTED
    except (CheckpointError, ConfigError, InputError, TrainingError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
