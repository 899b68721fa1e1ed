"""One step of training as a pure function, and its compiled form for a recipe and a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from omni_jax.batch import PADDING, Array, TrainBatch, batch_axes
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import Budget, Part, assemble
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.sharding import logical_sharding, param_shardings
from omni_jax.training.losses import next_token_loss
from omni_jax.training.optimizer import adam, flat, merge, rates, split, update
from omni_jax.training.recipe import Optimizer, Phase, Recipe

Metrics: TypeAlias = dict[str, jax.Array]
AnyMesh: TypeAlias = Mesh | AbstractMesh

_HEAD = "decoder/head/kernel"


@struct.dataclass
class TrainState:
    """All that a step changes. Nothing in it is left to chance, so there is no key."""

    step: Any  # int32, of the whole run
    trained: Any  # parameters, float32
    frozen: Any  # the others, in the dtype that they came in
    moments: Any  # optax.ScaleByAdamState of ``trained``, float32; it counts the steps of the phase

    @property
    def params(self) -> dict[str, Any]:
        """The whole of the Thinker's parameters."""
        return merge(self.trained, self.frozen)


@dataclass(frozen=True, eq=False)
class Step:
    """The step of a phase of a recipe, as a function of a state and a batch."""

    model: Thinker
    optimizer: Optimizer
    rates: dict[str, float]  # of what trains, by path
    steps: int  # of the phase
    chunk: int
    z_loss: float = 0.0

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        """The next state, and what is to be told of this one.

        The leaves of ``batch`` have a leading axis of several batches where the optimizer accumulates them; the loss is
        then the mean over all their tokens.
        """
        loss, grads = self.gradients(state, batch)
        trained, moments, metrics = update(
            self.optimizer, grads, state.moments, state.trained, rates=self.rates, steps=self.steps
        )
        metrics |= {"loss": loss, **counts(batch)}
        return TrainState(state.step + 1, trained, state.frozen, moments), metrics

    def gradients(self, state: TrainState, batch: TrainBatch) -> tuple[jax.Array, Any]:
        """The mean loss without the z-loss, and the gradient of what trains, in float32."""
        total = jnp.maximum(jnp.sum(batch.weights), 1e-6)

        def loss(trained: Any, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
            params = merge(trained, state.frozen)
            hidden = self.model.apply({"params": params}, batch.inputs, method=Thinker.hidden)
            return next_token_loss(
                params["decoder"]["head"]["kernel"],
                jnp.asarray(hidden),
                batch.targets,
                batch.weights / total,
                chunk=self.chunk,
                z_loss=self.z_loss,
                head_trains=_HEAD in self.rates,
            )

        gradient = jax.grad(loss, has_aux=True)
        if self.optimizer.accumulate == 1:
            grads, plain = gradient(state.trained, batch)
            return plain, grads

        def one(sums: tuple[jax.Array, Any], batch: TrainBatch) -> tuple[tuple[jax.Array, Any], None]:
            grads, plain = gradient(state.trained, batch)
            return (sums[0] + plain, jax.tree.map(jnp.add, sums[1], grads)), None

        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained)
        return jax.lax.scan(one, zeros, batch)[0]


def counts(batch: TrainBatch) -> Metrics:
    """How much of a batch is real: what the model's FLOPs are counted from (docs/training.md)."""
    inputs = batch.inputs
    segments = jnp.asarray(inputs.segment_ids).reshape(-1, inputs.segment_ids.shape[-1])
    place = jnp.arange(segments.shape[1])
    begins = jnp.concatenate([jnp.full_like(segments[:, :1], True), segments[:, 1:] != segments[:, :-1]], axis=1)
    first = jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    real = segments != PADDING
    found = {
        "tokens": jnp.sum(real),
        "learnt": jnp.sum(batch.weights > 0),
        "pairs": jnp.sum(jnp.where(real, place - first + 1, 0), dtype=jnp.float32),
    }
    if inputs.audio is not None:
        found["blocks"] = jnp.sum(inputs.audio.length > 0)
    for frames in inputs.vision:
        sizes = _frame_sizes(frames.valid)
        found["patches"] = found.get("patches", 0) + jnp.sum(sizes)
        found["frame_pairs"] = found.get("frame_pairs", 0.0) + jnp.sum(sizes.astype(jnp.float32) ** 2)
    return found


def _frame_sizes(valid: Int[Array, "*canvases W P"]) -> Int[jax.Array, "canvases frames"]:
    """Patches of each frame of each canvas; a canvas has at most as many frames as windows."""
    windows, patches = valid.shape[-2:]
    numbers = jnp.asarray(valid, jnp.int32).reshape(-1, windows * patches)
    return jax.vmap(lambda canvas: jnp.bincount(canvas, length=windows + 1)[1:])(numbers)


def make_model(recipe: Recipe) -> Thinker:
    """The Thinker as it is trained: scanned layers, computing in the recipe's dtype."""
    config, dtype = recipe.model.thinker_config, jnp.dtype(recipe.dtype)
    return Thinker(config, remat=recipe.remat, media_by_rows=True, dtype=dtype)


def make_step(recipe: Recipe, phase: Phase, steps: int) -> Step:
    """The step of a phase that has so many.

    Raises:
      ConfigError: if the fields of the recipe do not go together, or a group of the phase has no parameter.
    """
    recipe.check()
    model = make_model(recipe)
    paths = list(flat(nn.unbox(abstract_params(model))))
    return Step(model, recipe.optimizer, rates(phase, paths), steps, recipe.chunk, recipe.z_loss)


def abstract_state(step: Step, mesh: AnyMesh, frozen_dtypes: dict[str, Any] | None = None) -> TrainState:
    """Shapes, dtypes and shardings of a state.

    Args:
      step: says what trains.
      mesh: to lay it over; an abstract one will do.
      frozen_dtypes: of the parameters by path, where what is frozen keeps them; else the dtype of computation.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide.
    """
    boxed = abstract_params(step.model)
    places = flat(param_shardings(boxed, mesh))
    frozen_dtypes = frozen_dtypes or {}

    def leaf(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path in step.rates else frozen_dtypes.get(path, step.model.dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=places[path])

    shapes = {path: leaf(path, x.shape) for path, x in flat(nn.unbox(boxed)).items()}
    trained, frozen = split(unflatten_dict(shapes, sep="/"), step.rates)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    return TrainState(number, trained, frozen, optax.ScaleByAdamState(count=number, mu=trained, nu=trained))  # type: ignore[arg-type]


def fresh_moments(step: Step, trained: Any) -> optax.ScaleByAdamState:
    """Moments of nothing yet, laid over the mesh as their parameters are; jit it with the shardings of a state."""
    return adam(step.optimizer).init(trained)  # type: ignore[return-value]


def abstract_batch(data: DataConfig, model: OmniConfig, mesh: AnyMesh, accumulate: int = 1) -> TrainBatch:
    """Shapes, dtypes and shardings of the batch of a step, over all processes."""
    budget = Budget.of(dataclasses.replace(data, rows=1, streams=1))
    one = assemble([Part(budget)], budget, model, first=0, streams=1)

    def leaf(x: Array, axes: PartitionSpec) -> jax.ShapeDtypeStruct:
        shape = (x.shape[0] * data.rows, *x.shape[1:])
        if accumulate > 1:
            shape = (accumulate, *shape)
            axes = PartitionSpec(None, *axes)
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=logical_sharding(axes, mesh))

    return jax.tree.map(leaf, one, batch_axes(one))


def compiled(
    step: Step, state: TrainState, mesh: Mesh, tpu_options: Mapping[str, str]
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
    """The step as a program that gives its state's memory to the next.

    Args:
      step: of the phase.
      state: it, or an abstract one.
      mesh: over the devices that it will run on.
      tpu_options: for the compiler, where they are TPUs.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    options: dict[str, Any] | None = dict(tpu_options) if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None), compiler_options=options)


def program(recipe: Recipe, mesh: Mesh, phase: int = -1) -> tuple[Callable[..., Any], tuple[TrainState, TrainBatch]]:
    """A recipe's step and its abstract arguments, to be lowered under ``jax.set_mesh(mesh)`` for any devices.

    Args:
      recipe: what to train.
      mesh: over the devices to compile for; they need not be there.
      phase: which of the recipe's phases.
    """
    step = make_step(recipe, recipe.phases[phase], recipe.steps)
    state = abstract_state(step, mesh)
    batch = abstract_batch(recipe.data, recipe.model, mesh, recipe.optimizer.accumulate)
    return compiled(step, state, mesh, recipe.tpu_options), (state, batch)
