"""The requests of ``bench.py batch``. Nothing here imports JAX or PyTorch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.latency_figures import CODES_A_SECOND, TOKENS_A_SECOND

VOICE = "Chelsie"


@dataclass(frozen=True)
class Dialogue:
    """One request: a question of so many words, and how long its reply is."""

    question: str
    tokens: int
    codes: int


def make_dialogues(count: int, seconds: Sequence[int], seed: int = 0) -> tuple[Dialogue, ...]:
    """Questions of 2 to 40 words, with replies of these lengths in turn."""
    rng, words = random.Random(seed), "what do you hear and see when the rain falls over a town".split()
    made = []
    for i in range(count):
        question = " ".join(rng.choices(words, k=rng.randint(2, 40)))
        length = seconds[i % len(seconds)]
        made.append(Dialogue(question, TOKENS_A_SECOND * length, CODES_A_SECOND * length))
    return tuple(made)
