"""How much codes say of who speaks."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.errors import InputError
from omni_jax.evaluation.speaker_probe import SpeakerProbe


def make_utterances(rng: np.random.Generator, count: int, shift: int) -> tuple[list[np.ndarray], list[str]]:
    """Utterances of two speakers, whose codes lie ``shift`` apart."""
    codes = []
    speakers = []
    for number in range(count):
        first = shift if number % 2 else 0
        codes.append(first + rng.integers(20, size=30))
        speakers.append("Ben" if number % 2 else "Ada")
    return codes, speakers


@pytest.mark.parametrize(("shift", "low", "high"), [(0, 0.3, 0.7), (8, 0.95, 1.0)])
def test_it_tells_speakers_whose_codes_differ(shift: int, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    probe = SpeakerProbe(*make_utterances(rng, 100, shift), num_codes=32)
    accuracy = probe.accuracy(*make_utterances(rng, 200, shift))
    assert low <= accuracy <= high


def test_what_cannot_be_probed() -> None:
    codes = [np.array([1, 2]), np.array([3])]
    with pytest.raises(InputError, match="two speakers at least, and there are 1"):
        SpeakerProbe(codes, ["Ada", "Ada"], 4)
    with pytest.raises(InputError, match="codes are 1 to 2; the codebook has 0 to 1"):
        SpeakerProbe(codes, ["Ada", "Ben"], 2)
    with pytest.raises(InputError, match="no utterance"):
        SpeakerProbe(codes, ["Ada", "Ben"], 4).accuracy([], [])
