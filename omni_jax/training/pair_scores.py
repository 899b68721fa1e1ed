"""What the reference of preference training makes of pairs: computed once, and written into their rows.

A command that was stopped goes on where it was (``data.resumed_rows``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from rich.progress import track

from omni_jax.checkpoint import store
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.train_checkpoints import read_dtypes, resolve_checkpoint
from omni_jax.checks import printable
from omni_jax.data.examples import Reject
from omni_jax.data.preference_pairs import PairBatch, PairPacking
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.rows import relocate_row
from omni_jax.data.sources import Files, Row, open_rows
from omni_jax.data.spoken_packing import SpokenPart
from omni_jax.data.spoken_rows import ANSWERS
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.processor import Processor
from omni_jax.training.device_batches import to_devices
from omni_jax.training.objective import Params
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.talker_dpo import TalkerDPO, sum_by_utterance
from omni_jax.training.recipe import Recipe
from omni_jax.training.run_state import take_shape
from omni_jax.training.step import abstract_batch, abstract_params, make_step


@dataclass(frozen=True)
class Scoring:
    """What ``tools/score_pairs.py`` is told."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path = Path("scored.jsonl")
    """Where the rows are written, with their scores."""


class ScoredPairs(NamedTuple):
    """How many rows were scored, and how many cannot be used."""

    scored: int
    rejected: int


@functools.partial(jax.jit, static_argnums=0)
def answer_log_probs(objective: TalkerDPO, params: Params, batch: PairBatch) -> jax.Array:
    """Log-probability of each answer of a batch, [B, N, 2]."""
    streams = objective.run_models(params, batch.spoken, ())
    token_log_probs = objective.code_log_probs(params, streams, batch.spoken).log_probs  # [B, P]
    sums = sum_by_utterance(token_log_probs, batch.spoken, objective.options.utterances)  # [B, U]
    return sums.reshape(batch.reference.shape)


class _Scorer:
    """A reference on the devices."""

    def __init__(self, recipe: Recipe, objective: TalkerDPO, mesh: Mesh, folder: Path):
        self.fingerprint = fingerprint(folder, objective.components)
        self._objective = objective
        self._abstract = abstract_batch(recipe.data, objective, mesh)
        # as training has them, so that both compute the same
        step = make_step(recipe, objective, recipe.phases[0], recipe.steps)
        self._params = {}
        for name, tree in abstract_params(step, mesh, read_dtypes(folder, objective.components)).items():
            self._params[name] = store.load_tree(folder / "params" / name, tree)

    def score(self, packing: PairPacking, parts: Sequence[SpokenPart]) -> dict[str, list[float]]:
        """Log-probabilities of the answers of each placed example, by the name of its row."""
        batch = packing.assemble(parts, first=0, streams=len(parts))
        arrays = to_devices([batch], self._abstract)
        found = np.asarray(answer_log_probs(self._objective, self._params, arrays))  # [B, N, 2]
        scores = {}
        for number, part in enumerate(parts):
            for placed in part.placed:
                row = number * packing.budget.dialogues.rows + placed.row
                scores[placed.example.name] = found[row, placed.utterance // len(ANSWERS)].tolist()
        return scores


def run_scoring(recipes: Mapping[str, Recipe], description: str | None) -> int:
    """Scores what the arguments of the process ask for.

    Args:
      recipes: of preference training, by the name of their command.
      description: of all, for ``--help``.

    Returns:
      The exit status.
    """
    commands = {name: (recipe.about, Scoring(recipe)) for name, recipe in recipes.items()}
    scoring = tyro.extras.overridable_config_cli(commands, description=description)
    try:
        found = score_pairs(scoring.recipe, scoring.out, print)
    except (CheckpointError, ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    print(f"{found.scored} pairs are scored in {scoring.out}; {found.rejected} cannot be used")
    return 0


def score_pairs(recipe: Recipe, out: Path, log: Callable[[str], None]) -> ScoredPairs:
    """Writes the rows of ``recipe.data.train`` with the log-probabilities of the model that the recipe begins from.

    Args:
      recipe: of preference training; its budgets and its mesh are those of this run too.
      out: the file, in JSON lines. Paths of media become absolute where it lies in another folder.
      log: is told which rows cannot be used, and why.

    Returns:
      How many rows there are, those of an earlier call that was stopped among them.

    Raises:
      CheckpointError, ConfigError, InputError: if the recipe, the model, the rows or the file cannot be used.
    """
    if recipe.init is None or not recipe.data.train:
        raise ConfigError("name the model (--init) and the rows (--data.train)")
    folder = resolve_checkpoint(recipe.init)
    recipe.check()
    recipe.data.check(1)
    recipe = take_shape(recipe, None)
    objective = make_objective(recipe)
    if not isinstance(objective, TalkerDPO):
        raise ConfigError("pairs are scored with a recipe of preferences, talker-dpo-*")
    packing: PairPacking = objective.make_packing(recipe.data, Processor.load(folder), recipe.data.streams)
    # a model that has been trained on preferences has a reference of its own, which these rows do not have yet
    packing = dataclasses.replace(packing, prepare=dataclasses.replace(packing.prepare, reference=None))
    rows = Files([open_rows(path) for path in recipe.data.train])
    mesh = recipe.mesh.make()
    with jax.set_mesh(mesh):
        scorer = _Scorer(recipe, objective, mesh, folder)
        settings = {"rows": recipe.data.train, "num_rows": len(rows), "model": scorer.fingerprint}
        with ResumedRows(out, settings) as made:
            for batch in _pack(rows, made.num_done, packing, recipe.data.streams):
                scores = scorer.score(packing, batch.parts)
                for number, found in batch.rows:
                    if isinstance(found, Reject):
                        log(str(found))
                        made.add(number, None, "cannot be used")
                    else:
                        made.add(number, _scored_row(found, scores[found.name], scorer.fingerprint, out))
            num_scored = made.finish()
    return ScoredPairs(num_scored, len(rows) - num_scored)


class _PackedRows(NamedTuple):
    """Rows that follow each other, as far as a batch holds them.

    Attributes:
      parts: of the batch.
      rows: each with its number, in order; a reject for one that cannot be used.
    """

    parts: list[SpokenPart]
    rows: list[tuple[int, Row | Reject]]


def _pack(rows: Files, first: int, packing: PairPacking, num_streams: int) -> Iterator[_PackedRows]:
    """Batches of the rows from number ``first`` on.

    Raises:
      InputError: for a row that ends a run.
    """

    def new_batch() -> _PackedRows:
        return _PackedRows([packing.new_part() for _ in range(num_streams)], [])

    batch = new_batch()
    for number in track(range(first, len(rows)), description="pairs"):
        row: Row = rows[number]
        found = packing.prepare(row)
        if isinstance(found, Reject):
            if found.is_fatal:
                raise InputError(str(found))
            batch.rows.append((number, found))
            continue
        if not any(part.place(found[0]) for part in batch.parts):
            yield batch
            batch = new_batch()
            # in an empty part each example has a place
            batch.parts[0].place(found[0])
        batch.rows.append((number, row))
    if batch.rows:
        yield batch


def _scored_row(row: Row, scores: Sequence[float], digest: str, out: Path) -> dict[str, Any]:
    """A row with its scores.

    Raises:
      InputError: for a row that holds bytes, as those of Parquet may.
    """
    values = relocate_row(row, out)
    reference: dict[str, Any] = {"model": digest, **dict(zip(ANSWERS, scores, strict=True))}
    values["speech"] = {**values["speech"], "reference": reference}
    try:
        json.dumps(values)
    except TypeError as e:
        raise InputError(f"{row.name}: media that lie in the row itself cannot be written as JSON ({e})") from e
    return values
