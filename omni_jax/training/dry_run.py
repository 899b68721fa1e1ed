"""What a recipe will hold on each device, from abstract shapes alone: nothing is allocated, no device is needed."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.data.pipeline import batches
from omni_jax.layers.quantized import QuantizedKernel
from omni_jax.processing.processor import Processor
from omni_jax.training.objectives import make_objective
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import Phase, Recipe
from omni_jax.training.run_state import bytes_per_device, take_shape
from omni_jax.training.step import abstract_batch, abstract_state, make_step

_NUM_BATCHES = 4  # that a dry run looks at


@dataclass(frozen=True)
class ParameterSummary:
    """One parameter: what it is, whether it trains, where its axes go, and how much of it one device holds."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    learning_rate: float | None  # at the peak of the schedule; None: frozen
    spec: tuple[str | tuple[str, ...] | None, ...]
    device_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def device_size(self) -> int:
        return math.prod(self.device_shape)


def summarize_parameters(recipe: Recipe, phase: Phase) -> list[ParameterSummary]:
    """Every parameter that the recipe's loss takes, in one of its phases, sorted by path.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide, or if the recipe is wrong otherwise.
    """
    # an abstract mesh and abstract arrays: shardings are known without the devices
    step = make_step(recipe, make_objective(recipe), phase, recipe.steps)
    params = abstract_state(step, recipe.mesh.abstract()).params
    peak = recipe.optimizer.learning_rate
    summaries = []
    for path, found in sorted(flatten_params(params).items()):
        # the numbers of a quantised kernel; beside them its scales are few
        leaf: Any = found.values if isinstance(found, QuantizedKernel) else found
        summary = ParameterSummary(
            path=path,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            learning_rate=peak * step.scales[path] if path in step.scales else None,
            spec=tuple(leaf.sharding.spec),
            device_shape=leaf.sharding.shard_shape(leaf.shape),
        )
        summaries.append(summary)
    return summaries


def estimate_memory(recipe: Recipe, phase: Phase) -> dict[str, int]:
    """Bytes a device by what holds them: exact for what stays from step to step, counted for what a step makes.

    What the compiler adds for the inside of one layer is not in it.
    """
    mesh = recipe.mesh.abstract()
    objective = make_objective(recipe)
    step = make_step(recipe, objective, phase, recipe.steps)
    state = abstract_state(step, mesh)
    batch = abstract_batch(recipe.data, objective, mesh, recipe.optimizer.accumulate)
    row_parts = recipe.mesh.data * recipe.mesh.fsdp
    return {
        # from step to step
        "parameters that train": bytes_per_device(state.trained),
        "frozen parameters": bytes_per_device(state.frozen),
        "moments of the optimizer": bytes_per_device(state.moments._replace(count=())),
        "averages of parameters": 0 if state.average is None else bytes_per_device(state.average),
        # for the time of a step; a gradient has the shape and dtype of its parameter
        "gradients": bytes_per_device(state.trained),
        "batch": bytes_per_device(batch),
        **objective.estimate_activations(recipe.data, row_parts, recipe.mesh.sequence, recipe.mesh.tensor, step.scales),
    }


def print_dry_run(recipe: Recipe, workdir: Path | None = None) -> None:
    """Prints every phase of the recipe, and how full the batches are where data is named.

    Args:
      recipe: what to train.
      workdir: the run's folder, if it has one.

    Raises:
      CheckpointError, ConfigError, InputError: if the recipe, what it begins from or the data cannot be used.
    """
    recipe.check()
    recipe = take_shape(recipe, workdir)
    console = Console(width=160, highlight=False, markup=False)  # a parameter's name must not be cut
    for warning in recipe.find_warnings():
        console.print(f"note: {warning}")
    for phase in recipe.phases:
        _print_phase(console, recipe, phase)
    _print_batches(console, recipe)


def _print_phase(console: Console, recipe: Recipe, phase: Phase) -> None:
    table = Table("parameter", "shape", "dtype", "rate", "mesh axes", "on a device", box=None, title=phase.name)
    total = 0
    trained = 0
    for summary in summarize_parameters(recipe, phase):
        total += summary.size
        learning_rate = "frozen"
        if summary.learning_rate is not None:
            learning_rate = f"{summary.learning_rate:g}"
            trained += summary.size
        axes: list[str] = []
        for axis in summary.spec:
            axes.append("-" if axis is None else str(axis))
        table.add_row(
            summary.path,
            str(summary.shape),
            summary.dtype,
            learning_rate,
            ", ".join(axes),
            str(summary.device_shape),
        )
    console.print(table)
    console.print(f"{total:,} parameters, of which {trained:,} train in the phase {phase.name}")
    sizes = estimate_memory(recipe, phase)
    for name, size in sizes.items():
        console.print(f"  {size / 2**30:9.3f} GiB a device: {name}")
    console.print(f"  {sum(sizes.values()) / 2**30:9.3f} GiB a device in all, and the inside of one layer\n")


def _print_batches(console: Console, recipe: Recipe) -> None:
    data = recipe.data
    # the shapes that every step has, whatever its rows hold
    console.print(
        f"a step reads {recipe.optimizer.accumulate} x {data.rows} rows of {data.tokens:,} tokens, with "
        f"{data.rows * data.audio_blocks} blocks of audio and {data.rows * data.canvases} canvases of "
        f"{data.windows} windows"
    )
    # how full they are shows only when rows are read, for which a tokenizer is needed
    if not data.train or recipe.init is None or recipe.is_random:
        console.print("give --data.train, and a checkpoint as --init, to see how full the batches are")
        return
    for name, value in measure_fill(recipe).items():
        console.print(f"  {name}: {value:.4g}")


def measure_fill(recipe: Recipe) -> dict[str, float]:
    """How full the first batches are: means of what the objective's packing measures, by name.

    Raises:
      InputError: if the rows cannot be read.
    """
    assert recipe.init is not None
    processor = Processor.load(resolve_checkpoint(recipe.init))
    packing = make_objective(recipe).make_packing(recipe.data, processor, recipe.data.streams)
    data = batches(recipe.data, packing)
    values: dict[str, list[float]] = defaultdict(list)
    try:
        for batch in itertools.islice(data, _NUM_BATCHES):
            for name, value in packing.measure_fill(batch).items():
                values[name].append(value)
    finally:
        data.close()
    return {name: float(np.mean(found)) for name, found in values.items()}
