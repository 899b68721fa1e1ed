"""Pauses of speech: where its energy falls, and between which words (docs/speech-training.md, Rewards)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from omni_jax.processing.sound_levels import (
    HOP_SECONDS,
    LEAST_POWER,
    WINDOW_SECONDS,
    is_silent,
    loud_level,
    measure_levels,
)
from omni_jax.processing.spoken_text import ExpectedWord, Pause
from omni_jax.processing.word_times import Word

_LEAST_SILENCE = 0.05  # seconds; the closure of a stop is no longer than about 0.1
_EDGE = 0.03  # seconds at the end of the sound whose level says whether it was cut off
_CUT = 20.0  # dB below loud speech: above it no word has ended


@dataclass(frozen=True)
class PauseRanges:
    """How long pauses may be, in seconds.

    Attributes:
      sentence: between two sentences.
      clause: behind a comma, a semicolon, a colon and a dash.
      within: elsewhere, at most.
    """

    sentence: tuple[float, float] = (0.1, 1.5)
    clause: tuple[float, float] = (0.05, 1.0)
    within: float = 0.25


@dataclass(frozen=True)
class Silence:
    """A stretch of silence, in seconds."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class PauseErrors:
    """What is wrong with the pauses of a text.

    Attributes:
      places: where punctuation asks for a pause, but at the end of the text.
      missing: of these, those without one, or with one that is too short.
      too_long: of these.
      unexpected: pauses where nothing asks for one.
    """

    places: int
    missing: int
    too_long: int
    unexpected: int

    @property
    def rate(self) -> float:
        """Errors over places; a text without places counts as one with one."""
        return (self.missing + self.too_long + self.unexpected) / max(1, self.places)


def find_silences(samples: Float[np.ndarray, " n"], rate: int) -> list[Silence]:
    """Every stretch of at least 50 ms of frames that are 30 dB below loud speech; of silence alone, all of it."""
    levels = measure_levels(samples, rate)
    if not len(levels):
        return []
    padded = np.pad(is_silent(levels), 1)
    changes = np.flatnonzero(np.diff(padded.astype(np.int8)))
    silences = []
    for first, last in changes.reshape(-1, 2).tolist():
        # frames overlap: the stretch is silent from the first one's middle to the last one's
        begin = 0.0 if first == 0 else first * HOP_SECONDS + WINDOW_SECONDS / 2
        end = len(samples) / rate if last == len(levels) else (last - 1) * HOP_SECONDS + WINDOW_SECONDS / 2
        if end - begin >= _LEAST_SILENCE:
            silences.append(Silence(begin, end))
    return silences


def is_cut_off(samples: Float[np.ndarray, " n"], rate: int) -> bool:
    """Whether the sound ends while somebody speaks: its last 30 ms are not 20 dB below loud speech."""
    levels = measure_levels(samples, rate)
    if not len(levels):
        return False
    edge = samples[-round(_EDGE * rate) :].astype(np.float64)
    level = 10 * np.log10(max(float(np.mean(edge**2)), LEAST_POWER))
    return bool(level > loud_level(levels) - _CUT and level > 10 * np.log10(LEAST_POWER))


def place_silences(silences: Sequence[Silence], words: Sequence[Word]) -> list[float]:
    """The longest silence, in seconds, between each word and the next one.

    A silence lies between the two words whose gap is nearest to it: times of words are not exact, and many recognisers
    count a pause to one of its words. What is before the first word or behind the last one lies between none.
    """
    longest = [0.0] * max(0, len(words) - 1)
    for silence in silences:
        best = None
        best_distance = (np.inf, np.inf)
        middle = (silence.begin + silence.end) / 2
        for place in range(-1, len(words)):
            begin = 0.0 if place < 0 else words[place].end
            end = np.inf if place == len(words) - 1 else words[place + 1].begin
            begin = min(begin, end)
            outside = max(begin - silence.end, silence.begin - end, 0.0)
            # of two that it touches, that whose middle is nearer
            to_middle = abs(middle - (begin + end) / 2) if np.isfinite(end) else abs(middle - begin)
            if (outside, to_middle) < best_distance:
                best = place
                best_distance = (outside, to_middle)
        if best is not None and 0 <= best < len(longest):
            longest[best] = max(longest[best], silence.seconds)
    return longest


def count_pause_errors(
    expected: Sequence[ExpectedWord],
    places: Sequence[int | None],
    silences: Sequence[float],
    ranges: PauseRanges = PauseRanges(),
) -> PauseErrors:
    """Compares pauses with the punctuation.

    Args:
      expected: words of the text.
      places: of each the place among the words that were found, see ``align``.
      silences: behind each word that was found but the last, see ``place_silences``.
      ranges: of pauses.
    """
    counts = {"places": 0, "missing": 0, "too_long": 0}
    taken: set[int] = set()
    for number, word in enumerate(expected[:-1]):
        if word.pause == "none":
            continue
        counts["places"] += 1
        gaps = _find_gaps(places, number)
        taken.update(gaps)
        seconds = max((silences[gap] for gap in gaps), default=0.0)
        low, high = _range_of(word.pause, ranges)
        counts["missing"] += seconds < low
        counts["too_long"] += seconds > high
    unexpected = 0
    for gap, seconds in enumerate(silences):
        unexpected += gap not in taken and seconds > ranges.within
    return PauseErrors(**counts, unexpected=unexpected)


def _find_gaps(places: Sequence[int | None], number: int) -> range:
    """The gaps between words that were found in which the pause behind an expected word may lie.

    Where words beside it are missing, those are all gaps up to the next words that are not.
    """
    before = [place for place in places[: number + 1] if place is not None]
    after = [place for place in places[number + 1 :] if place is not None]
    if not before or not after:
        return range(0)
    return range(before[-1], after[0])


def _range_of(pause: Pause, ranges: PauseRanges) -> tuple[float, float]:
    return ranges.sentence if pause == "sentence" else ranges.clause
