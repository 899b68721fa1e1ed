"""One step of training as a pure function, and its compiled form for a recipe and a mesh.

Letters: B rows, S positions, W windows of a canvas, P patches of a window.
"""

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
from omni_jax.training.optimizer import (
    ADAM,
    OptimizerState,
    flatten_params,
    learning_rate,
    learning_rate_scales,
    make_optimizer,
    merge_params,
    split_params,
    with_moments,
)
from omni_jax.training.recipe import OptimizerConfig, Phase, Recipe

Metrics: TypeAlias = dict[str, jax.Array]
AnyMesh: TypeAlias = Mesh | AbstractMesh

_HEAD_KERNEL = "decoder/head/kernel"


@struct.dataclass
class TrainState:
    """All that a step changes. No step draws a random number, so there is no key."""

    step: Any  # int32 [], of the whole run
    trained: Any  # parameters that train, float32
    frozen: Any  # the others, in the dtype of the checkpoint that they came from
    optimizer: OptimizerState  # its moments are float32, like ``trained``; it counts the steps of the phase

    @property
    def params(self) -> dict[str, Any]:
        """The tree of all of the Thinker's parameters."""
        return merge_params(self.trained, self.frozen)

    @property
    def moments(self) -> optax.ScaleByAdamState:
        return self.optimizer[ADAM]


# compared and hashed by identity: a dictionary has no hash, and jit keeps the program of each object
@dataclass(frozen=True, eq=False)
class TrainStep:
    """The step of a phase of a recipe, as a function of a state and a batch."""

    model: Thinker
    optimizer: OptimizerConfig
    scales: dict[str, float]  # factor of the learning rate of each parameter that trains, by path
    num_steps: int  # of the phase
    loss_chunk: int
    z_loss: float = 0.0

    def __call__(self, state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        """The next state, and the metrics of this step.

        The leaves of ``batch`` have a leading axis of several batches where the optimizer accumulates them; the loss is
        then the mean over all their target tokens.
        """
        loss, grads = self.loss_and_gradients(state, batch)
        with jax.named_scope("optimizer"):
            # moments and parameters keep the shardings of the state, so that nothing is gathered here
            updates, optimizer = self.transformation.update(grads, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),  # before the clip
            # of the update that was just made: Adam has counted those of the phase before it
            "learning_rate": learning_rate(self.optimizer, state.moments.count, self.num_steps),
            **count_work(batch),
        }
        return TrainState(state.step + 1, trained, state.frozen, optimizer), metrics  # type: ignore[arg-type]

    @property
    def transformation(self) -> optax.GradientTransformation:
        return make_optimizer(self.optimizer, self.scales, self.num_steps)

    def loss_and_gradients(self, state: TrainState, batch: TrainBatch) -> tuple[jax.Array, Any]:
        """The mean loss without the z-loss, and the gradient of what trains, in float32."""
        # Of all accumulated batches together, so that each contributes as many tokens as it has. A batch of padding
        # alone has no weight.
        total_weight = jnp.maximum(jnp.sum(batch.weights), 1e-6)

        # differentiated by what trains alone: no gradient of a frozen parameter is ever made
        def loss(trained: Any, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
            params = merge_params(trained, state.frozen)
            hidden = self.model.apply({"params": params}, batch.inputs, method=Thinker.hidden)  # [B, S, D]
            sums = next_token_loss(
                params["decoder"]["head"]["kernel"],
                jnp.asarray(hidden),
                batch.targets,
                batch.weights / total_weight,
                chunk=self.loss_chunk,
                z_loss=self.z_loss,
                head_trains=_HEAD_KERNEL in self.scales,
            )
            return sums.total, sums.cross_entropy  # the z-loss is trained on, but not reported

        gradient = jax.grad(loss, has_aux=True)
        # without accumulation the leaves have no axis to scan over
        if self.optimizer.accumulate == 1:
            grads, cross_entropy = gradient(state.trained, batch)
            return cross_entropy, grads

        def add_batch(sums: tuple[jax.Array, Any], batch: TrainBatch) -> tuple[tuple[jax.Array, Any], None]:
            loss_sum, grads_sum = sums
            grads, cross_entropy = gradient(state.trained, batch)
            return (loss_sum + cross_entropy, jax.tree.map(jnp.add, grads_sum, grads)), None

        # one program for all batches: gradients are summed in place, and only one batch's activations exist
        zeros = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.trained)
        return jax.lax.scan(add_batch, zeros, batch)[0]


def count_work(batch: TrainBatch) -> Metrics:
    """How much of a batch is not padding: what the model's FLOPs are counted from (docs/training.md)."""
    inputs = batch.inputs
    # rows of accumulated batches are counted as rows of one
    segments = jnp.asarray(inputs.segment_ids).reshape(-1, inputs.segment_ids.shape[-1])  # [B, S]
    position = jnp.arange(segments.shape[1])  # [S]

    # the start of the example that a position belongs to: the last place up to it at which the segment id changes
    changes = segments[:, 1:] != segments[:, :-1]  # [B, S - 1]
    is_first = jnp.concatenate([jnp.full_like(segments[:, :1], True), changes], axis=1)  # [B, S]
    segment_start = jax.lax.cummax(jnp.where(is_first, position, 0), axis=1)  # [B, S]

    # causal attention: a position sees those of its example up to itself
    is_token = segments != PADDING  # [B, S]
    attended = jnp.where(is_token, position - segment_start + 1, 0)  # [B, S]
    # int32 holds the tokens of any batch, but not the pairs of a long row
    counts = {
        "tokens": jnp.sum(is_token),
        "target_tokens": jnp.sum(batch.weights > 0),
        "pairs": jnp.sum(attended, dtype=jnp.float32),
    }
    if inputs.audio is not None:
        counts["blocks"] = jnp.sum(inputs.audio.length > 0)
    for frames in inputs.vision:
        sizes = _frame_sizes(frames.valid)  # [canvases, W]
        # a patch attends to all patches of its frame, itself included
        counts["patches"] = counts.get("patches", 0) + jnp.sum(sizes)
        counts["frame_pairs"] = counts.get("frame_pairs", 0.0) + jnp.sum(sizes.astype(jnp.float32) ** 2)
    return counts


def _frame_sizes(valid: Int[Array, "*canvases W P"]) -> Int[jax.Array, "canvases W"]:
    """Patches of each frame of each canvas; a canvas has at most as many frames as windows."""
    num_windows, num_patches = valid.shape[-2:]
    # ``valid`` numbers the frames of a canvas from 1; 0 is padding, which is dropped
    frame_ids = jnp.asarray(valid, jnp.int32).reshape(-1, num_windows * num_patches)  # [canvases, W * P]
    return jax.vmap(lambda canvas: jnp.bincount(canvas, length=num_windows + 1)[1:])(frame_ids)


def make_model(recipe: Recipe) -> Thinker:
    """The Thinker as it is trained: scanned layers, computing in the recipe's dtype."""
    return Thinker(recipe.model.thinker_config, remat=recipe.remat, media_by_rows=True, dtype=jnp.dtype(recipe.dtype))


def make_step(recipe: Recipe, phase: Phase, num_steps: int) -> TrainStep:
    """The step of a phase of ``num_steps``.

    Raises:
      ConfigError: if the fields of the recipe do not go together, or a group of the phase has no parameter.
    """
    recipe.check()
    model = make_model(recipe)
    # unboxed: a group names the paths of a checkpoint, where no array is in a box of logical axes
    paths = list(flatten_params(nn.unbox(abstract_params(model))))
    scales = learning_rate_scales(phase, paths)
    return TrainStep(model, recipe.optimizer, scales, num_steps, recipe.chunk, recipe.z_loss)


def abstract_state(step: TrainStep, mesh: AnyMesh, frozen_dtypes: Mapping[str, Any] | None = None) -> TrainState:
    """Shapes, dtypes and shardings of a state.

    Args:
      step: says what trains.
      mesh: to lay it over; an abstract one will do.
      frozen_dtypes: of the parameters by path, where what is frozen keeps them; else the dtype of computation.

    Raises:
      ConfigError: listing the parameters that the mesh does not divide.
    """
    # parameters: float32 where they train, because updates are too small for bfloat16
    boxed = abstract_params(step.model)
    shardings = flatten_params(param_shardings(boxed, mesh))
    frozen_dtypes = frozen_dtypes or {}
    leaves = {}
    for path, leaf in flatten_params(nn.unbox(boxed)).items():
        dtype = jnp.float32 if path in step.scales else frozen_dtypes.get(path, step.model.dtype)
        leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=shardings[path])
    trained, frozen = split_params(unflatten_dict(leaves, sep="/"), step.scales)

    # moments are sharded as their parameters are; everything else of the optimizer's state is a counter
    scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
    moments = optax.ScaleByAdamState(count=scalar, mu=trained, nu=trained)  # type: ignore[arg-type]
    optimizer = jax.eval_shape(step.transformation.init, trained)
    return TrainState(scalar, trained, frozen, with_moments(optimizer, moments, scalar))  # type: ignore[arg-type]


def abstract_batch(data: DataConfig, model: OmniConfig, mesh: AnyMesh, accumulate: int = 1) -> TrainBatch:
    """Shapes, dtypes and shardings of the batch of a step, over all processes."""
    # an empty batch of one row, made by the code that makes all others, so that the two cannot differ
    budget = Budget.of(dataclasses.replace(data, rows=1, streams=1))
    one = assemble([Part(budget)], budget, model, first=0, streams=1)

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
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
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
    recipe: Recipe, mesh: Mesh, phase: int = -1
) -> tuple[Callable[..., Any], tuple[TrainState, TrainBatch]]:
    """A recipe's step and its abstract arguments, to be lowered under ``jax.set_mesh(mesh)`` for any devices.

    Args:
      recipe: what to train.
      mesh: over the devices to compile for; they need not be there.
      phase: which of the recipe's phases.
    """
    # the number of steps is only a constant of the schedule, so that of the run will do
    step = make_step(recipe, recipe.phases[phase], recipe.steps)
    state = abstract_state(step, mesh)
    batch = abstract_batch(recipe.data, recipe.model, mesh, recipe.optimizer.accumulate)
    return jit_step(step, state, mesh, recipe.tpu_options), (state, batch)
