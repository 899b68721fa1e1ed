"""Word errors: substitutions, deletions and insertions over the words that are expected.

Needs ``omni_jax[eval]``: jiwer aligns, and whisper-normalizer says which texts are the same: case, punctuation,
spelling of English, and numbers in letters or digits do not count.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jiwer
import numpy as np
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from omni_jax.errors import InputError

NUM_RESAMPLES = 1000  # of the texts, for the interval
_PERCENTILES = (2.5, 97.5)
# languages whose writing has no spaces: their characters are counted
_UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")


@dataclass(frozen=True)
class WordErrors:
    """What differs in one or more texts.

    Attributes:
      substitutions, deletions, insertions: words.
      words: that are expected.
      interval: of the rate, in which it lies with a probability of 95 %: the bootstrap over texts.
    """

    substitutions: int
    deletions: int
    insertions: int
    words: int
    interval: tuple[float, float]

    @property
    def count(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors over words; above 1 where more is wrong than there is."""
        return self.count / self.words

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"{self.rate:.1%} word errors (95 %: {low:.1%} to {high:.1%}; {self.substitutions} wrong, "
            f"{self.deletions} missing, {self.insertions} too many of {self.words})"
        )


def normalize(text: str, language: str = "en") -> str:
    """What is compared: lower case, without punctuation, numbers in digits, single spaces.

    Args:
      text: any.
      language: code of two or three letters. Where it is written without spaces, each character is a word.
    """
    return " ".join(_normalizer(language)(text).split())


@functools.cache
def _normalizer(language: str) -> Callable[[str], str]:
    if language == "en":
        return EnglishTextNormalizer()
    return BasicTextNormalizer(split_letters=language in _UNSPACED)


def count_word_errors(expected: Sequence[str], texts: Sequence[str], language: str = "en", seed: int = 0) -> WordErrors:
    """Compares texts with what is expected.

    Args:
      expected, texts: as many of each.
      language: of all texts.
      seed: of the interval's draws.

    Raises:
      InputError: if no word is expected. A text of which none is expected still counts what it has too many.
    """
    wanted = [normalize(text, language) for text in expected]
    found = [normalize(text, language) for text in texts]
    if not any(wanted):
        raise InputError("no word is expected in any text")
    counts = np.array([_count_one(*pair) for pair in zip(wanted, found, strict=True)])  # [texts, 4]
    substitutions, deletions, insertions, words = counts.sum(axis=0).tolist()
    return WordErrors(substitutions, deletions, insertions, words, _find_interval(counts, seed))


def _count_one(wanted: str, found: str) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and words of one text."""
    if not wanted:  # of which jiwer takes none
        return 0, 0, len(found.split()), 0
    counts = jiwer.process_words(wanted, found)
    return counts.substitutions, counts.deletions, counts.insertions, len(wanted.split())


def _find_interval(counts: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of the rate over texts that are drawn with replacement."""
    rng = np.random.default_rng(seed)
    drawn = counts[rng.integers(len(counts), size=(NUM_RESAMPLES, len(counts)))].sum(axis=1)  # [resamples, 4]
    has_words = drawn[:, 3] > 0
    rates = drawn[has_words, :3].sum(axis=1) / drawn[has_words, 3]
    low, high = np.percentile(rates, _PERCENTILES).tolist()
    return low, high
