"""Has a model speak texts, and keeps what is spoken well: rows to train its Talker on, and their sounds.

    python tools/self_distill.py texts.jsonl distilled.jsonl --model runs/sft --recognizer whisper

A row is ``{"text": ...}`` or a dialogue that ends in a reply. The rows that are written are dialogues with the codes of
their last message (docs/data.md); ``sound`` is what the model makes of the codes, in a folder beside the output, and
``word_errors`` what a recogniser finds wrong in it. An answer with more (``--max-word-errors``), or without an end, is
drawn again up to ``--attempts`` times. A recogniser that fails ends the command. Run again, it goes on where it was
stopped.
"""

from __future__ import annotations

import io
import sys
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import check_float, check_int
from omni_jax.data.sources import Row
from omni_jax.engine.outputs import Reply
from omni_jax.evaluation.answer_rows import MadeRow, RowMaker, SpeakingOptions, write_rows
from omni_jax.evaluation.recognizers import make_recognizer
from omni_jax.evaluation.word_errors import count_word_errors
from omni_jax.plain_files import replace_file
from omni_jax.serving.wav import pcm16


@dataclass(frozen=True)
class Options(SpeakingOptions):
    """What is spoken, and what is kept."""

    max_word_errors: float = 0.05
    """Of a row that is kept: errors over expected words."""
    attempts: int = 2
    """Answers that are drawn for a row at most."""
    temperature: float = 0.9
    """Of the codes; top-k 40, top-p 0.8 and a penalty of 1.05 are those of any answer."""
    batch_size: int = 8
    """Texts that are spoken at once."""

    @property
    def sounds(self) -> Path:
        """The folder of the sounds."""
        return self.out.with_name(f"{self.out.stem}_sounds")


class Distiller(RowMaker):
    """Makes rows of answers with few word errors, and writes their sounds."""

    def __init__(self, options: Options) -> None:
        """Loads the recogniser and the model; raises what these do, and InputError if an option is out of its range."""
        check_float("--max-word-errors", options.max_word_errors, 0, 100)
        check_int("--attempts", options.attempts, 1, 64)
        check_int("--batch-size", options.batch_size, 1, 256)
        self._options = options
        self._recognizer = make_recognizer(options.recognizer, language=options.language)
        super().__init__(options, self._recognizer.name)
        # a text is spoken alike in any company
        del self.settings["batch_size"]
        options.sounds.mkdir(parents=True, exist_ok=True)

    def make(self, numbered: Sequence[tuple[int, Row]]) -> list[MadeRow]:
        texts = [self.read_text(row) for _, row in numbered]
        made: list[MadeRow] = [(None, "")] * len(texts)
        waiting = list(range(len(texts)))
        for attempt in range(self._options.attempts):
            replies = self.speak(
                [texts[place] for place in waiting],
                [numbered[place][0] for place in waiting],
                [attempt] * len(waiting),
                temperature=self._options.temperature,
            )
            for place, reply in zip(waiting, replies, strict=True):
                number = numbered[place][0]
                errors, reason = self._judge(texts[place].text, reply)
                row = None if reason else self._make_row(number, texts[place].values, reply, errors)
                made[place] = (row, reason)
            waiting = [place for place in waiting if made[place][1]]
            if not waiting:
                break
        return made

    def _judge(self, text: str, reply: Reply) -> tuple[float, str]:
        """Word errors over words, and why the answer is not kept."""
        if not self.has_ended(reply):
            return 1.0, "the answer has no end"
        assert reply.audio is not None
        found = self._recognizer.transcribe(reply.audio, reply.sample_rate).text
        errors = count_word_errors([text], [found], self._options.language).rate
        return errors, "" if errors <= self._options.max_word_errors else "too many word errors"

    def _make_row(self, number: int, values: Mapping[str, Any], reply: Reply, errors: float) -> dict[str, Any]:
        assert reply.audio is not None
        path = self._options.sounds / f"{number:07d}.wav"
        contents = io.BytesIO()
        with wave.open(contents, "wb") as file:
            file.setparams((1, 2, reply.sample_rate, 0, "NONE", ""))
            file.writeframes(pcm16(reply.audio))
        replace_file(path, contents.getvalue())
        speech = self.make_speech(number, {"codec_ids": list(reply.codec_ids)})
        sound = str(path.relative_to(self._options.out.parent))
        return {**values, "speech": speech, "sound": sound, "word_errors": round(errors, 4)}


def main(options: Options) -> int:
    return write_rows(lambda: Distiller(options), options, options.batch_size, kind="rows")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
