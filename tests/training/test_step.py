"""The step: packed examples, accumulated batches, what is frozen, what is counted."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import MeshConfig
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.next_token import NextToken, count_work
from omni_jax.training.optimizer import flatten_params, merge_params, split_params
from omni_jax.training.options import NextTokenOptions
from omni_jax.training.recipe import OptimizerConfig
from omni_jax.training.step import TrainState, TrainStep, abstract_batch, abstract_program, abstract_state
from tests.training.examples import BUDGET, KINDS, make_batch, make_examples

CONFIG = OmniConfig.tiny()
OBJECTIVE = NextToken(Thinker(CONFIG.thinker_config, remat="dots"), CONFIG, NextTokenOptions(chunk=16))
TOLERANCE = 2e-5  # of the largest gradient; float32 sums over a packed row are in another order


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = nn.unbox(OBJECTIVE.abstract_params())
    return jax.tree.map(lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32), shapes)


def make_step(scales, **optimizer):
    return TrainStep(OBJECTIVE, OptimizerConfig(**optimizer), scales, num_steps=10)


@pytest.fixture(scope="module")
def gradients(params):
    step = make_step(dict.fromkeys(flatten_params(params), 1.0))
    return jax.jit(lambda batch: loss_and_gradients(step, params, batch))


def loss_and_gradients(step, params, batch):
    found = step.loss_and_gradients(TrainState(0, params, {}, None), batch)
    terms = found.terms
    gradients = found.gradients
    return terms["loss"], gradients


def assert_same(ours, expected):
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    for path, leaf in flatten_params(ours).items():
        assert np.abs(np.asarray(leaf) - flatten_params(expected)[path]).max() < TOLERANCE * largest, path


def test_a_packed_row_has_the_losses_and_gradients_of_its_examples(gradients) -> None:
    examples = make_examples([*KINDS, "image", "text"], CONFIG)
    batch = make_batch(examples, CONFIG)
    assert batch.inputs.segment_ids.max() >= 2 and np.asarray(batch.inputs.vision[0].valid).max() >= 2
    loss, grads = gradients(batch)
    fractions = [example.weights.sum() / batch.weights.sum() for example in examples]
    alone = [gradients(make_batch([example], CONFIG)) for example in examples]
    assert abs(sum(w * float(one) for w, (one, _) in zip(fractions, alone, strict=True)) - float(loss)) < 1e-5
    expected = jax.tree.map(
        lambda *gs: sum(w * np.asarray(g) for w, g in zip(fractions, gs, strict=True)), *(g for _, g in alone)
    )
    assert_same(grads, expected)


def test_accumulated_batches_are_one(params, gradients) -> None:
    """Weighted by what each has to learn, not by batches."""
    kinds_of_batches = (["text", "audio"], ["text"])
    batches = [make_batch(make_examples(kinds, CONFIG, seed), CONFIG) for seed, kinds in enumerate(kinds_of_batches)]
    step = make_step(dict.fromkeys(flatten_params(params), 1.0), accumulate=2)
    stacked = jax.tree.map(lambda *a: np.stack(a), *batches)
    loss, grads = jax.jit(lambda batch: loss_and_gradients(step, params, batch))(stacked)
    sizes = [b.weights.sum() for b in batches]
    alone = [gradients(batch) for batch in batches]
    mean = [np.average([float(one) for one, _ in alone], weights=sizes)]
    assert abs(float(loss) - mean[0]) < 1e-5
    assert_same(grads, jax.tree.map(lambda a, b: (sizes[0] * a + sizes[1] * b) / sum(sizes), *(g for _, g in alone)))


def test_what_is_frozen_has_neither_gradient_nor_moments_nor_another_dtype(params) -> None:
    scales = {path: 1.0 for path in flatten_params(params) if path.startswith("thinker/audio_encoder/proj")}
    step = make_step(scales)
    trained, frozen = split_params(params, scales)
    frozen = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), frozen)
    state = TrainState(jnp.int32(0), trained, frozen, step.transformation.init(trained))
    made, metrics = jax.jit(step)(state, make_batch(make_examples(["audio"], CONFIG), CONFIG))
    assert set(flatten_params(made.moments.mu)) == set(flatten_params(made.trained)) == set(scales)
    jax.tree.map(np.testing.assert_array_equal, made.frozen, frozen)
    assert all(np.any(flatten_params(made.trained)[path] != flatten_params(trained)[path]) for path in scales)
    assert int(made.step) == int(made.moments.count) == 1 and float(metrics["grad_norm"]) > 0
    assert set(flatten_params(merge_params(trained, frozen))) == set(flatten_params(params))


def test_work_is_counted_without_padding() -> None:
    examples = make_examples(["image", "image", "audio", "video"], CONFIG)
    found = {name: float(value) for name, value in count_work(make_batch(examples, CONFIG)).items()}
    lengths = [len(example.tokens) for example in examples]
    frames = np.concatenate([(group.valid > 0).sum((1, 2)) for e in examples for group in e.vision])
    assert found == {
        "tokens": sum(lengths),
        "target_tokens": sum((e.weights > 0).sum() for e in examples),
        "pairs": sum(n * (n + 1) / 2 for n in lengths),
        "blocks": examples[2].num_blocks,
        "patches": frames.sum(),
        "frame_pairs": (frames.astype(float) ** 2).sum(),
    }


def test_a_step_is_lowered_without_its_devices(make_recipe) -> None:
    """The abstract arguments are what the loop makes, on any mesh."""
    recipe = make_recipe(data=dict(rows=4, tokens=128), mesh=MeshConfig(fsdp=1), optimizer=dict(accumulate=2))
    mesh = recipe.mesh.make()
    with jax.set_mesh(mesh):
        step, (state, batch) = abstract_program(recipe, make_objective(recipe), mesh)
        lowered = step.lower(state, batch)
    assert batch.inputs.tokens.shape == (2, 4, 128)
    assert jax.tree.structure(lowered.out_info[0]) == jax.tree.structure(state)
    wide = dataclasses.replace(recipe, mesh=MeshConfig(fsdp=2, sequence=2, tensor=2))
    spread = abstract_batch(wide.data, OBJECTIVE, wide.mesh.abstract())
    assert spread.inputs.tokens.sharding.shard_shape((4, 128)) == (2, 64)
    assert abstract_state(make_step({}), wide.mesh.abstract()).step.shape == ()
    assert BUDGET.tokens == 128
