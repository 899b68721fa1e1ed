"""Bags of words of what encoders see and hear: the loss by a plain loop, and that it alone teaches them."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import RECIPES
from omni_jax.batch import NO_FEATURE, TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.models.thinker import Thinker, smallest_batch
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.bag_of_words import BagOfWords, bag_of_words_loss
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import OptimizerConfig
from omni_jax.training.step import TrainState, TrainStep
from tests.training.examples import KINDS, make_batch, make_examples

CONFIG = OmniConfig.tiny()
TOLERANCE = 1e-5  # float32, of sums over a vocabulary


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    return make_batch(make_examples([*KINDS, "image"], CONFIG), CONFIG)


def loss_by_loop(x: np.ndarray, table: np.ndarray, batch: TrainBatch) -> np.ndarray:
    """The same as ``bag_of_words_loss``, one target after the other."""
    segment_ids = np.asarray(batch.inputs.segment_ids)
    is_feature = np.asarray(batch.inputs.media_index) != NO_FEATURE
    targets = np.asarray(batch.targets)
    losses = np.zeros(targets.shape)
    table = table / np.sqrt(np.mean(np.sum(table**2, axis=1)))
    for row, place in np.ndindex(targets.shape):
        found = []
        for other in range(targets.shape[1]):
            if is_feature[row, other] and segment_ids[row, other] == segment_ids[row, place]:
                scores = np.exp((table @ x[row, other]).astype(np.float64))
                found.append(scores[targets[row, place]] / scores.sum())
        losses[row, place] = -np.log(np.mean(found)) if found else 0
    return losses


def test_the_loss_is_that_of_a_loop(batch: TrainBatch) -> None:
    rng = np.random.default_rng(0)
    width = 8
    vocab = CONFIG.thinker_config.text_config.vocab_size
    x = rng.standard_normal((*batch.targets.shape, width)).astype(np.float32)
    table = rng.standard_normal((vocab, width)).astype(np.float32)
    found = np.asarray(bag_of_words_loss(jnp.asarray(x), jnp.asarray(table), batch))
    expected = loss_by_loop(x, table, batch)
    np.testing.assert_allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    # a text alone has no loss, and padding none
    assert (expected == 0).any() and (expected > 0).any()


def test_encoders_learn_and_nothing_else_is_read(batch: TrainBatch) -> None:
    model = Thinker(CONFIG.thinker_config, media_by_rows=True)
    params = {"thinker": nn.unbox(model.init(jax.random.key(0), smallest_batch(CONFIG.thinker_config))["params"])}
    objective = BagOfWords(model, CONFIG)
    paths = [path for path in flatten_params(params) if "encoder/" in path and "bos_eos" not in path]
    step = TrainStep(objective, OptimizerConfig(), dict.fromkeys(paths, 1.0), 1)
    gradients = jax.jit(lambda params: step.loss_and_gradients(TrainState(0, params, {}, None), batch))
    before = gradients(params)
    for path, gradient in flatten_params(before.gradients).items():
        if path in paths:
            assert np.abs(np.asarray(gradient)).max() > 0, path
    # the decoder's layers may be anything
    damaged = jax.tree.map(lambda leaf: leaf, params)
    damaged["thinker"]["decoder"]["layers"] = jax.tree.map(jnp.zeros_like, damaged["thinker"]["decoder"]["layers"])
    assert float(gradients(damaged).terms["loss"]) == float(before.terms["loss"])


def test_the_recipe_has_this_loss() -> None:
    recipe = RECIPES["encoders-omni-tiny"]
    objective = make_objective(recipe)
    assert isinstance(objective, BagOfWords)
    sizes = {
        path: leaf.size
        for path, leaf in flatten_params({"thinker": nn.unbox(objective.abstract_params()["thinker"])}).items()
    }
    counts = {"tokens": 100.0, "pairs": 1000.0, "blocks": 2.0}
    trained = [path for path in sizes if "encoder/" in path]
    flops = objective.count_flops(sizes, trained, counts)
    text = recipe.model.thinker_config.text_config
    silent = objective.count_flops(sizes, trained, {**counts, "blocks": 0.0})
    assert silent == 4 * text.hidden_size * text.vocab_size * 100 < flops
    longer = dataclasses.replace(recipe.data, tokens=2 * recipe.data.tokens)
    for data, factor in ((recipe.data, 1), (longer, 2)):
        held = objective.estimate_activations(data, 1, 1, 1, trained)
        words = held["probabilities of words at all positions, and their gradient"]
        assert words == factor * 2 * data.rows * recipe.data.tokens * text.vocab_size * 4
