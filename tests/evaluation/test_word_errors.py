"""Word errors of texts that need no model."""

from __future__ import annotations

import pytest

from omni_jax.errors import InputError
from omni_jax.evaluation.word_errors import count_word_errors, normalize


def test_what_does_not_count() -> None:
    assert normalize("Two hundred BOOKS, please!") == normalize("200 books please")
    assert normalize("The colour; isn't it?") == normalize("the color is not it")
    assert normalize("Straße,  SO!", "de") == "straße so"
    assert normalize("你好。", "zh") == "你 好"
    assert count_word_errors(["Where is it? It is here."], ["where is it it is here"]).count == 0


def test_counts() -> None:
    # one wrong, one missing, one too many, of eight words
    errors = count_word_errors(["b c d e", "f g h i"], ["b x d e", "f g h  h i"])
    assert (errors.substitutions, errors.deletions, errors.insertions, errors.words) == (1, 0, 1, 8)
    assert errors.rate == pytest.approx(2 / 8)
    errors = count_word_errors(["b c d e", "f g h i"], ["b x d", "f g h i i"])
    assert (errors.substitutions, errors.deletions, errors.insertions) == (1, 1, 1)
    assert count_word_errors(["b c"], [""]).rate == 1
    # where nothing is expected, all that is there is too much
    assert count_word_errors(["b c", "."], ["b c", "d e f"]).rate == pytest.approx(3 / 2)
    with pytest.raises(InputError, match="no word is expected"):
        count_word_errors([" ?"], ["b"])
    with pytest.raises(ValueError, match="argument"):
        count_word_errors(["b", "c"], ["b"])


def test_the_interval_holds_the_rate_and_narrows() -> None:
    """Texts of four words with one error in every fifth."""
    widths = []
    for count in (20, 500):
        expected = ["b c d e"] * count
        found = ["b c d e" if number % 5 else "b c d x" for number in range(count)]
        errors = count_word_errors(expected, found)
        low, high = errors.interval
        assert low <= errors.rate <= high and errors.rate == pytest.approx(0.05)
        # of the mean of ``count`` draws that are 0.25 with probability 1/5
        expected_width = 2 * 1.96 * 0.25 * (0.2 * 0.8 / count) ** 0.5
        assert high - low == pytest.approx(expected_width, rel=0.15)
        assert errors.interval == count_word_errors(expected, found).interval  # the same seed
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert str(errors).startswith("5.0% word errors (95 %: 4.")
