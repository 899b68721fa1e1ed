"""Groups of parameters, the schedule, and the chain of optax against AdamW as its paper writes it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omni_jax.errors import ConfigError
from omni_jax.training.optimizer import (
    MOMENTS,
    learning_rate,
    learning_rate_scales,
    make_optimizer,
    merge_params,
    split_params,
)
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

PATHS = ["audio_encoder/proj/kernel", "audio_encoder/proj/bias", "decoder/norm/scale", "decoder/head/kernel"]
CONFIG = OptimizerConfig(learning_rate=0.1, warmup=2, final_fraction=0.5, weight_decay=0.3, clip=0.7)
NUM_STEPS = 5
SCALES = {"a/kernel": 1.0, "a/bias": 0.25}
DECAYS = {"a/kernel": True, "a/bias": False}


def test_the_first_group_counts_and_the_rest_is_frozen() -> None:
    groups = (ParameterGroup(".*/bias", 0.5), ParameterGroup("audio_encoder/.*"), ParameterGroup(".*scale", 2.0))
    assert learning_rate_scales(Phase("p", groups), PATHS) == {PATHS[0]: 1.0, PATHS[1]: 0.5, PATHS[2]: 2.0}


@pytest.mark.parametrize(("paths", "message"), [("audio", "'audio'; paths: audio_encoder"), ("(", "no regular")])
def test_a_group_of_nothing(paths: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rate_scales(Phase("p", (ParameterGroup(paths),)), PATHS)


def test_the_schedule() -> None:
    rates = [float(learning_rate(CONFIG, jnp.int32(i), 12)) for i in range(13)]
    assert rates[0] > 0 and rates[2] == pytest.approx(0.1) and max(rates) == rates[2]
    assert rates[7] == pytest.approx(0.075) and rates[12] == pytest.approx(0.05)  # halfway, and at the end
    long_warmup = dataclasses.replace(CONFIG, warmup=100)
    short = [float(learning_rate(long_warmup, jnp.int32(i), 3)) for i in range(3)]
    assert short == sorted(short) and short[-1] == pytest.approx(0.1)  # a warm-up longer than the run ends with it


def paper_adamw(
    params: dict[str, np.ndarray], moments: dict[str, Any], grads: dict[str, np.ndarray], count: int, clip: float
) -> None:
    """One update in place, in float64; ``moments`` has first and second moment by path."""
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    scale = min(1.0, clip / norm) if clip else 1.0
    rate = float(learning_rate(CONFIG, count, NUM_STEPS))
    for path, grad in grads.items():
        first, second = moments.setdefault(path, [np.zeros_like(grad), np.zeros_like(grad)])
        first[:] = CONFIG.b1 * first + (1 - CONFIG.b1) * grad * scale
        second[:] = CONFIG.b2 * second + (1 - CONFIG.b2) * (grad * scale) ** 2
        mean = first / (1 - CONFIG.b1 ** (count + 1))
        variance = second / (1 - CONFIG.b2 ** (count + 1))
        direction = mean / (np.sqrt(variance) + CONFIG.eps) + DECAYS[path] * CONFIG.weight_decay * params[path]
        params[path] -= rate * SCALES[path] * direction


@pytest.mark.parametrize(("clip", "first_moment"), [(0.7, "float32"), (0.0, "float32"), (0.7, "bfloat16")])
def test_updates_are_those_of_the_paper(clip: float, first_moment: Any) -> None:
    """Gradients over the limit and under it, a parameter that does not decay, a group with a factor of its own."""
    rng = np.random.default_rng(0)
    expected = {"a/kernel": rng.standard_normal((3, 4)), "a/bias": rng.standard_normal(4)}
    config = dataclasses.replace(CONFIG, clip=clip, first_moment=first_moment)
    optimizer = make_optimizer(config, SCALES, NUM_STEPS)
    # bfloat16 has 8 bits: an update, up to 0.1 of rate, is off by up to 1/256 of it
    tolerance = dict(rtol=1e-5, atol=1e-6) if first_moment == "float32" else dict(rtol=0, atol=4 * 0.1 / 256)
    params = {"a": {"kernel": jnp.float32(expected["a/kernel"]), "bias": jnp.float32(expected["a/bias"])}}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    moments: dict[str, Any] = {}
    for count in range(4):
        size = 0.01 if count == 1 else 1.0
        grads = {path: size * rng.standard_normal(leaf.shape) for path, leaf in expected.items()}
        tree = {"a": {"kernel": jnp.float32(grads["a/kernel"]), "bias": jnp.float32(grads["a/bias"])}}
        updates, state = update(tree, state, params)
        params = optax.apply_updates(params, updates)
        paper_adamw(expected, moments, grads, count, clip)
        np.testing.assert_allclose(params["a"]["kernel"], expected["a/kernel"], **tolerance)
        np.testing.assert_allclose(params["a"]["bias"], expected["a/bias"], **tolerance)
    assert all(leaf.dtype == first_moment for leaf in jax.tree.leaves(state[MOMENTS].mu))


def test_split_and_merge() -> None:
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    selected, others = split_params(tree, {"a/b", "d"})
    assert (selected, others) == ({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    assert merge_params(selected, others) == merge_params(others, selected) == tree
    assert merge_params(*split_params(tree, ())) == tree
