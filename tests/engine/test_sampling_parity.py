"""The sampler against transformers' logits processors."""

from __future__ import annotations

import jax
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from omni_jax.engine.sampling import SamplingParams, _penalize, filter_logits, make_sampling_state

VOCAB = 50
# probabilities of a softmax over 50 numbers, float32 on both sides
TOLERANCE = 1e-6


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(1, 60),
    top_p=st.floats(0.01, 1),
    penalty=st.floats(0.5, 2),
)
def test_probabilities(seed: int, temperature: float, top_k: int, top_p: float, penalty: float) -> None:
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((2, VOCAB))).astype(np.float32)
    prompts = [rng.integers(0, VOCAB, 6), rng.integers(0, VOCAB, 6)]
    chain = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])
    scores = LogitsProcessorList(chain)(torch.tensor(np.stack(prompts)), torch.tensor(logits))
    theirs = scores.softmax(-1).numpy()

    rows = [SamplingParams(temperature, top_k, top_p, penalty)] * 2
    state = make_sampling_state(rows, prompts, VOCAB)
    kept = filter_logits(_penalize(logits, state) / np.float32(temperature), state.top_k, state.top_p)
    ours = np.asarray(jax.nn.softmax(kept, axis=-1))
    # a token whose cumulative probability lies on the edge of top_p may fall on either side
    assert np.abs(ours - theirs).max() < TOLERANCE or _on_the_edge(logits, prompts, rows[0])


def _on_the_edge(logits: np.ndarray, prompts: list[np.ndarray], s: SamplingParams) -> bool:
    state = make_sampling_state([s] * 2, prompts, VOCAB)
    warm = np.asarray(_penalize(logits, state), np.float64) / s.temperature
    ranked = -np.sort(-warm, axis=-1)[:, : s.top_k]
    p = np.exp(ranked - ranked[:, :1])
    p /= p.sum(-1, keepdims=True)
    return bool(np.abs(np.cumsum(p, axis=-1) - p - s.top_p).min() < 1e-6)
