"""When each word of a text is spoken, from the sound and the text alone.

No recogniser and no weights are needed, so it works with any voice and checkpoint. A path through the frames of the
sound gives each word a stretch: words last as long as their spelling lets expect, at the pace of this speech; there is
silence between them rather than within them, and rather where punctuation asks for a pause. The cheapest path is found
by dynamic programming, as Viterbi's alignment finds that of a hidden Markov model with durations. docs/usage.md has
how far it is from a recogniser's alignment.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.lib.stride_tricks import sliding_window_view

from omni_jax.processing.sound_levels import HOP_SECONDS, WINDOW_SECONDS, is_silent, measure_levels
from omni_jax.processing.spoken_text import ExpectedWord, split_text

# costs, as negative logarithms of probabilities
_SPREAD = 0.4  # standard deviation of the logarithm of how long words take
_SILENT_IN_WORD = 0.5  # of a frame: stops have some
_LOUD_IN_PAUSE = 1.0  # of a frame
_PAUSE = {"none": 1.0, "clause": 0.2, "sentence": 0.2}  # that there is one
_LONGER_PAUSE = {"none": 0.1, "clause": 0.0, "sentence": 0.0}  # of each of its frames
_NO_PAUSE = {"none": 0.0, "clause": 0.5, "sentence": 2.0}
_LONGEST = 3.0  # of how long a word is expected to take
_LEAST_LIMIT = 8  # frames, of what that gives
_MOST_LIMIT = 500
# frames that a word may be away from where the pace lets expect it: 5 s, and of long speech a tenth
_LEAST_BAND = 500
_BAND_OF_SPEECH = 0.1
# how long words take, in consonants; a letter of writing without spaces is a syllable
_VOWELS = re.compile("[aeiouy]+")
_CONSONANTS = re.compile("[b-df-hj-np-tv-xz]")
_OTHER_LETTER = 3.0  # of writing that is not Latin
_DIGIT = 4.0


@dataclass(frozen=True)
class Word:
    """A word and when it is spoken.

    Attributes:
      text: maybe with punctuation.
      begin, end: seconds.
      probability: that a recogniser gives it; None if it gives none, or none was asked.
    """

    text: str
    begin: float
    end: float
    probability: float | None = None


def find_word_times(text: str, samples: Float[np.ndarray, " n"], rate: int) -> tuple[Word, ...]:
    """The words of a text and when a sound speaks them.

    Args:
      text: all that is spoken, and nothing else.
      samples: mono, from -1 to 1.
      rate: samples a second.

    Returns:
      Words as the text has them, with the punctuation behind each, in its order; none where it has no word or the sound
      is shorter than a frame of 25 ms.
    """
    words = split_text(text)
    levels = measure_levels(samples, rate)
    if not words or not len(levels):
        return ()
    bounds = _align(words, levels)
    # a frame is of 25 ms: what begins with it is heard from its middle on
    seconds = np.clip(bounds * HOP_SECONDS + WINDOW_SECONDS / 2, 0, len(samples) / rate)  # [W, 2]
    found = []
    for number, (begin, end) in enumerate(seconds.tolist()):
        first = words[number].begin if number else 0  # what stands before the first word goes with it
        last = words[number + 1].begin if number + 1 < len(words) else len(text)
        found.append(Word(text[first:last].strip(), begin, end))
    return tuple(found)


def _align(words: Sequence[ExpectedWord], levels: Float[np.ndarray, " T"]) -> Int[np.ndarray, "W 2"]:
    """The first frame of each word and the one behind its last."""
    silent = is_silent(levels)
    silent_before = np.concatenate([[0], np.cumsum(silent)])  # [T + 1]
    loud_before = np.arange(len(levels) + 1) - silent_before  # [T + 1]
    weights = np.array([_weigh(word.text) for word in words])
    # fewer frames than words, or silence alone: nothing but the spelling says when
    if len(levels) < len(words) or not loud_before[-1]:
        ends = np.round(np.cumsum(weights) / weights.sum() * len(levels)).astype(int)
        return np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    expected = weights * loud_before[-1] / weights.sum()  # frames of each
    bounds = _find_path(words, expected, silent_before, loud_before)
    # pauses are told from words now, and so is the pace
    lengths = bounds[:, 1] - bounds[:, 0]
    return _find_path(words, weights * lengths.sum() / weights.sum(), silent_before, loud_before)


def _weigh(word: str) -> float:
    """How long a word of lower case takes, in consonants."""
    plain = "".join(unicodedata.normalize("NFD", character)[0] for character in word)  # letters without their accents
    vowels = _VOWELS.findall(plain)
    # "e" at the end of a word of several syllables is mostly not spoken
    num_vowels = len(vowels) - (len(vowels) > 1 and vowels[-1] == "e" and word.endswith("e"))
    num_consonants = len(_CONSONANTS.findall(plain))
    num_digits = sum(character.isdigit() for character in plain)
    num_other = sum(character.isalpha() and not character.isascii() for character in plain)
    return 1 + num_vowels + num_consonants + _DIGIT * num_digits + _OTHER_LETTER * num_other


def _find_path(
    words: Sequence[ExpectedWord],
    expected: Float[np.ndarray, " W"],
    silent_before: Int[np.ndarray, " T+1"],
    loud_before: Int[np.ndarray, " T+1"],
) -> Int[np.ndarray, "W 2"]:
    """The cheapest path, on which each word ends near where the pace lets expect it."""
    num_frames = len(silent_before) - 1
    band = _LEAST_BAND + round(_BAND_OF_SPEECH * num_frames)
    places = np.arange(num_frames + 1)
    # where so much of the loud frames has passed as of what is expected
    passed = np.cumsum(expected) / expected.sum() * loud_before[-1]
    centres = np.searchsorted(loud_before, passed)
    begin_cost = _LOUD_IN_PAUSE * loud_before  # [T + 1], of beginning the next word at a frame
    word_begins = []
    next_begins = []
    for number, word in enumerate(words):
        # at least a frame for each word before and behind
        first = max(int(centres[number]) - band, number + 1)
        last = min(max(int(centres[number]) + band, first), num_frames - (len(words) - 1 - number))
        end_cost, lengths = _end_word(begin_cost, silent_before, float(expected[number]), min(first, last), last)
        word_begins.append(places - lengths)
        # the next word begins at once, or after a pause from the cheapest place on
        in_pause = _LOUD_IN_PAUSE * loud_before + _LONGER_PAUSE[word.pause] * places  # [T + 1]
        without = end_cost - in_pause
        cheapest = np.minimum.accumulate(without)
        source = np.maximum.accumulate(np.where(without <= cheapest, places, 0))
        with_pause = cheapest + _PAUSE[word.pause] + in_pause
        at_once = end_cost + _NO_PAUSE[word.pause]
        pauses = with_pause < at_once
        next_begins.append(np.where(pauses, source, places))
        begin_cost = np.where(pauses, with_pause, at_once)
    # what is behind the last word is a pause, whose beginning costs nothing
    end = int(np.argmin(end_cost + _LOUD_IN_PAUSE * (loud_before[-1] - loud_before)))
    bounds = np.empty((len(words), 2), int)
    for number in range(len(words) - 1, -1, -1):
        begin = int(word_begins[number][end])
        bounds[number] = begin, end
        end = int(next_begins[number - 1][begin]) if number else 0
    return bounds


def _end_word(
    begin_cost: Float[np.ndarray, " T+1"],
    silent_before: Int[np.ndarray, " T+1"],
    expected: float,
    first: int,
    last: int,
) -> tuple[Float[np.ndarray, " T+1"], Int[np.ndarray, " T+1"]]:
    """The cost of ending a word at each frame from ``first`` to ``last``, and its length then."""
    longest = min(max(round(_LONGEST * expected), _LEAST_LIMIT), _MOST_LIMIT)
    lengths = np.arange(longest, 0, -1)
    of_length = np.log(lengths / max(expected, 1.0)) ** 2 / (2 * _SPREAD**2)  # [longest]
    # costs of beginnings, the longest word's first; before the sound none begins
    padded = np.concatenate([np.full(longest, np.inf), begin_cost - _SILENT_IN_WORD * silent_before])
    begins = sliding_window_view(padded, longest)[first : last + 1] + of_length  # [last + 1 - first, longest]
    best = np.argmin(begins, axis=1)
    cost = np.full(len(begin_cost), np.inf)
    cost[first : last + 1] = np.min(begins, axis=1) + _SILENT_IN_WORD * silent_before[first : last + 1]
    chosen = np.ones(len(begin_cost), int)
    chosen[first : last + 1] = lengths[best]
    return cost, chosen
