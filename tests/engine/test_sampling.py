"""The sampler: what a draw depends on, and what the settings must be."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from omni_jax.engine.sampling import SamplingParams, filter_logits, make_sampling_state, sample
from omni_jax.errors import InputError

VOCAB = 40


def draw(rows: list[SamplingParams], logits: np.ndarray, steps: int = 5) -> np.ndarray:
    """[rows, steps]; the same logits at each step."""
    state = make_sampling_state(rows, [np.array([1, 2])] * len(rows), VOCAB)
    out = []
    for _ in range(steps):
        tokens, state = jax.jit(sample)(logits, state, np.ones(len(rows), bool))
        out.append(tokens)
    return np.stack(out, axis=1)


def random_logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, VOCAB)).astype(np.float32)


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    rows = [
        SamplingParams(1.0, seed=3),
        SamplingParams(0.0),
        SamplingParams(0.7, 5, 0.9, 1.2, seed=9),
        SamplingParams(1.0, seed=4),
    ]
    logits = random_logits(4)
    together = draw(rows, logits)
    for i, row in enumerate(rows):
        assert np.array_equal(together[i], draw([row], logits[i : i + 1])[0])


def test_seeds_and_steps_differ() -> None:
    logits = np.repeat(random_logits(1), 2, axis=0)
    a, b = draw([SamplingParams(1.5, seed=0), SamplingParams(1.5, seed=1)], logits, steps=20)
    assert not np.array_equal(a, b)
    assert len(set(a.tolist())) > 1


def test_a_row_that_stands_still_draws_nothing() -> None:
    """What it would have drawn comes later, and counts for no penalty before."""
    logits, rows = random_logits(2), [SamplingParams(1.0, repetition_penalty=1.5, seed=4)] * 2
    state = make_sampling_state(rows, [np.array([1])] * 2, VOCAB)
    _, after = sample(logits, state, np.array([True, False]))
    assert after.step.tolist() == [1, 0]
    assert np.array_equal(after.seen[1], state.seen[1]) and not np.array_equal(after.seen[0], state.seen[0])


def test_temperature_zero_takes_the_most_probable() -> None:
    logits = random_logits(3)
    assert np.array_equal(draw([SamplingParams()] * 3, logits)[:, 0], logits.argmax(-1))


def test_repetition_penalty_sees_prompt_and_reply() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [1, 7, 8]] = 3.0, 2.9, 2.8  # 1 is in the prompt
    assert draw([SamplingParams(repetition_penalty=1.5)], logits, steps=2)[0].tolist() == [7, 8]


def test_where_few_tokens_are_ranked_what_is_kept_is_the_same() -> None:
    """Also where more tokens tie with the last of the top k than are ranked, and whatever the other rows ask for."""
    rng, vocab = np.random.default_rng(3), 300
    given = rng.standard_normal((7, vocab)).astype(np.float32)
    given[1, :200], given[2, :63], given[3] = 4.0, 4.0, 1.0
    top_k = np.array([40, 5, 5, 7, 64, 65, 300], np.int32)
    top_p = np.array([0.8, 1.0, 1.0, 1.0, 0.99, 0.9, 0.5], np.float32)
    kept = np.isfinite(filter_logits(given, top_k, top_p))
    for row, k, p, mine in zip(given.astype(float), top_k, top_p, kept, strict=True):
        inside = row >= np.sort(row)[-k]
        share = np.where(inside, np.exp(row), 0) / np.exp(row[inside]).sum()
        likelier = np.array([share[row > x].sum() for x in row])
        wanted = inside & (likelier < p if p < 1 else True)
        assert np.array_equal(mine, wanted)
    assert [int(n) for n in kept.sum(axis=1)[1:4]] == [200, 63, 300]
    for i in range(len(given)):
        alone = filter_logits(given[i : i + 1], top_k[i : i + 1], top_p[i : i + 1])
        assert np.array_equal(np.isfinite(alone)[0], kept[i])


def test_draws_follow_the_probabilities() -> None:
    """4,000 draws from three tokens, each within five standard deviations of its share."""
    p = np.array([0.6, 0.3, 0.1])
    logits = np.full((4000, VOCAB), -50.0, np.float32)
    logits[:, :3] = np.log(p)
    counts = np.bincount(draw([SamplingParams(1.0, seed=i) for i in range(4000)], logits, steps=1)[:, 0], minlength=3)
    assert np.all(np.abs(counts / 4000 - p) < 5 * np.sqrt(p * (1 - p) / 4000))


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("temperature", -0.1, "at least 0"),
        ("top_k", -1, "from 0 to 2147483647"),
        ("top_k", 3 * 10**9, "from 0 to 2147483647"),
        ("top_k", 1.5, "a whole number"),
        ("top_k", True, "a whole number"),
        ("temperature", 1e400, "at most 100"),
        ("temperature", "1", "a number"),
        ("top_p", 1e-60, "above 0"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.5, "above 0 and at most 1"),
        ("repetition_penalty", 0.0, "at least 0.01"),
        ("seed", 2**32, "from 0 to 4294967295"),
    ],
)
def test_a_setting_out_of_range(field: str, value: float, limit: str) -> None:
    with pytest.raises(InputError, match=f"{field} is {value!r}.*{limit}"):
        SamplingParams(**{field: value})
