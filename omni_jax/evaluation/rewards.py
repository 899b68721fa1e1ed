"""Rewards of spoken answers: words, pauses, an end that is whole, and no repetition.

The definitions stand in docs/speech-training.md, section Rewards. Word errors and pauses are what the paper ranks by
(Qwen2.5-Omni, section 2.4); the rest are the failures that a Talker is known for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jiwer
import numpy as np
from jaxtyping import Float, Int

from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation.alignment import align, split_words
from omni_jax.evaluation.pauses import PauseErrors, PauseRanges, count_pause_errors, find_silences, is_cut_off
from omni_jax.evaluation.pauses import place_silences as place_between_words
from omni_jax.evaluation.transcripts import Recognizer, Transcript
from omni_jax.evaluation.word_errors import count_word_errors
from omni_jax.processing.spoken_text import split_text

MAX_REPEATED_WORDS = 8  # of a span
MAX_LOOP_PERIOD = 100  # codes, two seconds
MIN_LOOP = 75  # codes that repeat what came a period before
_MIN_LOOP_PERIODS = 2
_CODES_PER_SECOND = 50


class PhonemeJudge(Protocol):
    """A recogniser of phonemes, which also knows how a text is pronounced (``phoneme_recognizer``)."""

    @property
    def name(self) -> str: ...

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript: ...

    def phonemize(self, text: str) -> str: ...


@dataclass(frozen=True)
class RewardWeights:
    """What each failure costs."""

    word_errors: float = 1.0
    """For each expected word that is wrong, missing or too many, as a share of all."""
    phoneme_errors: float = 1.0
    """The same for phonemes, where they are judged."""
    pauses: float = 0.3
    """For each wrong pause, as a share of the places where punctuation asks for one."""
    truncated: float = 0.5
    """Where the end is missing or cut off."""
    repetition: float = 1.0
    """For each word of a span that is repeated, as a share of all; 1 for a loop of codes."""


@dataclass(frozen=True)
class SpeechScore:
    """How well an answer is spoken.

    Attributes:
      text: that was recognised.
      word_error_rate: errors over expected words.
      phoneme_error_rate: the same of phonemes; None if they were not judged.
      pauses: what is wrong with them.
      missing_end: expected words behind the last one that was found.
      cut_off: whether the sound ends within a word.
      repeated_words: of spans that follow on themselves, beyond those of the text.
      num_words: that are expected.
      loop_seconds: of the longest loop of codes.
      reward: 0 for a perfect one, and below.
    """

    text: str
    word_error_rate: float
    phoneme_error_rate: float | None
    pauses: PauseErrors
    missing_end: int
    cut_off: bool
    repeated_words: int
    num_words: int
    loop_seconds: float
    reward: float = 0.0

    @property
    def truncated(self) -> bool:
        return self.missing_end > 0 or self.cut_off

    @property
    def repetition(self) -> float:
        """From 0 to 1."""
        return 1.0 if self.loop_seconds > 0 else min(1.0, self.repeated_words / self.num_words)

    def weigh(self, weights: RewardWeights) -> SpeechScore:
        """The same with its reward."""
        cost = weights.word_errors * self.word_error_rate
        cost += weights.phoneme_errors * (self.phoneme_error_rate or 0.0)
        cost += weights.pauses * self.pauses.rate
        cost += weights.truncated * self.truncated
        cost += weights.repetition * self.repetition
        return dataclasses.replace(self, reward=-cost)

    def to_json(self) -> dict[str, Any]:
        """As rows of pairs have it."""
        values = dataclasses.asdict(self)
        values["pauses"]["rate"] = self.pauses.rate
        for name in ("word_error_rate", "phoneme_error_rate", "loop_seconds", "reward"):
            if values[name] is not None:
                values[name] = round(values[name], 4)
        return values


@dataclass(frozen=True)
class SpeechJudge:
    """Scores spoken answers.

    Attributes:
      recognizer: gives text and times of words.
      phonemes: judges phonemes too; None: they are not.
      language: of the texts.
      ranges: of pauses.
      weights: of the reward.
    """

    recognizer: Recognizer
    phonemes: PhonemeJudge | None = None
    language: str = "en"
    ranges: PauseRanges = PauseRanges()  # noqa: RUF009, frozen
    weights: RewardWeights = RewardWeights()

    @property
    def name(self) -> str:
        """Of all recognisers, for whoever reads the figures."""
        return self.recognizer.name if self.phonemes is None else f"{self.recognizer.name}; {self.phonemes.name}"

    def score(
        self, text: str, samples: Float[np.ndarray, " n"], rate: int, codes: Int[np.ndarray, " K"] | None = None
    ) -> SpeechScore:
        """The score of one answer.

        Args:
          text: that was to be spoken.
          samples: mono, from -1 to 1; maybe none.
          rate: samples a second.
          codes: that the sound was made from, if loops of them are to be found.

        Raises:
          InputError: if the text has no words.
          JudgeError: if a recogniser fails, or gives no times of words.
        """
        expected = split_text(text)
        if not expected:
            raise InputError(f"the text {text!r} has no words to judge")
        transcript = Transcript("", ()) if not len(samples) else self.recognizer.transcribe(samples, rate)
        if transcript.words is None:
            raise JudgeError(f"recogniser {self.recognizer.name} gives no times of words, which pauses need")
        found = split_words(transcript.words)
        expected_texts = [word.text for word in expected]
        found_texts = [word.text for word in found]
        places = align(expected_texts, found_texts)
        silences = place_between_words(find_silences(samples, rate), found)
        score = SpeechScore(
            text=transcript.text,
            word_error_rate=count_word_errors([text], [transcript.text], self.language).rate,
            phoneme_error_rate=self._count_phoneme_errors(text, samples, rate),
            pauses=count_pause_errors(expected, places, silences, self.ranges),
            missing_end=count_missing_end(places),
            cut_off=is_cut_off(samples, rate),
            repeated_words=max(0, count_repeated(found_texts) - count_repeated(expected_texts)),
            num_words=len(expected),
            loop_seconds=0.0 if codes is None else find_loop(codes) / _CODES_PER_SECOND,
        )
        return score.weigh(self.weights)

    def _count_phoneme_errors(self, text: str, samples: Float[np.ndarray, " n"], rate: int) -> float | None:
        if self.phonemes is None:
            return None
        wanted = self.phonemes.phonemize(text)
        if not wanted:
            raise InputError(f"{self.phonemes.name} does not know how {text!r} is pronounced")
        found = self.phonemes.transcribe(samples, rate).text if len(samples) else ""
        return float(jiwer.process_words(wanted, found).wer)


def count_missing_end(places: Sequence[int | None]) -> int:
    """Expected words behind the last one that was found, see ``align``."""
    count = 0
    for place in reversed(places):
        if place is not None:
            break
        count += 1
    return count


def count_repeated(words: Sequence[str]) -> int:
    """Words of spans that repeat what stands right before them: "the old the old lamp" has two."""
    count = 0
    place = 0
    while place < len(words):
        length = _find_repeat(words, place)
        count += length
        place += max(1, length)
    return count


def _find_repeat(words: Sequence[str], place: int) -> int:
    """How long the span is that begins here and stands before here too; the longest one."""
    for length in range(min(MAX_REPEATED_WORDS, place, len(words) - place), 0, -1):
        if words[place - length : place] == words[place : place + length]:
            return length
    return 0


def find_loop(codes: Int[np.ndarray, " K"]) -> int:
    """Codes of the longest loop; 0 if there is none.

    A loop is a stretch in which each code is that of a period before, for 1.5 seconds and for two periods at least. A
    steady silence of that length is one too.
    """
    longest = 0
    for period in range(1, min(MAX_LOOP_PERIOD, len(codes) - 1) + 1):
        is_same = np.concatenate([[False], codes[period:] == codes[:-period], [False]])
        changes = np.flatnonzero(np.diff(is_same.astype(np.int8))).reshape(-1, 2)
        length = int((changes[:, 1] - changes[:, 0]).max(initial=0))
        if length >= max(MIN_LOOP, _MIN_LOOP_PERIODS * period):
            longest = max(longest, length + period)
    return longest
