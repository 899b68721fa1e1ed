"""Groups of parameters, the schedule, and AdamW against optax's own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from omni_jax.errors import ConfigError
from omni_jax.training.optimizer import adam, learning_rate, merge, rates, split, update
from omni_jax.training.recipe import Group, Optimizer, Phase

PATHS = ["audio_encoder/proj/kernel", "audio_encoder/proj/bias", "decoder/norm/scale", "decoder/head/kernel"]
CONFIG = Optimizer(learning_rate=0.1, warmup=2, final_share=0.5, weight_decay=0.3, clip=0.7)


def test_the_first_group_counts_and_the_rest_is_frozen() -> None:
    phase = Phase("p", (Group(".*/bias", 0.5), Group("audio_encoder/.*"), Group(".*scale", 2.0)))
    assert rates(phase, PATHS) == {PATHS[0]: 1.0, PATHS[1]: 0.5, PATHS[2]: 2.0}


@pytest.mark.parametrize(("paths", "message"), [("audio", "'audio'; paths: audio_encoder"), ("(", "no regular")])
def test_a_group_of_nothing(paths: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rates(Phase("p", (Group(paths),)), PATHS)


def test_the_schedule() -> None:
    found = [float(learning_rate(CONFIG, jnp.int32(i), 12)) for i in range(13)]
    assert found[0] > 0 and found[2] == pytest.approx(0.1) and max(found) == found[2]
    assert found[7] == pytest.approx(0.075) and found[12] == pytest.approx(0.05)  # halfway, and at the end
    short = [float(learning_rate(dataclasses.replace(CONFIG, warmup=100), jnp.int32(i), 3)) for i in range(3)]
    assert short == sorted(short) and short[-1] == pytest.approx(0.1)  # a warm-up longer than the run ends with it


def test_an_update_is_that_of_optax() -> None:
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.standard_normal((3, 4)), "bias": rng.standard_normal(4)}}
    params = jax.tree.map(jnp.float32, params)
    theirs = optax.chain(
        optax.clip_by_global_norm(0.7),
        optax.adamw(
            lambda count: learning_rate(CONFIG, count, 5),
            b1=CONFIG.b1,
            b2=CONFIG.b2,
            weight_decay=0.3,
            mask={"a": {"kernel": True, "bias": False}},
        ),
    )
    state, moments, expected = theirs.init(params), adam(CONFIG).init(params), params
    for _ in range(4):
        grads = jax.tree.map(lambda x: jnp.float32(rng.standard_normal(x.shape)), params)
        params, moments, told = update(CONFIG, grads, moments, params, rates={"a/kernel": 1.0, "a/bias": 1.0}, steps=5)
        changes, state = theirs.update(grads, state, expected)
        expected = optax.apply_updates(expected, changes)
        assert float(told["grad_norm"]) == pytest.approx(float(optax.tree.norm(grads)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


def test_rates_of_groups() -> None:
    params = {"a": {"bias": jnp.ones(2)}, "b": {"bias": jnp.ones(2)}}
    made, _, _ = update(
        CONFIG, params, adam(CONFIG).init(params), params, rates={"a/bias": 1.0, "b/bias": 0.25}, steps=5
    )
    np.testing.assert_allclose(4 * (1 - made["b"]["bias"]), 1 - made["a"]["bias"], rtol=1e-5)


def test_split_and_merge() -> None:
    tree = {"a": {"b": 1, "c": 2}, "d": 3}
    ours, others = split(tree, {"a/b", "d"})
    assert (ours, others) == ({"a": {"b": 1}, "d": 3}, {"a": {"c": 2}})
    assert merge(ours, others) == merge(others, ours) == tree
    assert merge(*split(tree, ())) == tree
