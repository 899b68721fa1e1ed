"""Rewards of sounds with known words and pauses: each failure costs what it should, and bad ones rank lower."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation.recognizers import CheckedRecognizer
from omni_jax.evaluation.rewards import RewardWeights, SpeechJudge, SpeechScore, count_repeated, find_loop
from omni_jax.evaluation.transcripts import Transcript
from tests.evaluation.fake_recognizers import hear_late_word
from tests.evaluation.renderings import RATE, FakeRecognizer, Rendering, render

TEXT = "The lamp is old, and red. It is near the door."
GOOD = "the lamp is old (0.15) and red (0.4) it is near the door"
BAD = {
    "missing word": "the is old (0.15) and red (0.4) it is near the door",
    "doubled word": "the lamp lamp is old (0.15) and red (0.4) it is near the door",
    "pause in the wrong place": "the lamp is old (0.15) and red (0.4) it is near (0.5) the door",
    "none at a full stop": "the lamp is old (0.15) and red it is near the door",
    "missing end": "the lamp is old (0.15) and red (0.4) it is near",
}


def score(rendering: Rendering, text: str = TEXT, codes: np.ndarray | None = None) -> SpeechScore:
    judge = SpeechJudge(FakeRecognizer([rendering.transcript]))
    return judge.score(text, rendering.samples, RATE, codes)


def test_a_good_one_costs_nothing() -> None:
    found = score(render(GOOD))
    assert (found.reward, found.word_error_rate, found.pauses.rate, found.truncated) == (0, 0, 0, False)
    assert found.num_words == 11 and found.phoneme_error_rate is None and found.repetition == 0


@pytest.mark.parametrize("name", BAD)
def test_bad_ones_rank_lower(name: str) -> None:
    assert score(render(BAD[name])).reward < -0.05


def test_what_each_failure_costs() -> None:
    missing = score(render(BAD["missing word"]))
    assert missing.word_error_rate == pytest.approx(1 / 11) and missing.reward == pytest.approx(-1 / 11)
    doubled = score(render(BAD["doubled word"]))
    assert doubled.repeated_words == 1 and doubled.reward == pytest.approx(-2 / 11)
    pause = score(render(BAD["pause in the wrong place"]))
    assert (pause.pauses.unexpected, pause.pauses.places) == (1, 2) and pause.reward == pytest.approx(-0.3 / 2)
    end = score(render(BAD["missing end"]))
    assert end.missing_end == 2 and end.truncated and end.reward == pytest.approx(-2 / 11 - 0.5)
    # the last word is recognised, but the sound stops within it
    whole = render(GOOD)
    cut = score(dataclasses.replace(whole, samples=whole.samples[: -round(0.25 * RATE)]))
    assert cut.cut_off and cut.missing_end == 0 and cut.reward == pytest.approx(-0.5)
    weights = RewardWeights(truncated=2.0)
    assert cut.weigh(weights).reward == pytest.approx(-2.0)


def test_silence_is_the_worst() -> None:
    empty = np.zeros(0, np.float32)
    recognizer = FakeRecognizer([])
    found = SpeechJudge(recognizer).score(TEXT, empty, RATE)
    assert recognizer.calls == 0  # there is nothing to recognise
    assert found.word_error_rate == 1 and found.missing_end == 11 and found.pauses.missing == 2
    assert found.reward == pytest.approx(-1 - 0.3 - 0.5)


def test_repeated_spans() -> None:
    assert count_repeated("a b c".split()) == 0
    assert count_repeated("a a a".split()) == 2
    assert count_repeated("the old the old lamp".split()) == 2
    assert count_repeated("a b c a b c a b c".split()) == 6
    # what the text repeats itself is none
    found = score(render("no no no (0.2) i can not"), "No no no, I can not.")
    assert found.repeated_words == 0 and found.reward == 0


def test_loops_of_codes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 8192, 400)
    assert find_loop(codes) == 0 and find_loop(codes[:1]) == 0
    # a pause of 1.4 seconds in one code is none; 2 seconds are
    assert find_loop(np.concatenate([codes, np.full(70, 5), codes])) == 0
    assert find_loop(np.concatenate([codes, np.full(100, 5), codes])) == 100
    # a span of 30 codes said four times
    looped = np.concatenate([codes[:50], *[codes[50:80]] * 4, codes[80:]])
    assert find_loop(looped) == 120
    # one of 60 codes said twice is a repetition that only words tell
    assert find_loop(np.concatenate([codes[:60], codes[:60]])) == 0
    found = score(render(GOOD), codes=looped)
    assert found.loop_seconds == pytest.approx(2.4) and found.repetition == 1 and found.reward == pytest.approx(-1)


@dataclasses.dataclass
class FakePhonemes:
    """Spells: each letter is a phoneme."""

    spoken: str
    name: str = "letters"

    def transcribe(self, samples: np.ndarray, rate: int) -> Transcript:
        return Transcript(self.phonemize(self.spoken), ())

    def phonemize(self, text: str) -> str:
        return " ".join(character for character in text if character.isalpha())


def test_phonemes_are_judged_beside() -> None:
    rendering = render("ab cd")
    judge = SpeechJudge(FakeRecognizer([rendering.transcript]), FakePhonemes("ab d"))
    found = judge.score("ab cd", rendering.samples, RATE)
    assert found.phoneme_error_rate == pytest.approx(1 / 4) and found.reward == pytest.approx(-1 / 4)
    assert judge.name == "fake; letters"


def test_what_rows_have_of_a_score() -> None:
    values = json.loads(json.dumps(score(render(BAD["doubled word"])).to_json()))
    assert values["reward"] == -0.1818 and values["pauses"]["rate"] == 0 and values["repeated_words"] == 1


class Broken:
    """Raises, or gives nonsense, where it should judge."""

    name = "broken"

    def transcribe(self, samples: np.ndarray, rate: int) -> Transcript:
        return hear_late_word(samples, rate)


def test_a_recognizer_that_fails_gives_no_score() -> None:
    rendering = render(GOOD)
    with pytest.raises(JudgeError, match="outside of the sound"):
        SpeechJudge(CheckedRecognizer(Broken())).score(TEXT, rendering.samples, RATE)
    without_times = FakeRecognizer([Transcript("the lamp")])
    with pytest.raises(JudgeError, match="fake gives no times of words"):
        SpeechJudge(without_times).score(TEXT, rendering.samples, RATE)
    with pytest.raises(InputError, match="has no words to judge"):
        score(rendering, "...")
