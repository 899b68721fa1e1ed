"""Which held-out rows a model answers while it trains, for people to look at."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from jax.sharding import Mesh

from omni_jax.data.packing import processor_of_rows
from omni_jax.data.sources import Row, open_rows
from omni_jax.processing.processor import Processor
from omni_jax.training.objective import SampleRequest
from omni_jax.training.recipe import Recipe


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


def make_sample_request(recipe: Recipe, processor: Processor, mesh: Mesh) -> SampleRequest | None:
    """What a recipe wants answered at each evaluation; None if nothing.

    Args:
      recipe: names the held-out rows.
      processor: of the run.
      mesh: of the run.

    Raises:
      InputError: if a file of rows cannot be read.
    """
    if not recipe.eval.samples:
        return None
    rows = choose_rows(recipe.data.valid, recipe.eval.samples)
    # made once: where media are isolated it has a process of its own
    reader = processor_of_rows(recipe.data, processor, 1)
    return SampleRequest(rows, recipe.data, reader, mesh, recipe.eval.max_tokens)
