"""The loss of preferences, and its gradient, against PyTorch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

from omni_jax.training.losses import token_log_probs
from omni_jax.training.objectives.talker_dpo import preference_loss

# float32 in another order of summation
TOLERANCE = 1e-5
BETA = 0.3


def test_loss_and_gradient_are_those_of_pytorch() -> None:
    """From hidden states and a head to the loss: log-probabilities of codes, their sums, and equation (1)."""
    rng = np.random.default_rng(0)
    num_pairs = 3
    length = 12
    width = 8
    vocab = 20
    hidden = rng.standard_normal((2 * num_pairs, length, width)).astype(np.float32)
    head = rng.standard_normal((width, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, (2 * num_pairs, length))
    lengths = rng.integers(4, length + 1, 2 * num_pairs)
    weights = (np.arange(length) < lengths[:, None]).astype(np.float32)
    reference = (-3.0 * lengths + rng.standard_normal(2 * num_pairs)).astype(np.float32).reshape(num_pairs, 2)

    def ours(hidden: Any, head: Any) -> Any:
        found = token_log_probs(head, hidden, targets, chunk=4).log_probs
        sums = (found * weights).sum(axis=1).reshape(num_pairs, 2)
        return preference_loss(sums, reference, BETA).losses.mean()

    loss, gradients = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(hidden, head)
    theirs = [torch.tensor(array, requires_grad=True) for array in (hidden, head)]
    logits = theirs[0] @ theirs[1]
    own = torch.log_softmax(logits, -1).gather(-1, torch.tensor(targets)[..., None])[..., 0]
    ratios = (own * torch.tensor(weights)).sum(1).reshape(num_pairs, 2) - torch.tensor(reference)
    expected = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), abs=TOLERANCE)
    for gradient, tensor in zip(gradients, theirs, strict=True):
        assert tensor.grad is not None and tensor.grad.abs().max() > 1e-3
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=0, atol=TOLERANCE)
