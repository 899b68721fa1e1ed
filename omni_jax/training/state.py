"""The state of a run: where it begins, what becomes of it between phases, and how it is saved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from omni_jax.checkpoint import store
from omni_jax.checkpoint import train_checkpoints as run
from omni_jax.checkpoint.assemble_thinker import assemble_thinker
from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from omni_jax.training.optimizer import flat, split
from omni_jax.training.recipe import Recipe
from omni_jax.training.step import Step, TrainState, abstract_state, fresh_moments

_FROM_PARTS = "initial"  # in the run's folder


def prepare(recipe: Recipe, workdir: Path, say: Callable[[str], None]) -> None:
    """Makes the run's folder, with all that training does not change; one process does it.

    Raises:
      CheckpointError: if what the run is to begin from is no checkpoint, or its parts are not the model.
      ConfigError: if nothing is given to begin from, or it is another model than the recipe's.
    """
    if (workdir / run.MODEL).exists():
        return
    if recipe.init is None:
        raise ConfigError(
            "there is nothing to begin from: --init takes a checkpoint (tools/convert.py to-jax makes one of a "
            "PyTorch folder), or the folder of an earlier run"
        )
    begin = run.resolve(recipe.init)
    theirs = OmniConfig.load(begin).thinker_config
    if theirs != recipe.model.thinker_config:
        raise ConfigError(f"{begin} holds another model than the recipe's; take the recipe of its size")
    if recipe.parts.given:
        begin = workdir / _FROM_PARTS
        parts = {name: getattr(recipe.parts, name) for name in ("llm", "vision", "audio")}
        given = {name: folder for name, folder in parts.items() if folder is not None}
        if not begin.exists():
            random = assemble_thinker(recipe.init, begin, given, recipe.seed)
            say(f"{len(random)} tensors are in none of the parts and begin at random, like {random[0]}")
    run.start(workdir, begin)


def beginning(recipe: Recipe, workdir: Path, step: Step, mesh: Mesh) -> TrainState:
    """The state of a run that has no checkpoint yet, after ``prepare``.

    Raises:
      CheckpointError: if the checkpoint that it begins from is damaged.
      ConfigError: if it is not named any more.
    """
    folder = workdir / _FROM_PARTS if recipe.parts.given else recipe.init and run.resolve(recipe.init)
    if not folder:
        raise ConfigError(f"{workdir} has no checkpoint yet; name again what the run begins from, as --init")
    wish = abstract_state(step, mesh, run.dtypes(folder))
    params = store.load_tree(folder / "params" / "thinker", wish.params)
    return _state(step, wish, 0, params)


def next_phase(state: TrainState, step: Step, mesh: Mesh) -> TrainState:
    """The same parameters at the beginning of another phase; what was trained and is frozen now stays in float32."""
    leaves = flat(state.params)
    wish = abstract_state(step, mesh, {path: leaf.dtype for path, leaf in leaves.items()})
    params = jax.tree.map(lambda x, to: x.astype(to.dtype), state.params, wish.params)
    return _state(step, wish, int(state.step), params)


def _state(step: Step, wish: TrainState, number: int, params: Any, moments: Any = None) -> TrainState:
    trained, frozen = split(params, step.rates)
    if moments is None:
        places = jax.tree.map(lambda x: x.sharding, wish.moments)
        moments = jax.jit(functools.partial(fresh_moments, step), out_shardings=places)(trained)
    return TrainState(jax.device_put(jnp.int32(number), wish.step.sharding), trained, frozen, moments)


def to_save(state: TrainState, number: int, data: Mapping[str, Any]) -> run.Saved:
    """What a checkpoint holds of a state."""
    return run.Saved(number, state.params, state.moments._asdict(), data)


def restored(
    folder: run.RunFolder, step_at: Callable[[int], Step], mesh: Mesh, say: Callable[[str], None]
) -> tuple[TrainState, Mapping[str, Any]] | None:
    """The state of the latest whole checkpoint and where its data goes on; None if there is none.

    Args:
      folder: of the run.
      step_at: the step that comes after so many.
      mesh: to lay the state over, whatever it was saved from.
      say: is told of damaged checkpoints.
    """

    def wish(number: int, kinds: Mapping[str, np.dtype]) -> run.Saved:
        return to_save(abstract_state(step_at(number), mesh, dict(kinds)), number, {})

    saved = folder.restore(wish, say)
    if saved is None:
        return None
    step = step_at(saved.step)
    abstract = abstract_state(step, mesh)
    return _state(step, abstract, saved.step, saved.params, optax.ScaleByAdamState(**saved.moments)), saved.data


def total_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on a device."""
    leaves = jax.tree.leaves(tree)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize for x in leaves)
