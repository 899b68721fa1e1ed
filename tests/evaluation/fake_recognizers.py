"""Recognisers of the tests, called by name as a user's are."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_jax.evaluation.transcripts import Transcript, Word


def hear_two_words(samples: np.ndarray, rate: int) -> Transcript:
    seconds = len(samples) / rate
    return Transcript("two words", (Word("two", 0.0, seconds / 2, 0.9), Word("words", seconds / 2, seconds)))


def hear_plain_text(samples: np.ndarray, rate: int) -> str:
    return f"{len(samples)} samples at {rate}"


def hear_object(samples: np.ndarray, rate: int) -> dict[str, Any]:
    return {"words": [{"text": "yes", "begin": 0.1, "end": 0.2}, {"text": "no", "begin": 0.2, "end": 0.3}]}


def crash(samples: np.ndarray, rate: int) -> Transcript:
    raise RuntimeError("out of memory")


def hear_none(samples: np.ndarray, rate: int) -> None:
    return None


def hear_late_word(samples: np.ndarray, rate: int) -> Transcript:
    return Transcript("late", (Word("late", 0.0, len(samples) / rate + 1),))


def hear_disorder(samples: np.ndarray, rate: int) -> Transcript:
    return Transcript("a b", (Word("a", 0.2, 0.3), Word("b", 0.1, 0.2)))


def hear_nan(samples: np.ndarray, rate: int) -> Transcript:
    return Transcript("a", (Word("a", float("nan"), 0.3),))


def hear_words_without_text(samples: np.ndarray, rate: int) -> Transcript:
    return Transcript(" ", (Word("a", 0.1, 0.3),))


NO_FUNCTION = 3
