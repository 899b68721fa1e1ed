"""Trains: every stage of pretraining, and instruction tuning.

python train.py thinker-sft-7b --init CHECKPOINT --data.train rows.jsonl --workdir runs/sft --steps 1000

Run it again with the same folder, and it goes on where it was. Told to stop by SIGTERM it saves itself and exits with
75. --dry-run shows what would train, with what memory, and trains nothing.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from configs import RECIPES
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


def main() -> int:
    commands = {name: (recipe.about, Run(recipe)) for name, recipe in RECIPES.items()}
    run = tyro.extras.overridable_config_cli(commands, description=__doc__)
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


if __name__ == "__main__":
    sys.exit(main())
