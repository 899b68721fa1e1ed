"""Makes preference pairs of spoken answers, for ``tools/score_pairs.py`` and ``train.py talker-dpo-*``.

    python tools/make_pairs.py texts.jsonl pairs.jsonl --model runs/talker1 --recognizer whisper --voices Chelsie Ethan

A row is ``{"text": ...}`` or a dialogue that ends in a reply. The model speaks each text several times (``--answers``),
drawn neutrally, as training measures log-probabilities: temperature 1, no top-k, no top-p, no penalty on repetition.
Recognisers score the answers (docs/speech-training.md, Rewards), and the two that differ most become a pair, if
the better one is not bad and their lengths are not too far apart. The recogniser must give times of words; one that
fails ends the command. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_int
from omni_jax.data.sources import Row
from omni_jax.engine.outputs import Reply
from omni_jax.evaluation.answer_pairs import PairLimits, ScoredAnswer, choose_pair
from omni_jax.evaluation.answer_rows import MadeRow, RowMaker, SpeakingOptions, write_rows
from omni_jax.evaluation.pauses import PauseRanges
from omni_jax.evaluation.recognizers import make_recognizer
from omni_jax.evaluation.rewards import RewardWeights, SpeechJudge, SpeechScore

NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Options(SpeakingOptions):
    """What is spoken, and how it is judged."""

    phonemes: Literal["none", "hama"] = "none"
    """Judge phonemes too."""
    answers: int = 4
    """To each row."""
    pairs: PairLimits = field(default_factory=PairLimits)
    pauses: PauseRanges = field(default_factory=PauseRanges)
    weights: RewardWeights = field(default_factory=RewardWeights)


def make_judge(options: Options) -> SpeechJudge:
    """The judge that is asked for.

    Raises:
      InputError, JudgeError: if there is none.
    """
    phonemes = None
    if options.phonemes == "hama":
        from omni_jax.evaluation.phoneme_recognizer import PhonemeRecognizer

        phonemes = PhonemeRecognizer()
    recognizer = make_recognizer(options.recognizer, language=options.language)
    return SpeechJudge(recognizer, phonemes, options.language, options.pauses, options.weights)


class PairMaker(RowMaker):
    """Makes pairs of the answers to each row."""

    def __init__(self, options: Options) -> None:
        """Loads the judge and the model; raises what these do, and InputError if an option is out of its range."""
        check_int("--answers", options.answers, 2, 64)
        options.pairs.check()
        self._options = options
        self._judge = make_judge(options)
        super().__init__(options, self._judge.name)

    def make(self, numbered: Sequence[tuple[int, Row]]) -> list[MadeRow]:
        return [self._make_pair(number, row) for number, row in numbered]

    def _make_pair(self, number: int, row: Row) -> MadeRow:
        count = self._options.answers
        text = self.read_text(row)
        replies = self.speak([text] * count, [number] * count, range(count), **NEUTRAL)
        ended = [reply for reply in replies if self.has_ended(reply)]
        if len(ended) < 2:
            return None, "fewer than two answers end"
        scores = [self._score(text.text, reply) for reply in ended]
        answers = [ScoredAnswer(reply.codec_ids, score.reward) for reply, score in zip(ended, scores, strict=True)]
        pair = choose_pair(answers, self._options.pairs)
        if isinstance(pair, str):
            return None, pair
        described = {}
        for name, place in zip(("chosen", "rejected"), pair, strict=True):
            described[name] = {"codec_ids": list(answers[place].codes), "score": scores[place].to_json()}
        return {**text.values, "speech": self.make_speech(number, described)}, ""

    def _score(self, text: str, reply: Reply) -> SpeechScore:
        assert reply.audio is not None
        return self._judge.score(text, reply.audio, reply.sample_rate, np.array(reply.codec_ids))


def main(options: Options) -> int:
    return write_rows(lambda: PairMaker(options), options, batch_size=1, kind="pairs")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
