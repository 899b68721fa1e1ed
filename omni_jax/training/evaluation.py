"""The loss on held-out rows while a run trains: the function that trains, without a gradient."""

from __future__ import annotations

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
from omni_jax.training.objective import Batch, Metrics, Objective
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
    """Held-out batches on the devices' host, and the program that takes the loss of them."""

    def __init__(self, objective: Objective, batches: Sequence[Batch], abstract: Batch, sources: Sequence[str]) -> None:
        """Compiles nothing yet.

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
        self._loss = jax.jit(self._batch_loss)
        self._sum = jax.jit(lambda sums, more: jax.tree.map(jnp.add, sums, more))
        self._denominators: Metrics | None = None  # of all batches together

    def run(self, state: TrainState) -> dict[str, Any]:
        """The loss of a state, and that of each file of rows if there are several."""
        if self._denominators is None:
            count = jax.jit(self._objective.denominators)
            for batch in self._batches:
                own = count(self._to_devices(batch))
                self._denominators = own if self._denominators is None else self._sum(self._denominators, own)
        sums: Metrics | None = None
        for number, batch in enumerate(self._batches):
            terms = self._loss(state, self._to_devices(batch), self._denominators, np.int32(number))
            sums = terms if sums is None else self._sum(sums, terms)
        found: Mapping[str, np.ndarray] = jax.device_get(sums)
        losses = {"loss": float(found["loss"])}
        named: dict[str, Any] = dict(losses)
        if "loss_by_source" in found and len(self._sources) > 1:
            by_source = found["loss_by_source"]
            named["sources"] = {name: float(by_source[i]) for i, name in enumerate(self._sources)}
        return named

    def _batch_loss(self, state: TrainState, batch: Batch, denominators: Metrics, number: jax.Array) -> Metrics:
        key = jax.random.fold_in(jax.random.key(_KEY), number)
        return self._objective.loss(state.params, batch, denominators, key, ()).terms

    def _to_devices(self, batch: Batch) -> Batch:
        return to_devices([batch], self._abstract)
