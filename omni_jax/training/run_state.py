"""Where the state of a run comes from: the model that it begins from, the phase before, or a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from omni_jax.checkpoint import store
from omni_jax.checkpoint.array_files import check_arrays
from omni_jax.checkpoint.assemble_thinker import assemble_thinker
from omni_jax.checkpoint.lora import LORA_FILE, LoRAConfig
from omni_jax.checkpoint.train_checkpoints import (
    MODEL_FOLDER,
    TrainCheckpoint,
    TrainCheckpoints,
    prepare_model,
    read_dtypes,
    resolve_checkpoint,
)
from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from omni_jax.mini_config import mini_config
from omni_jax.plain_files import link_folder
from omni_jax.processing.tokenizer_files import write_tokenizer
from omni_jax.training.objective import Objective
from omni_jax.training.optimizer import Moments, flatten_params, learning_rate_scales, split_params, with_moments
from omni_jax.training.recipe import Recipe
from omni_jax.training.step import TrainState, TrainStep, abstract_params, abstract_state

_INITIAL_FOLDER = "initial"  # in the run's folder: the checkpoint that is made of parts, or of random numbers
_COPIES_FOLDER = "copies"  # in the run's folder: what the objective keeps of the checkpoint that the run began from
_FILES_FOLDER = "files"  # in the run's folder: what it is made of, where there is no folder to take it from
_TRAINED = "trained"  # beside the moments of a checkpoint: what trains, where the parameters are its average
_SIZES = {
    "7b": OmniConfig.qwen2_5_omni_7b,
    "3b": OmniConfig.qwen2_5_omni_3b,
    "mini": mini_config,
    "tiny": OmniConfig.tiny,
}


def take_shape(recipe: Recipe, workdir: Path | None) -> Recipe:
    """The recipe for the model that the run has, or begins from, whatever size the recipe was written for.

    Args:
      recipe: says what the run begins from.
      workdir: the run's folder, if it has one.

    Raises:
      CheckpointError: if there is no checkpoint where the run is to begin.
      ConfigError: if its config.json does not describe a model.
    """
    if workdir is not None and (workdir / MODEL_FOLDER).exists():
        model = OmniConfig.load(workdir / MODEL_FOLDER)
    elif recipe.is_random:
        model = recipe.model
        if recipe.files is not None:
            model = _SIZES[recipe.files]() if recipe.files in _SIZES else OmniConfig.load(recipe.files)
    elif recipe.init is not None:
        model = OmniConfig.load(resolve_checkpoint(recipe.init))
    else:
        return recipe
    return dataclasses.replace(recipe, model=model)


def prepare_workdir(recipe: Recipe, objective: Objective, workdir: Path, log: Callable[[str], None]) -> None:
    """Makes the run's folder, with all that training does not change; one process does it.

    Raises:
      CheckpointError: if what the run is to begin from is no checkpoint, or its parts are not the model.
      ConfigError: if nothing is named to begin from.
    """
    # made by an earlier start of the run
    if (workdir / MODEL_FOLDER).exists():
        return
    if recipe.init is None:
        raise ConfigError(
            "there is nothing to begin from: --init takes a checkpoint (tools/convert.py to-jax makes one of a "
            "PyTorch folder), the folder of an earlier run, or the word random"
        )
    # parts and random numbers are first made a checkpoint, which the run then begins from like any other
    if recipe.is_random or recipe.parts.folders:
        init = workdir / _INITIAL_FOLDER
        # there already if the run was killed between this and ``prepare_model``
        if not init.exists():
            files = _find_files(recipe, workdir) if recipe.is_random else resolve_checkpoint(recipe.init)
            # what no checkpoint has the objective makes, on the devices
            wanted = [name for name in objective.components if name == "thinker"]
            initialize = functools.partial(_init_leaves, objective, recipe.seed)
            random = assemble_thinker(files, init, recipe.parts.folders, initialize, wanted)
            if random:
                log(f"{len(random)} tensors begin at random, like {random[0]}")
    else:
        init = resolve_checkpoint(recipe.init)
    extra_files = objective.extra_files()
    _check_adapter(init, extra_files)
    objective.check_start(init)
    trained = trained_components(recipe, objective)
    # before the model, whose folder says that all is there
    _link_copies(workdir / _COPIES_FOLDER, init, objective.initial_copies)
    prepare_model(workdir, init, trained, extra_files)


def _init_leaves(objective: Objective, seed: int, paths: Sequence[str]) -> list[np.ndarray]:
    """Leaves of the Thinker as its modules begin; of the others nothing is computed."""

    def init(key: jax.Array) -> list[jax.Array]:
        flat = flatten_params(objective.init_params("thinker", key))
        return [flat[path] for path in paths]

    return [np.asarray(leaf) for leaf in jax.jit(init)(jax.random.key(seed))]


def _link_copies(folder: Path, init: Path, copies: Mapping[str, str]) -> None:
    """Keeps components of the checkpoint that the run begins from, each under the name of its copy."""
    if not copies:
        return
    # there already if the run was killed between this and ``prepare_model``; it may begin from something else now
    shutil.rmtree(folder, ignore_errors=True)
    with store.new_folder(folder) as unfinished:
        for name, component in copies.items():
            link_folder(init / "params" / component, unfinished / name, init)


def _check_adapter(init: Path, extra_files: Mapping[str, str]) -> None:
    """Raises ConfigError if a checkpoint has an adapter that a run with these files would not go on with."""
    if not store.has_adapter(init):
        return
    wanted = extra_files.get(LORA_FILE)
    if wanted is None or LoRAConfig.load(init).to_json() != wanted:
        raise ConfigError(
            f"{init} has an adapter ({LORA_FILE}), and this run has none, or one of another rank, alpha or targets; go "
            "on with the same, or merge it first: tools/convert.py to-hf, and to-jax back"
        )


def _find_files(recipe: Recipe, workdir: Path) -> Path:
    """A folder with the small files of a model that begins from nothing."""
    if recipe.files is not None and recipe.files not in _SIZES:
        return Path(recipe.files)
    folder = workdir / _FILES_FOLDER
    write_tokenizer(folder, recipe.model, pixels=recipe.data.pixels)
    recipe.model.save(folder)
    return folder


def trained_components(recipe: Recipe, objective: Objective) -> list[str]:
    """The components of which something trains in some phase of the recipe.

    Raises:
      ConfigError: for a group that no parameter is in, or one with an initial copy.
    """
    paths = list(flatten_params(nn.unbox(objective.abstract_params())))
    trained: set[str] = set()
    for phase in recipe.phases:
        trained |= {path.partition("/")[0] for path in learning_rate_scales(phase, paths)}
    for name in objective.initial_copies:
        if name in trained:
            raise ConfigError(f"a phase trains {name}, which stays what it was where the run began; name other paths")
    return [name for name in objective.components if name in trained]


def init_state(recipe: Recipe, workdir: Path, step: TrainStep, mesh: Mesh) -> TrainState:
    """The state of a run that has no checkpoint yet, after ``prepare_workdir``.

    Raises:
      CheckpointError: if the checkpoint that it begins from is damaged.
      ConfigError: if it is not named any more.
    """
    # the parameters are read from where the run began: ``WORKDIR/model`` has nothing that trains
    if recipe.is_random or recipe.parts.folders:
        folder = workdir / _INITIAL_FOLDER
    elif recipe.init is not None:
        folder = resolve_checkpoint(recipe.init)
    else:
        raise ConfigError(f"{workdir} has no checkpoint yet; name again what the run begins from, as --init")
    # arrays are read straight into their shardings: no host ever holds the whole model
    stored = store.components(folder)
    dtypes = read_dtypes(folder, [name for name in step.objective.components if name in stored])
    params = {}
    for name, tree in abstract_params(step, mesh, dtypes).items():
        if name in step.objective.initial_copies:
            continue
        if name in stored:
            params[name] = store.load_tree(folder / "params" / name, tree)
        elif name == "thinker":
            # one that begins at random is in ``folder``
            raise ConfigError(f"the checkpoint to begin from has no {name}")
        else:
            # made on the devices, each with its own part
            shardings = jax.tree.map(lambda leaf: leaf.sharding, tree)
            init = functools.partial(step.objective.init_params, name)
            fresh = jax.jit(init, out_shardings=shardings)(jax.random.key(recipe.seed))
            flat: dict[str, Any] = flatten_dict(fresh, sep="/")
            for path, value in step.objective.initial_values(name, folder).items():
                flat[path] = jax.device_put(value.astype(flat[path].dtype), flat[path].sharding)
            params[name] = unflatten_dict(flat, sep="/")
    params |= _load_copies(workdir, step, mesh)
    trained, frozen = split_params(params, step.scales)
    return _fill_state(step, abstract_state(step, mesh), 0, trained, step.objective.convert_frozen(frozen))


def _load_copies(workdir: Path, step: TrainStep, mesh: Mesh) -> dict[str, Any]:
    """The objective's initial copies, in the dtypes that they were found in."""
    folder = workdir / _COPIES_FOLDER
    names = list(step.objective.initial_copies)
    dtypes: dict[str, np.dtype] = {}
    for name in names:
        check_arrays(folder / name, folder)
        for path, leaf in flatten_params(store.tree_shapes(folder / name)).items():
            dtypes[f"{name}/{path}"] = np.dtype(leaf.dtype)
    trees = abstract_params(step, mesh, dtypes)
    return {name: store.load_tree(folder / name, trees[name]) for name in names}


def begin_phase(state: TrainState, step: TrainStep, mesh: Mesh) -> TrainState:
    """The same parameters at the beginning of another phase; what was trained and is frozen now stays in float32."""
    trained, _ = split_params(state.params, step.scales)
    # what does not train any more stays what it is used as
    _, frozen = split_params(state.averaged_params, step.scales)
    # an array that has the dtype already is passed on as it is
    trained = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)
    return _fill_state(step, abstract_state(step, mesh), int(state.step), trained, frozen)


def to_checkpoint(state: TrainState, step: int, data: Mapping[str, Any], components: Sequence[str]) -> TrainCheckpoint:
    """What a checkpoint holds of a state: of its parameters those of ``components``."""
    params = state.averaged_params
    moments = state.moments._asdict()
    if state.average is not None:
        # the parameters of the checkpoint are the average, from which the run could not go on
        moments[_TRAINED] = state.trained
    return TrainCheckpoint(step, {name: params[name] for name in components}, moments, data)


def restore_state(
    workdir: Path,
    checkpoints: TrainCheckpoints,
    components: Sequence[str],
    step_at: Callable[[int], TrainStep],
    mesh: Mesh,
    log: Callable[[str], None],
) -> tuple[TrainState, Mapping[str, Any]] | None:
    """The state of the latest whole checkpoint and where its data goes on; None if there is none.

    Args:
      workdir: the run's folder.
      checkpoints: of the run.
      components: all that the loss takes, whether they train or not.
      step_at: gives the step that follows so many others.
      mesh: to lay the state over, whatever it was saved from.
      log: is told of damaged checkpoints.
    """

    def make_target(number: int, dtypes: Mapping[str, np.dtype]) -> TrainCheckpoint:
        # also what does not train is read from the checkpoint, which has links to it
        params = abstract_params(step_at(number), mesh, dtypes)
        state = abstract_state(step_at(number), mesh)
        return dataclasses.replace(
            to_checkpoint(state, number, {}, ()), params={name: params[name] for name in components}
        )

    # the step of the checkpoint says in which phase it was saved, and so what has moments
    saved = checkpoints.restore(make_target, log)
    if saved is None:
        return None
    step = step_at(saved.step)
    target = abstract_state(step, mesh)
    fields = dict(saved.moments)
    average = None
    trained, frozen = split_params({**saved.params, **_load_copies(workdir, step, mesh)}, step.scales)
    if _TRAINED in fields:
        average = trained
        trained = fields.pop(_TRAINED)
    frozen = step.objective.convert_frozen(frozen)
    moments = type(target.moments)(**fields)
    return _fill_state(step, target, saved.step, trained, frozen, moments, average), saved.data


def _fill_state(
    step: TrainStep,
    target: TrainState,
    number: int,
    trained: Any,
    frozen: Any,
    moments: Moments | None = None,
    average: Any = None,
) -> TrainState:
    """A state after ``number`` steps; moments are fresh unless given, and an average begins with what trains."""
    if moments is None:
        # made on the devices, each with its own part: no host holds moments of the whole model
        shardings = jax.tree.map(lambda x: x.sharding, target.optimizer)
        optimizer = jax.jit(step.transformation.init, out_shardings=shardings)(trained)
    else:
        # a buffer of its own for the schedule: the step is given the memory of its state, and each buffer only once
        stored_count: Any = moments.count
        count = jax.device_put(jnp.int32(int(stored_count)), target.step.sharding)
        optimizer = with_moments(target.optimizer, moments, count)
    if step.optimizer.ema and average is None:
        # buffers of its own, as above
        average = jax.tree.map(jnp.copy, trained)
    return TrainState(jax.device_put(jnp.int32(number), target.step.sharding), trained, frozen, optimizer, average)


def bytes_per_device(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""
    # int64, for the elements of a stack of layers can be more than int32 holds
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
    return total
