"""Recognisers of the tests, called by name as a user's are."""

from __future__ import annotations

from typing import Any

import numpy as np

from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.word_times import Word


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

COUNTED = "red blue green white".split()
_calls = 0


def hear_some_of_four(samples: np.ndarray, rate: int) -> Transcript:
    """More of the four words the more samples there are, up to all; evenly spread over the sound."""
    count = min(4, len(samples) // 5_000)
    width = len(samples) / rate / max(1, count)
    words = tuple(Word(text, place * width, (place + 1) * width) for place, text in enumerate(COUNTED[:count]))
    return Transcript(" ".join(word.text for word in words), words)


def crash_the_third_time(samples: np.ndarray, rate: int) -> Transcript:
    global _calls
    _calls += 1
    if _calls == 3:
        raise RuntimeError("out of memory")
    return hear_some_of_four(samples, rate)
