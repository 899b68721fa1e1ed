"""Errors of times of words, with an aligner that is known to be off."""

from __future__ import annotations

from unittest import mock

import pytest

from omni_jax.evaluation import word_time_errors
from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.word_times import Word, find_word_times
from tests.evaluation.renderings import RATE, render


class LateAligner:
    """Finds words that ``find_word_times`` finds, the first 0.1 s and the second 0.2 s later; of "no" it finds none."""

    def __init__(self, sentences: list[str]) -> None:
        (self._text,) = sentences

    def transcribe(self, samples: object, rate: int) -> Transcript:
        if self._text == "no":
            return Transcript("", ())
        sound = render("one two").samples
        words = find_word_times(self._text, sound, rate)
        shifted = zip(words, (0.1, 0.2), strict=True)
        late = [Word(word.text, word.begin + shift, word.end + shift) for word, shift in shifted]
        return Transcript(self._text, tuple(late))


def test_errors_are_medians_over_words() -> None:
    sound = render("one two").samples
    with mock.patch.object(word_time_errors, "SphinxRecognizer", LateAligner):
        errors = word_time_errors.measure_word_times(["one two", "no"], [sound, sound], RATE)
        assert word_time_errors.measure_word_times(["no"], [sound], RATE) is None
    assert errors is not None and errors.words == 2
    assert (errors.median, errors.percentile_90) == pytest.approx((0.15, 0.2))
