"""The optimizer against torch.optim.AdamW with clip_grad_norm_, over a whole schedule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers.optimization import Adafactor

from omni_jax.training.optimizer import MOMENTS, learning_rate, make_optimizer
from omni_jax.training.recipe import OptimizerConfig

CONFIG = OptimizerConfig(learning_rate=0.05, warmup=3, weight_decay=0.2, clip=1.0)
NUM_STEPS = 10
TOLERANCE = 1e-5  # float32; and PyTorch adds 1e-6 to the norm that it clips by


def test_ten_updates() -> None:
    rng = np.random.default_rng(0)
    begin = {"kernel": rng.standard_normal((4, 3)), "bias": rng.standard_normal(3)}
    params = {"a": {name: jnp.float32(value) for name, value in begin.items()}}
    optimizer = make_optimizer(CONFIG, {"a/kernel": 1.0, "a/bias": 0.5}, NUM_STEPS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)

    theirs = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in begin.items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": CONFIG.weight_decay},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
    for count in range(NUM_STEPS):
        rate = float(learning_rate(CONFIG, count, NUM_STEPS))
        adamw.param_groups[0]["lr"] = rate
        adamw.param_groups[1]["lr"] = 0.5 * rate
        grads = {}
        for name, value in begin.items():
            grads[name] = rng.standard_normal(value.shape).astype(np.float32)
            theirs[name].grad = torch.tensor(grads[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), CONFIG.clip)
        adamw.step()
        updates, state = update({"a": grads}, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in theirs.items():
        np.testing.assert_allclose(params["a"][name], value.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)


def test_adafactor() -> None:
    """Against transformers' Adafactor with a given learning rate; a matrix is factored, a bias is not."""
    config = dataclasses.replace(CONFIG, kind="adafactor", clip=0.0, weight_decay=0.0)
    rng = np.random.default_rng(0)
    shapes = {"large": (130, 140), "bias": (130,)}
    begin = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    params = {"a": {name: jnp.float32(value) for name, value in begin.items()}}
    optimizer = make_optimizer(config, {"a/large": 1.0, "a/bias": 1.0}, NUM_STEPS)
    state = optimizer.init(params)
    assert state[MOMENTS].v_row["a"]["large"].size + state[MOMENTS].v_col["a"]["large"].size == 270
    update = jax.jit(optimizer.update)
    theirs = {name: torch.nn.Parameter(torch.tensor(value, dtype=torch.float32)) for name, value in begin.items()}
    adafactor = Adafactor(theirs.values(), lr=1.0, relative_step=False, scale_parameter=False)
    for count in range(NUM_STEPS):
        adafactor.param_groups[0]["lr"] = float(learning_rate(config, count, NUM_STEPS))
        grads = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[name])
        adafactor.step()
        updates, state = update({"a": grads}, state, params)
        params = optax.apply_updates(params, updates)
    for name, value in theirs.items():
        np.testing.assert_allclose(params["a"][name], value.detach().numpy(), rtol=TOLERANCE, atol=TOLERANCE)
