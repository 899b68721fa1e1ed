"""What a model answers to held-out rows while it trains, for people to look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from omni_jax.data.config import DataConfig
from omni_jax.data.sources import Row, open_rows
from omni_jax.processing.processor import Processor
from omni_jax.training.objective import Objective, Sample
from omni_jax.training.step import TrainState


def choose_rows(paths: Sequence[str], count: int) -> list[Row]:
    """The first ``count`` rows, taken from the files in turn.

    Raises:
      InputError: if a file cannot be read.
    """
    rows: list[Row] = []
    # the first of each file, then the second of each; None where a file has no more
    for turn in itertools.zip_longest(*(itertools.islice(open_rows(path), count) for path in paths)):
        rows += [row for row in turn if row is not None]
    return rows[:count]


@dataclass(frozen=True)
class Sampler:
    """Has the model of a run answer the same rows again and again.

    Attributes:
      objective: of the run; it knows how its model answers.
      rows: to be answered.
      data: says where the media of rows may lie, and their sizes.
      processor: of the run.
      mesh: over which the parameters are sharded.
      max_tokens: of an answer.
    """

    objective: Objective
    rows: Sequence[Row]
    data: DataConfig
    processor: Processor
    mesh: Mesh
    max_tokens: int

    def run(self, state: TrainState) -> list[Sample]:
        """The answers of a state; every process of a run calls it."""
        if not self.rows:
            return []
        return self.objective.sample(state.params, self.rows, self.data, self.processor, self.mesh, self.max_tokens)
