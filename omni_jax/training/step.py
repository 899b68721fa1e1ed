"""One step of training as a pure function, and its compiled form for a recipe and a mesh."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from omni_jax.batch import Array, batch_axes
from omni_jax.data.config import DataConfig
from omni_jax.sharding import logical_sharding, param_shardings
from omni_jax.training.objective import Batch, Metrics, Objective
from omni_jax.training.optimizer import (
    MOMENTS,
    SCHEDULE,
    Moments,
    OptimizerState,
    flatten_params,
    learning_rate,
    learning_rate_scales,
    make_optimizer,
    merge_moments,
    merge_params,
    select_moments,
    split_params,
    with_moments,
)
from omni_jax.training.recipe import OptimizerConfig, Phase, Recipe

AnyMesh: TypeAlias = Mesh | AbstractMesh


@struct.dataclass
class TrainState:
    """All that a step changes. Random numbers follow from the recipe's seed and the step, so there is no key."""

    step: Any  # int32 [], of the whole run
    trained: Any  # parameters that train, float32
    frozen: Any  # the others, in the dtype of the checkpoint that they came from
    optimizer: OptimizerState  # the second moment is float32, as ``trained`` is; it counts the steps of the phase
    average: Any = None  # moving average of ``trained``, a tree like it; None where the recipe wants none

    @property
    def params(self) -> dict[str, Any]:
        """The trees of all parameters, by component: those that the next step takes."""
        return merge_params(self.trained, self.frozen)

    @property
    def averaged_params(self) -> dict[str, Any]:
        """The same with the average of what trains, where there is one: what is evaluated, and used afterwards."""
        return merge_params(self.trained if self.average is None else self.average, self.frozen)

    @property
    def moments(self) -> Moments:
        return self.optimizer[MOMENTS]


class Gradients(NamedTuple):
    """Of a group of parameters.

    Attributes:
      terms: of the group's loss, by name.
      statistics: of ``Loss``; empty if the loss has none.
      gradients: a tree of the group's parameters, float32.
    """

    terms: Metrics
    statistics: Metrics
    gradients: Any


# compared and hashed by identity: a dictionary has no hash, and jit keeps the program of each object
@dataclass(frozen=True, eq=False)
class TrainStep:
    """The step of a phase of a recipe, as a function of a state and a batch."""

    objective: Objective
    optimizer: OptimizerConfig
    scales: dict[str, float]  # factor of the learning rate of each parameter that trains, by path
    num_steps: int  # of the phase
    seed: int = 0  # of random numbers
    skips_nonfinite: bool = False  # whether a step that is not finite changes nothing

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """The next state, and the metrics of this step.

        The leaves of ``batch`` have a leading axis of several batches where the optimizer accumulates them; the loss is
        then that of all of them together.
        """
        terms: Metrics = {}
        statistics: Metrics = {}
        squared_norm = jnp.float32(0)
        trained = state.trained
        moments = []
        for group in self.groups:
            # of the parameters that the groups before have just been given
            found = self.loss_and_gradients(state.replace(trained=trained), batch, group)  # type: ignore[attr-defined]
            terms.update(found.terms)
            statistics.update(found.statistics)
            squared_norm += jnp.square(optax.tree.norm(found.gradients))  # before the clip
            with jax.named_scope("optimizer"):
                trained, group_moments = self._update(trained, state.optimizer, found.gradients, group)
            moments.append(group_moments)
        loss = terms.pop("loss")
        grad_norm = jnp.sqrt(squared_norm)

        optimizer = with_moments(state.optimizer, merge_moments(moments), state.optimizer[SCHEDULE].count + 1)
        average = self._update_average(state, trained)
        changed = self._apply_statistics(state, statistics)
        if self.skips_nonfinite:
            is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            flat = flatten_params(state.frozen)
            old = (state.trained, state.optimizer, state.average, {path: flat[path] for path in changed})
            trained, optimizer, average, changed = jax.tree.map(
                lambda new, old: jnp.where(is_finite, new, old), (trained, optimizer, average, changed), old
            )
        frozen = unflatten_dict(flatten_params(state.frozen) | changed, sep="/")

        by_source = {name: term for name, term in terms.items() if jnp.ndim(term)}
        metrics = {
            "loss": loss,
            **by_source,
            # scalars that the objective reports beside the loss
            "terms": {name: term for name, term in terms.items() if name not in by_source},
            "grad_norm": grad_norm,
            # of the update that was just made: the moments have counted those of the phase before it
            "learning_rate": learning_rate(self.optimizer, state.moments.count, self.num_steps),
            **self.objective.count_work(batch),
        }
        return TrainState(state.step + 1, trained, frozen, optimizer, average), metrics  # type: ignore[arg-type]

    @property
    def transformation(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.scales, self.num_steps)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of what trains, in groups that are updated one after the other."""
        groups = self.objective.optimizer_groups(tuple(self.scales))
        return tuple(group for group in groups if group)

    def loss_and_gradients(self, state: TrainState, batch: Batch, group: Collection[str] = ()) -> Gradients:
        """The loss of a group of parameters, and its gradient.

        Args:
          state: with the parameters.
          batch: as a step takes it.
          group: paths of its parameters; of all that train if empty.
        """
        group = group or self.scales
        # of all accumulated batches together, so that each contributes as much as it has
        denominators = self.objective.denominators(batch)
        own, others = split_params(state.trained, group)
        fixed = merge_params(others, state.frozen)

        # differentiated by what trains alone: no gradient of a frozen parameter is ever made
        def loss(trained: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
            found = self.objective.loss(merge_params(trained, fixed), batch, denominators, key, group)
            return found.total, (found.terms, found.statistics or {})

        gradient = jax.grad(loss, has_aux=True)
        key = self._key(state)
        # without accumulation the leaves have no axis to scan over
        if self.optimizer.accumulate == 1:
            grads, (terms, statistics) = gradient(own, batch, key)
            return Gradients(terms, statistics, grads)

        def add_batch(grads_sum: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, tuple[Metrics, Metrics]]:
            grads, sums = gradient(own, *part)
            return jax.tree.map(jnp.add, grads_sum, grads), sums

        # one program for all batches: gradients are summed in place, and only one batch's activations exist
        zeros = jax.tree.map(jnp.zeros_like, own)
        keys = jax.random.split(key, self.optimizer.accumulate)
        grads, sums = jax.lax.scan(add_batch, zeros, (batch, keys))
        terms, statistics = jax.tree.map(lambda term: jnp.sum(term, axis=0), sums)
        return Gradients(terms, statistics, grads)

    def _key(self, state: TrainState) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), state.step)

    def _update(
        self, trained: Any, optimizer: OptimizerState, grads: Any, group: Collection[str]
    ) -> tuple[Any, Moments]:
        """What trains with a group of it updated, and the moments of the group."""
        own, others = split_params(trained, group)
        moments = select_moments(optimizer[MOMENTS], group)
        # moments and parameters keep the shardings of the state, so that nothing is gathered here
        before = with_moments(optimizer, moments, optimizer[SCHEDULE].count)
        updates, after = self.transformation.update(grads, before, own)
        return merge_params(optax.apply_updates(own, updates), others), after[MOMENTS]  # type: ignore[arg-type]

    def _update_average(self, state: TrainState, trained: Any) -> Any:
        """The average after a step, or None if there is none."""
        if not self.optimizer.ema:
            return None
        # early steps would be remembered for as long as the decay lasts
        count = jnp.asarray(state.moments.count, jnp.float32)
        decay = jnp.minimum(self.optimizer.ema, (1 + count) / (10 + count))
        return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.average, trained)

    def _apply_statistics(self, state: TrainState, statistics: Metrics) -> dict[str, jax.Array]:
        """New values of frozen parameters, by path."""
        if not statistics:
            return {}
        # another key than that of the loss
        key = jax.random.fold_in(self._key(state), 1)
        return self.objective.apply_statistics(state.params, statistics, key)


def make_step(recipe: Recipe, objective: Objective, phase: Phase, num_steps: int) -> TrainStep:
    """The step of a phase of ``num_steps``.

    Raises:
      ConfigError: if the fields of the recipe do not go together, or a group of the phase has no parameter.
    """
    recipe.check()
    # unboxed: a group names the paths of a checkpoint, where no array is in a box of logical axes
    paths = list(flatten_params(nn.unbox(objective.abstract_params())))
    scales = learning_rate_scales(phase, paths)
    skips = recipe.on_nonfinite == "skip"
    return TrainStep(objective.for_phase(scales), recipe.optimizer, scales, num_steps, recipe.seed, skips)


def abstract_params(step: TrainStep, mesh: AnyMesh, frozen_dtypes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the parameters of each component, as checkpoints have them.

    Args:
      step: says what trains.
      mesh: to lay it over; an abstract one will do.
      frozen_dtypes: of the parameters by path, where what is frozen keeps them; else the dtype of computation.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide.
    """
    # parameters: float32 where they train, because updates are too small for bfloat16
    boxed = step.objective.abstract_params()
    shardings = flatten_params(param_shardings(boxed, mesh))
    frozen_dtypes = frozen_dtypes or {}
    leaves = {}
    for path, leaf in flatten_params(nn.unbox(boxed)).items():
        dtype = jnp.float32 if path in step.scales else frozen_dtypes.get(path, step.objective.dtype)
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path])
    return unflatten_dict(leaves, sep="/")


def abstract_state(step: TrainStep, mesh: AnyMesh) -> TrainState:
    """Shapes, dtypes and shardings of a state.

    Args:
      step: says what trains.
      mesh: to lay it over; an abstract one will do.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide.
    """
    trained, frozen = split_params(abstract_params(step, mesh), step.scales)
    frozen = step.objective.convert_frozen(frozen)

    whole = NamedSharding(mesh, PartitionSpec())
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    optimizer = jax.eval_shape(step.transformation.init, trained)

    def place(moment: jax.ShapeDtypeStruct, parameter: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # sharded as its parameter is; sums of rows or columns are small
        sharding = parameter.sharding if moment.shape == parameter.shape else whole
        return jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=sharding)

    moments = optimizer[MOMENTS]
    trees = {name: jax.tree.map(place, tree, trained) for name, tree in moments._asdict().items() if name != "count"}
    moments = moments._replace(count=scalar, **trees)
    average = trained if step.optimizer.ema else None
    return TrainState(scalar, trained, frozen, with_moments(optimizer, moments, scalar), average)  # type: ignore[arg-type]


def abstract_batch(data: DataConfig, objective: Objective, mesh: AnyMesh, accumulate: int = 1) -> Batch:
    """Shapes, dtypes and shardings of the batch of a step, over all processes."""
    one = objective.abstract_row(data)

    def leaf(x: Array, axes: PartitionSpec) -> jax.ShapeDtypeStruct:
        # rows, blocks and canvases: each leading axis is so many times that of one row
        shape = (x.shape[0] * data.rows, *x.shape[1:])
        if accumulate > 1:
            shape = (accumulate, *shape)
            axes = PartitionSpec(None, *axes)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=logical_sharding(axes, mesh))

    return jax.tree.map(leaf, one, batch_axes(one))


def jit_step(
    step: TrainStep, state: TrainState, mesh: Mesh, tpu_options: Mapping[str, str]
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The step as a program that gives its state's memory to the next.

    Args:
      step: of the phase.
      state: it, or an abstract one.
      mesh: over the devices that it will run on.
      tpu_options: for the compiler, where they are TPUs.
    """
    # The new state lies where the old one did, which donation and the next call rely on. The metrics are scalars, whose
    # place is left to the compiler.
    shardings = jax.tree.map(lambda x: x.sharding, state)
    # other compilers refuse an option that they do not know
    options: dict[str, Any] | None = dict(tpu_options) if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def abstract_program(
    recipe: Recipe, objective: Objective, mesh: Mesh, phase: int = -1
) -> tuple[Callable[..., Any], tuple[TrainState, Batch]]:
    """A recipe's step and its abstract arguments, to be lowered under ``jax.set_mesh(mesh)`` for any devices.

    Args:
      recipe: what to train.
      objective: of the recipe.
      mesh: over the devices to compile for; they need not be there.
      phase: which of the recipe's phases.
    """
    # the number of steps is only a constant of the schedule, so that of the run will do
    step = make_step(recipe, objective, recipe.phases[phase], recipe.steps)
    state = abstract_state(step, mesh)
    batch = abstract_batch(recipe.data, objective, mesh, recipe.optimizer.accumulate)
    return jit_step(step, state, mesh, recipe.tpu_options), (state, batch)
