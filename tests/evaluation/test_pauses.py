"""Pauses by energy and word times, on sounds that are made of known pieces."""

from __future__ import annotations

import numpy as np
import pytest

from omni_jax.evaluation.alignment import align, split_words
from omni_jax.evaluation.pauses import (
    PauseErrors,
    PauseRanges,
    count_pause_errors,
    find_silences,
    is_cut_off,
    measure_levels,
    place_silences,
)
from omni_jax.processing.spoken_text import split_text
from omni_jax.processing.word_times import Word
from tests.evaluation.renderings import RATE, Rendering, render

TOLERANCE = 0.03  # seconds: a frame has 25 ms, and words fade


def judge(text: str, rendering: Rendering, shift: float = 0.0) -> PauseErrors:
    """The errors, where the recogniser's times are so many seconds late."""
    assert rendering.transcript.words is not None
    found = [Word(word.text, word.begin + shift, word.end + shift) for word in split_words(rendering.transcript.words)]
    expected = split_text(text)
    places = align([word.text for word in expected], [word.text for word in found])
    return count_pause_errors(expected, places, place_silences(find_silences(rendering.samples, RATE), found))


def test_what_punctuation_asks_for() -> None:
    text = "“Yes.” he said - well, 3.5 twenty-one o'clock's; is it? Yes"
    words = split_text(text)
    assert [word.text for word in words] == "yes he said well 3 5 twenty one o'clock's is it yes".split()
    pauses = [word.pause for word in words]
    assert pauses == ["sentence", "none", "clause", "clause", *["none"] * 4, "clause", "none", "sentence", "none"]
    chinese = split_text("你好，世界。OK")
    assert [word.text for word in chinese] == ["你", "好", "世", "界", "ok"]
    assert [word.pause for word in chinese] == ["none", "clause", "none", "sentence", "none"]
    assert split_text(" ...") == []


def test_parts_of_a_word_share_its_time() -> None:
    (first, second) = split_words([Word(" Twenty-one,", 1.0, 2.8)])
    assert (first.text, first.begin, second.text) == ("twenty", 1.0, "one")
    assert first.end == second.begin == pytest.approx(2.2) and second.end == pytest.approx(2.8)
    assert split_words([Word("...", 0.0, 1.0)]) == []


def test_alignment() -> None:
    assert align("a b c d".split(), "a x d d".split()) in ([0, 1, None, 2], [0, None, 1, 2], [0, 1, 2, 3])
    assert align("a b c".split(), "a c".split()) == [0, None, 1]
    assert align("a b".split(), []) == [None, None] and align([], ["a"]) == []


def test_levels_and_silences() -> None:
    times = np.arange(RATE) / RATE
    tone = (0.5 * np.sin(2 * np.pi * 200 * times)).astype(np.float32)
    # a sine of amplitude 1/2 has a power of 1/8: -9.03 dB
    assert measure_levels(tone, RATE) == pytest.approx(-9.03, abs=0.01)
    assert find_silences(tone, RATE) == [] and is_cut_off(tone, RATE)
    rendering = render("one (0.4) two three (0.08) four", lead=0.2, tail=0.3)
    found = [(silence.begin, silence.end) for silence in find_silences(rendering.samples, RATE)]
    expected = [(0.0, 0.2), (0.5, 0.9), (1.5, 1.58), (1.88, 2.18)]
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - np.array(expected)).max() < TOLERANCE
    assert not is_cut_off(rendering.samples, RATE)
    assert is_cut_off(rendering.samples[: round(2.0 * RATE) - round(0.2 * RATE)], RATE)
    # nothing, and hardly anything
    zeros = np.zeros(RATE, np.float32)
    (whole,) = find_silences(zeros, RATE)
    assert (whole.begin, whole.end) == (0.0, 1.0) and not is_cut_off(zeros, RATE)
    assert find_silences(zeros[:10], RATE) == [] and not is_cut_off(zeros[:10], RATE)
    # silences do not depend on how loud the sound is
    assert find_silences(0.01 * rendering.samples, RATE) == find_silences(rendering.samples, RATE)


TEXT = "The lamp is old, and red. It is near."


@pytest.mark.parametrize(
    ("spoken", "missing", "too_long", "unexpected"),
    [
        ("the lamp is old (0.15) and red (0.4) it is near", 0, 0, 0),
        ("the lamp is old and red (0.4) it is near", 1, 0, 0),  # none at the comma
        ("the lamp is old (0.15) and red it is near", 1, 0, 0),  # none at the point
        ("the lamp is old (0.15) and red (0.07) it is near", 1, 0, 0),  # enough for a comma alone
        ("the lamp is old (0.15) and red (1.8) it is near", 0, 1, 0),
        ("the (0.5) lamp is old (0.15) and red (0.4) it is (0.4) near", 0, 0, 2),
        ("the (0.2) lamp is old (0.15) and red (0.4) it is near", 0, 0, 0),  # a hesitation that is allowed
        ("the lamp is old (0.15) and (0.4) it is near", 0, 0, 0),  # the word before the point is missing
        ("the lamp is old (0.15) and", 1, 0, 0),  # all behind it is
        ("(0.9) the lamp is old (0.15) and red (0.4) it is near (0.9)", 0, 0, 0),  # around the text
    ],
)
@pytest.mark.parametrize("shift", [0.0, 0.1, -0.09])
def test_pauses_that_are_wrong(spoken: str, missing: int, too_long: int, unexpected: int, shift: float) -> None:
    errors = judge(TEXT, render(spoken), shift)
    assert errors == PauseErrors(2, missing, too_long, unexpected)
    assert errors.rate == (missing + too_long + unexpected) / 2


def test_a_recognizer_that_counts_pauses_to_words() -> None:
    rendering = render("old (0.4) and red")
    words = [Word("old", 0.1, 0.4), Word("and", 0.4, 1.1), Word("red", 1.1, 1.4)]
    silences = place_silences(find_silences(rendering.samples, RATE), words)
    assert silences[0] == pytest.approx(0.4, abs=2 * TOLERANCE) and silences[1] == 0


def test_ranges_and_texts_without_places() -> None:
    expected = split_text("one two.")
    assert count_pause_errors(expected, [0, 1], [0.3]).rate == 1
    assert count_pause_errors(expected, [0, 1], [0.3], PauseRanges(within=0.5)).rate == 0
    assert count_pause_errors(split_text("one. two"), [None, None], []) == PauseErrors(1, 1, 0, 0)
