"""The loss in chunks against the loss of all scores at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.training.losses import next_token_loss

TOLERANCE = 1e-5  # float32 sums of some hundred numbers

B, S, D, V = 2, 24, 8, 40


@pytest.fixture
def inputs():
    rng = np.random.default_rng(0)
    head, hidden = (rng.standard_normal(shape).astype(np.float32) for shape in ((D, V), (B, S, D)))
    return head, hidden, rng.integers(0, V, (B, S)), rng.random((B, S)).astype(np.float32)


def whole(head, hidden, targets, weights, z_loss):
    scores = hidden @ head
    normaliser = jax.nn.logsumexp(scores, axis=-1)
    plain = normaliser - jnp.take_along_axis(scores, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * (plain + z_loss * normaliser**2)), weights * plain


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [24, 8, 1])
def test_value_and_gradients(inputs, chunk, z_loss) -> None:
    head, hidden, targets, weights = inputs

    def ours(head, hidden):
        return next_token_loss(head, hidden, targets, weights, chunk=chunk, z_loss=z_loss)

    expected = whole(*inputs, z_loss)
    found = ours(head, hidden)  # without a gradient
    np.testing.assert_allclose(found.total, expected[0], rtol=TOLERANCE)
    np.testing.assert_allclose(found.cross_entropy, expected[1], rtol=TOLERANCE, atol=1e-6)
    found = jax.jit(jax.value_and_grad(lambda *a: 3 * ours(*a).total, (0, 1)))(head, hidden)
    theirs = jax.value_and_grad(lambda *a: 3 * whole(*a, targets, weights, z_loss)[0], (0, 1))(head, hidden)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(theirs), strict=True):
        assert np.abs(a - b).max() < TOLERANCE * np.abs(b).max()


def test_no_scores_of_all_positions_exist(inputs) -> None:
    head, hidden, targets, weights = inputs

    def text(chunk):
        loss = jax.grad(lambda h, x: next_token_loss(h, x, targets, weights, chunk=chunk).total, (0, 1))
        return jax.jit(loss).lower(head, hidden).as_text()

    assert f"tensor<{B}x1x{S}x{V}xf32>" in text(S)
    assert f"x{S}x{V}xf32>" not in text(8)


def test_a_frozen_head_gets_no_gradient(inputs) -> None:
    head, hidden, targets, weights = inputs
    loss = jax.grad(lambda h, x: next_token_loss(h, x, targets, weights, chunk=8, head_trains=False).total, (0, 1))
    by_head, by_hidden = loss(head, hidden)
    assert not np.any(by_head)
    theirs = jax.grad(lambda x: whole(head, x, targets, weights, 0.0)[0])(hidden)
    assert np.abs(by_hidden - theirs).max() < TOLERANCE * np.abs(theirs).max()
