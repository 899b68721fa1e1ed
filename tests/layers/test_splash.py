"""The TPU's attention kernel, computed step by step on the CPU, against the plain form; also over eight devices."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from omni_jax.layers.attention import Mask, attention
from omni_jax.layers.splash import kernel_fits, splash_attention
from omni_jax.sharding import make_mesh
from tests.processes import finish, start

TOLERANCE = 2e-5  # float32, sums of some hundred numbers of size one in another order


def largest_error(causal: bool) -> float:
    """Of the values and all gradients, over the largest of each."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 256, n, 16)).astype(np.float32) for n in (4, 2, 2))
    segments = np.sort(rng.integers(0, 4, (2, 256)), axis=1).astype(np.int32)
    weights = rng.standard_normal(q.shape).astype(np.float32)
    assert kernel_fits(q, causal)

    def kernel(q, k, v):
        return (splash_attention(q, k, v, segments, causal=causal, interpret=True) * weights).sum()

    def plain(q, k, v):
        return (attention(q, k, v, Mask(segments, causal)) * weights).sum()

    ours, theirs = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (kernel, plain))
    errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]
    values = np.asarray(splash_attention(q, k, v, segments, causal=causal, interpret=True))
    return float(max(*errors, np.abs(values - np.asarray(attention(q, k, v, Mask(segments, causal)))).max()))


@pytest.mark.parametrize("causal", [False, True])
def test_on_one_device(causal: bool) -> None:
    assert largest_error(causal) < TOLERANCE


@pytest.mark.long
def test_over_eight_devices() -> None:
    printed = finish(start("-m", "tests.layers.test_splash", devices=8))
    assert all(error < TOLERANCE for error in json.loads(printed)), printed


def test_lengths_that_are_no_blocks_are_left_to_the_plain_form() -> None:
    q = np.zeros((1, 200, 2, 16), np.float32)
    assert not kernel_fits(q, causal=True)
    assert not kernel_fits(q[:, :64], causal=False)
    assert kernel_fits(q[:, :128], causal=True)


if __name__ == "__main__":
    with jax.set_mesh(make_mesh(fsdp=2, sequence=2, tensor=2)):
        print(json.dumps([largest_error(causal) for causal in (False, True)]))
