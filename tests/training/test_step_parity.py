"""The loss of a row and the gradients of all parameters against PyTorch, float32, over rows of every kind."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.data.examples import make_example
from omni_jax.models.thinker import Thinker
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.options import NextTokenOptions
from omni_jax.training.recipe import OptimizerConfig
from omni_jax.training.step import TrainState, TrainStep
from tests.conftest import MODELS
from tests.pairs import Pair
from tests.training.examples import KINDS, make_batch, make_prompt, torch_arguments, weights_of

TOLERANCE = 1e-4  # float32 sums in another order, through a few layers and back
# of the largest gradient of all: where a parameter's own is smaller, it is noise that is compared with noise
FLOOR = 1e-3
# one of the three is enough for what is more than the forward pass: seven queries a key, as the published 7B has
pytestmark = pytest.mark.parametrize("pair", [MODELS[1]], ids=["seven"], indirect=True)


@pytest.fixture(scope="module")
def gradients(pair: Pair):
    model = Thinker(pair.config.thinker_config, remat="full")
    params = {"thinker": pair.params}
    objective = NextToken(model, pair.config, NextTokenOptions(chunk=32))
    step = TrainStep(objective, OptimizerConfig(), dict.fromkeys(flatten_params(params), 1.0), 1)
    state = TrainState(0, params, {}, None)
    return jax.jit(lambda batch: step.loss_and_gradients(state, batch))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(pair: Pair, gradients, kind: str) -> None:
    rng = np.random.default_rng(5)
    prompt = make_prompt(kind, pair.config, rng)
    weights = weights_of(prompt, rng)
    example = make_example(prompt, weights, kind, pair.config)
    found = gradients(make_batch([example], pair.config))
    terms = found.terms
    grads = found.gradients

    pair.torch.zero_grad()
    out = pair.torch(**torch_arguments(prompt, weights))
    out.loss.backward()
    theirs = {f"thinker.{name}": p.grad for name, p in pair.torch.named_parameters()}
    assert abs(float(terms["loss"]) - out.loss.item()) < TOLERANCE * out.loss.item()
    ours = flatten_params(grads)
    largest = max(float(np.abs(g).max()) for g in ours.values())
    seen = 0
    for entry in make_name_table(pair.config, ["thinker"]):
        layers = [theirs[name] for name in entry.names]
        arrays = [np.zeros(entry.shape) if g is None else g.numpy() for g in layers]
        leaves = [entry.to_jax(g) for g in arrays]
        expected = np.stack(leaves) if entry.stacked else leaves[0]
        scale = max(np.abs(expected).max(), FLOOR * largest)
        path = "/".join(entry.path)
        assert np.abs(np.asarray(ours[path]) - expected).max() < TOLERANCE * scale, path
        seen += bool(np.abs(expected).max() > FLOOR * largest)
    assert seen > 10
