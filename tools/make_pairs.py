"""Makes preference pairs of spoken answers, for ``tools/score_pairs.py`` and ``train.py talker-dpo-*``.

    python tools/make_pairs.py texts.jsonl pairs.jsonl --model runs/talker1 --recognizer whisper --voices Chelsie Ethan

A row is ``{"text": ...}`` or a dialogue that ends in a reply. The model speaks each text several times (``--answers``),
drawn neutrally, as training measures log-probabilities: temperature 1, no top-k, no top-p, no penalty on repetition.
Recognisers score the answers (docs/speech-training.md, Rewards), and the two that differ most become a pair, if
the better one is not bad and their lengths are not too far apart. A recogniser that fails ends the command. Run again,
it goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int, printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row, open_rows
from omni_jax.engine.outputs import Reply
from omni_jax.errors import CheckpointError, ConfigError, InputError, JudgeError
from omni_jax.evaluation.answer_pairs import PairLimits, ScoredAnswer, choose_pair
from omni_jax.evaluation.pauses import PauseRanges
from omni_jax.evaluation.recognizers import make_recognizer
from omni_jax.evaluation.rewards import RewardWeights, SpeechJudge, SpeechScore
from omni_jax.evaluation.spoken_answers import QUESTION, make_seed, read_spoken_text, speak_texts
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options as Request

NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Options:
    """What is spoken, and how it is judged."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS.jsonl")]
    model: Path
    """A checkpoint that can speak, or the folder of a training run."""
    recognizer: str
    """whisper, whisper:FOLDER, a command with {wav}, or module:function; it must give times of words."""
    phonemes: Literal["none", "hama"] = "none"
    """Judge phonemes too."""
    language: str = "en"
    """Of the texts."""
    voices: tuple[str, ...] = ()
    """Who speaks, one row after the other; without any, the checkpoint's default voice."""
    answers: int = 4
    """To each row."""
    max_codes: int = 1500
    """Of an answer, 50 a second; one that does not end before is left out."""
    codec: str | None = None
    """Fingerprint of the codes; without it, that of the checkpoint's speech tokenizer, if it has one."""
    question: str = QUESTION
    """What is asked for a text; {text} stands for it."""
    media_root: str | None = None
    """Media must lie within this folder; without it, within that of the rows."""
    pairs: PairLimits = field(default_factory=PairLimits)
    pauses: PauseRanges = field(default_factory=PauseRanges)
    weights: RewardWeights = field(default_factory=RewardWeights)
    seed: int = 0


def make_judge(options: Options) -> SpeechJudge:
    """The judge that is asked for; its name is printed.

    Raises:
      InputError, JudgeError: if there is none.
    """
    phonemes = None
    if options.phonemes == "hama":
        from omni_jax.evaluation.phoneme_recognizer import PhonemeRecognizer

        phonemes = PhonemeRecognizer()
    recognizer = make_recognizer(options.recognizer, language=options.language)
    judge = SpeechJudge(recognizer, phonemes, options.language, options.pauses, options.weights)
    print(f"judged by {printable(judge.name)}")
    return judge


class PairMaker:
    """Makes pairs of rows, one row at a time.

    Attributes:
      settings: what its rows depend on.
    """

    def __init__(self, model: OmniModel, judge: SpeechJudge, codec: str | None, options: Options) -> None:
        self._model = model
        self._judge = judge
        self._codec = codec
        self._options = options
        self._voices: Sequence[str | None] = options.voices or (None,)
        values = dataclasses.asdict(options)
        del values["out"]
        self.settings = {**values, "model": str(options.model), "judge": judge.name, "codec": codec}

    def make(self, number: int, row: Row) -> tuple[dict[str, Any] | None, str]:
        """The pair of a row; or none, and the reason.

        Raises:
          InputError: if the row is no text or dialogue.
          JudgeError: if a recogniser fails.
        """
        options = self._options
        text = read_spoken_text(row, options.out, options.question, options.media_root)
        voice = self._voices[number % len(self._voices)]
        requests = []
        for answer in range(options.answers):
            seed = make_seed(options.seed, number, answer)
            talker = {**NEUTRAL, "max_tokens": options.max_codes, "seed": seed}
            requests.append(
                Request.create(
                    modalities=("text", "audio"), reply_text=text.text, voice=voice, talker=talker, noise_seed=seed
                )
            )
        replies = speak_texts(self._model, [text] * options.answers, requests)
        # an answer that was cut off has no end that could be learned or avoided
        ended = [reply for reply in replies if 0 < len(reply.codec_ids) < options.max_codes]
        if len(ended) < 2:
            return None, "fewer than two answers end"
        scores = [self._score(text.text, reply) for reply in ended]
        answers = [ScoredAnswer(reply.codec_ids, score.reward) for reply, score in zip(ended, scores, strict=True)]
        pair = choose_pair(answers, options.pairs)
        if isinstance(pair, str):
            return None, pair
        speech: dict[str, Any] = {}
        for name, place in zip(("chosen", "rejected"), pair, strict=True):
            speech[name] = {"codec_ids": list(answers[place].codes), "score": scores[place].to_json()}
        if voice is not None:
            speech["voice"] = voice
        if self._codec is not None:
            speech["codec"] = self._codec
        return {**text.values, "speech": speech}, ""

    def _score(self, text: str, reply: Reply) -> SpeechScore:
        assert reply.audio is not None
        return self._judge.score(text, reply.audio, reply.sample_rate, np.array(reply.codec_ids))


def make_pairs(options: Options) -> None:
    """Writes the pairs.

    Raises:
      CheckpointError, ConfigError, InputError: if something that was named cannot be used.
      JudgeError: if a recogniser fails.
    """
    check_int("--answers", options.answers, 2, 64)
    check_int("--max-codes", options.max_codes, 2)
    options.pairs.check()
    rows = open_rows(options.rows)
    judge = make_judge(options)
    folder = resolve_checkpoint(options.model)
    codec = find_codec(folder) if options.codec is None else options.codec
    maker = PairMaker(omni_jax.load(folder), judge, codec, options)
    with ResumedRows(options.out, maker.settings) as made:
        numbers = range(made.num_done, len(rows))
        for number in track(numbers, description="pairs", console=Console(stderr=True)):
            made.add(number, *maker.make(number, rows[number]))
        num_pairs = made.finish()
    print(f"{options.out}: {num_pairs} pairs of {len(rows)} rows")
    for reason, count in sorted(made.counts.items()):
        if reason:
            print(f"  {count} without: {reason}")


def main(options: Options) -> int:
    try:
        make_pairs(options)
    except (CheckpointError, ConfigError, InputError, JudgeError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
