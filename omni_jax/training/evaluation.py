"""The loss on held-out rows while a run trains: the function that trains, without a gradient."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from omni_jax.errors import CheckpointError
from omni_jax.plain_files import has_file, read_object, replace_file
from omni_jax.training.device_batches import to_devices
from omni_jax.training.objective import Batch, Metrics, Objective, Params
from omni_jax.training.step import TrainState

BEST_FILE = "best.json"
_KEY = 0  # of random numbers: the same at every evaluation, so that losses can be compared


@dataclass(frozen=True)
class Best:
    """The evaluation with the least loss so far.

    Attributes:
      step: after which it was.
      loss: of it.
      since: evaluations after it.
    """

    step: int
    loss: float
    since: int = 0


def read_best(workdir: Path, last_step: int) -> Best | None:
    """What an earlier start of the run has found, up to a step; None if there is nothing.

    Raises:
      CheckpointError: if the file is damaged.
    """
    path = workdir / BEST_FILE
    if not has_file(path):
        return None
    values = read_object(path)
    try:
        best = Best(int(values["step"]), float(values["loss"]), int(values["since"]))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged ({e!r}); remove it") from e
    return best if best.step <= last_step else None


def write_best(workdir: Path, best: Best) -> None:
    """For the next start; the main process calls it."""
    values = {"step": best.step, "loss": best.loss, "since": best.since}
    replace_file(workdir / BEST_FILE, (json.dumps(values) + "\n").encode())


class Evaluation:
    """Held-out batches in the memory of the host, and the loss of them."""

    def __init__(self, objective: Objective, batches: Sequence[Batch], abstract: Batch, sources: Sequence[str]) -> None:
        """Reads nothing yet.

        Args:
          objective: whose loss it is.
          batches: of this process (``data.held_out``).
          abstract: of a batch over all processes (``training.step.abstract_batch``).
          sources: names of the files of rows, as the batches number them.
        """
        self._objective = objective
        self._batches = batches
        self._abstract = abstract
        self._sources = sources
        self._denominators: Metrics | None = None  # of all batches together

    def run(self, state: TrainState) -> dict[str, Any]:
        """The loss of a state and what its objective reports beside it; of several files of rows that of each too."""
        if self._denominators is None:
            for batch in self._batches:
                own = _denominators(self._objective, self._to_devices(batch))
                self._denominators = own if self._denominators is None else _add(self._denominators, own)
        params = state.averaged_params
        sums: Metrics | None = None
        for number, batch in enumerate(self._batches):
            arrays = self._to_devices(batch)
            terms = _batch_loss(self._objective, params, arrays, self._denominators, np.int32(number))
            sums = terms if sums is None else _add(sums, terms)
        found: Mapping[str, np.ndarray] = jax.device_get(sums)
        named: dict[str, Any] = {}
        for name, value in found.items():
            if not np.ndim(value):
                named[name] = float(value)
        if "loss_by_source" in found and len(self._sources) > 1:
            by_source = found["loss_by_source"]
            named["sources"] = {name: float(by_source[i]) for i, name in enumerate(self._sources)}
        return named

    def _to_devices(self, batch: Batch) -> Batch:
        return to_devices([batch], self._abstract)


@functools.partial(jax.jit, static_argnums=0)
def _denominators(objective: Objective, batch: Batch) -> Metrics:
    return objective.denominators(batch)


@functools.partial(jax.jit, static_argnums=0)
def _batch_loss(
    objective: Objective, params: Params, batch: Batch, denominators: Metrics, number: jax.Array
) -> Metrics:
    """The terms of the loss of the batch of a number, whose random numbers are the same each time."""
    key = jax.random.fold_in(jax.random.key(_KEY), number)
    return objective.loss(params, batch, denominators, key, ()).terms


@jax.jit
def _add(sums: Metrics, more: Metrics) -> Metrics:
    return jax.tree.map(jnp.add, sums, more)
