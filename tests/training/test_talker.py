"""The Talker's first objective: what it trains on is what inference computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.training.spoken import QUESTIONS, Speaker, Spoken, load_params, make_objective, pack

# float32 in two orders of summation: whole rows at once, and one position at a time with a cache
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    return load_params(tiny_model)


@pytest.fixture(scope="module")
def spoken(tiny_model: Path) -> dict[str, Spoken]:
    """What the engine says to each kind of question."""
    speaker = Speaker(tiny_model)
    return {kind: speaker.speak(kind) for kind in QUESTIONS}


@pytest.fixture(scope="module")
def trained(spoken: dict[str, Spoken], params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-probabilities of all target codes, of all of them in one batch of two rows."""
    objective = make_objective()
    batch, part = pack([found.example for found in spoken.values()])
    assert {placed.row for placed in part.placed} == {0, 1}

    @jax.jit
    def log_probs(params: Any, batch: Any) -> Any:
        return objective.code_log_probs(params, objective.run_models(params, batch, ()), batch).log_probs

    found = np.asarray(log_probs(params, batch))
    by_name = {}
    for placed in part.placed:
        own = (batch.segment_ids[placed.row] == placed.utterance + 1) & (batch.weights[placed.row] > 0)
        by_name[placed.example.name] = found[placed.row][own]
    return by_name


@pytest.mark.parametrize("kind", QUESTIONS)
def test_training_has_the_log_probabilities_of_inference(
    kind: str, spoken: dict[str, Spoken], trained: dict[str, np.ndarray]
) -> None:
    """Of every code and of the end; "clip" is a voice that a clip gives (zero-shot)."""
    np.testing.assert_allclose(trained[kind], spoken[kind].log_probs, rtol=0, atol=TOLERANCE)
