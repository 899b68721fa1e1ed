"""What a recipe will hold on each device, from abstract shapes alone: nothing is allocated, no device is needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from omni_jax.batch import TrainBatch
from omni_jax.checkpoint import train_checkpoints as run
from omni_jax.data.packing import fill
from omni_jax.data.pipeline import batches
from omni_jax.processing.processor import Processor
from omni_jax.training.optimizer import flat
from omni_jax.training.recipe import Phase, Recipe
from omni_jax.training.state import total_bytes
from omni_jax.training.step import abstract_batch, abstract_state, make_step

_BATCHES = 4  # that a dry run looks at


@dataclass(frozen=True)
class Row:
    """One parameter: what it is, whether it trains, where its axes go, and how much of it one device holds."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    rate: float | None  # at the peak of the schedule; None: frozen
    spec: tuple[str | tuple[str, ...] | None, ...]
    device_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def device_size(self) -> int:
        return math.prod(self.device_shape)


def plan(recipe: Recipe, phase: Phase) -> list[Row]:
    """Every parameter of the recipe's Thinker in one of its phases.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide, or if the recipe is wrong otherwise.
    """
    step = make_step(recipe, phase, recipe.steps)
    leaves = flat(abstract_state(step, recipe.mesh.abstract()).params)
    peak = recipe.optimizer.learning_rate
    return [
        Row(
            path=path,
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            rate=peak * step.rates[path] if path in step.rates else None,
            spec=tuple(leaf.sharding.spec),
            device_shape=leaf.sharding.shard_shape(leaf.shape),
        )
        for path, leaf in sorted(leaves.items())
    ]


def memory(recipe: Recipe, phase: Phase) -> dict[str, int]:
    """Bytes a device by what holds them: exact for what stays from step to step, counted for what a step makes.

    What the compiler adds for the inside of one layer is not in it.
    """
    mesh, width = recipe.mesh.abstract(), jnp.dtype(recipe.dtype).itemsize
    state = abstract_state(make_step(recipe, phase, recipe.steps), mesh)
    batch = abstract_batch(recipe.data, recipe.model, mesh, recipe.optimizer.accumulate)
    text, vocabulary = recipe.model.thinker_config.text_config, recipe.model.thinker_config.text_config.vocab_size
    rows = recipe.data.rows // (recipe.mesh.data * recipe.mesh.fsdp)
    positions = rows * recipe.data.tokens // recipe.mesh.sequence
    words = vocabulary // recipe.mesh.tensor
    scores = rows * recipe.chunk * words * jnp.dtype(jnp.float32).itemsize
    head = text.hidden_size * words * (width + jnp.dtype(jnp.float32).itemsize)
    return {
        "parameters that train": total_bytes(state.trained),
        "frozen parameters": total_bytes(state.frozen),
        "moments of the optimizer": total_bytes((state.moments.mu, state.moments.nu)),
        "gradients": total_bytes(state.trained),
        "batch": total_bytes(batch),
        "inputs of the decoder's layers": text.num_hidden_layers * positions * text.hidden_size * width,
        "scores of a chunk, twice": 2 * scores,
        "head on every device, and its gradient": head,
    }


def show(recipe: Recipe) -> None:
    """Prints what a dry run is to say of every phase of the recipe, and of the batches where data is given."""
    console = Console(width=160)  # a parameter's name must not be cut
    for phase in recipe.phases:
        _show_phase(console, recipe, phase)
    _show_budgets(console, recipe)


def _show_phase(console: Console, recipe: Recipe, phase: Phase) -> None:
    rows = plan(recipe, phase)
    table = Table("parameter", "shape", "dtype", "rate", "mesh axes", "on a device", box=None, title=f"{phase.name}")
    for row in rows:
        axes = ", ".join("-" if axis is None else str(axis) for axis in row.spec)
        rate = "frozen" if row.rate is None else f"{row.rate:g}"
        table.add_row(row.path, str(row.shape), row.dtype, rate, axes, str(row.device_shape))
    console.print(table)
    trained, whole = sum(r.size for r in rows if r.rate is not None), sum(r.size for r in rows)
    console.print(f"{whole:,} parameters, of which {trained:,} train in the phase {phase.name}", highlight=False)
    sizes = memory(recipe, phase)
    for name, size in sizes.items():
        console.print(f"  {size / 2**30:9.3f} GiB a device: {name}", highlight=False)
    console.print(
        f"  {sum(sizes.values()) / 2**30:9.3f} GiB a device in all, and the inside of one layer\n", highlight=False
    )


def _show_budgets(console: Console, recipe: Recipe) -> None:
    d, accumulate = recipe.data, recipe.optimizer.accumulate
    console.print(
        f"a step reads {accumulate} x {d.rows} rows of {d.tokens:,} tokens, with {d.rows * d.audio_blocks} blocks of "
        f"sound and {d.rows * d.canvases} canvases of {d.windows} windows",
        highlight=False,
    )
    if not d.train or recipe.init is None:
        console.print("give --data.train and --init to see how full the batches are")
        return
    for name, values in composition(recipe).items():
        console.print(f"  {name}: {values:.4g}", highlight=False)


def composition(recipe: Recipe) -> dict[str, float]:
    """How full the first batches are: means of ``omni_jax.data.packing.Fill``, by name.

    Raises:
      InputError: if the rows cannot be read.
    """
    assert recipe.init is not None
    data = batches(recipe.data, Processor.load(run.resolve(recipe.init), allow_urls=True))
    try:
        found = [asdict(fill(batch)) for batch in _some(data)]
    finally:
        data.close()
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def _some(data: Iterable[TrainBatch]) -> Iterator[TrainBatch]:
    return itertools.islice(data, _BATCHES)
