"""Has a model speak texts, and keeps what is spoken well: rows to train its Talker on, and their sounds.

    python tools/self_distill.py texts.jsonl distilled.jsonl --model runs/sft --recognizer whisper

A row is ``{"text": ...}`` or a dialogue that ends in a reply. The rows that are written are dialogues with the codes of
their last message (docs/data.md); ``sound`` is what the model makes of the codes, in a folder beside the output, and
``word_errors`` what a recogniser finds wrong in it. An answer with more (``--max-word-errors``), or without an end, is
drawn again up to ``--attempts`` times. A recogniser that fails ends the command. Run again, it goes on where it was
stopped.
"""

from __future__ import annotations

import dataclasses
import io
import sys
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_float, check_int, printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row, open_rows
from omni_jax.engine.outputs import Reply
from omni_jax.errors import CheckpointError, ConfigError, InputError, JudgeError
from omni_jax.evaluation.recognizers import make_recognizer
from omni_jax.evaluation.spoken_answers import QUESTION, make_seed, read_spoken_text, speak_texts
from omni_jax.evaluation.transcripts import Recognizer
from omni_jax.evaluation.word_errors import count_word_errors
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options as Request
from omni_jax.plain_files import replace_file
from omni_jax.serving.wav import pcm16


@dataclass(frozen=True)
class Options:
    """What is spoken, and what is kept."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    model: Path
    """A checkpoint that can speak, or the folder of a training run."""
    recognizer: str
    """whisper, whisper:FOLDER, pocketsphinx, a command with {wav}, or module:function."""
    max_word_errors: float = 0.05
    """Of a row that is kept: errors over expected words."""
    language: str = "en"
    """Of the texts."""
    voices: tuple[str, ...] = ()
    """Who speaks, one row after the other; without any, the checkpoint's default voice."""
    attempts: int = 2
    """Answers that are drawn for a row at most."""
    max_codes: int = 1500
    """Of an answer, 50 a second; one that does not end before is not kept."""
    temperature: float = 0.9
    """Of the codes; top-k 40, top-p 0.8 and a penalty of 1.05 are those of any answer."""
    batch_size: int = 8
    """Texts that are spoken at once."""
    codec: str | None = None
    """Fingerprint of the codes; without it, that of the checkpoint's speech tokenizer, if it has one."""
    question: str = QUESTION
    """What is asked for a text; {text} stands for it."""
    media_root: str | None = None
    """Media must lie within this folder; without it, within that of the rows."""
    seed: int = 0

    @property
    def sounds(self) -> Path:
        """The folder of the sounds."""
        return self.out.with_name(f"{self.out.stem}_sounds")


class Distiller:
    """Makes rows, some at a time.

    Attributes:
      settings: what its rows depend on.
    """

    def __init__(self, model: OmniModel, recognizer: Recognizer, codec: str | None, options: Options) -> None:
        self._model = model
        self._recognizer = recognizer
        self._codec = codec
        self._options = options
        self._voices: Sequence[str | None] = options.voices or (None,)
        values = dataclasses.asdict(options)
        del values["out"], values["batch_size"]
        self.settings = {**values, "model": str(options.model), "recognizer": recognizer.name, "codec": codec}

    def make(self, numbered: Sequence[tuple[int, Row]]) -> list[tuple[dict[str, Any] | None, str]]:
        """For each row what is written; or nothing, and the reason.

        Raises:
          InputError: if a row is no text or dialogue.
          JudgeError: if the recogniser fails.
        """
        options = self._options
        texts = [read_spoken_text(row, options.out, options.question, options.media_root) for _, row in numbered]
        made: list[tuple[dict[str, Any] | None, str]] = [(None, "")] * len(texts)
        waiting = list(range(len(texts)))
        for attempt in range(options.attempts):
            requests = [self._request(numbered[place][0], texts[place].text, attempt) for place in waiting]
            replies = speak_texts(self._model, [texts[place] for place in waiting], requests)
            for place, reply in zip(waiting, replies, strict=True):
                number = numbered[place][0]
                errors, reason = self._judge(texts[place].text, reply)
                row = None if reason else self._make_row(number, texts[place].values, reply, errors)
                made[place] = (row, reason)
            waiting = [place for place in waiting if made[place][1]]
            if not waiting:
                break
        return made

    def _request(self, number: int, text: str, attempt: int) -> Request:
        seed = make_seed(self._options.seed, number, attempt)
        talker = {"temperature": self._options.temperature, "max_tokens": self._options.max_codes, "seed": seed}
        return Request.create(
            modalities=("text", "audio"), reply_text=text, voice=self._voice(number), talker=talker, noise_seed=seed
        )

    def _voice(self, number: int) -> str | None:
        return self._voices[number % len(self._voices)]

    def _judge(self, text: str, reply: Reply) -> tuple[float, str]:
        """Word errors over words, and why the answer is not kept."""
        if not 0 < len(reply.codec_ids) < self._options.max_codes:
            return 1.0, "the answer has no end"
        assert reply.audio is not None
        found = self._recognizer.transcribe(reply.audio, reply.sample_rate).text
        errors = count_word_errors([text], [found], self._options.language).rate
        return errors, "" if errors <= self._options.max_word_errors else "too many word errors"

    def _make_row(self, number: int, values: Any, reply: Reply, errors: float) -> dict[str, Any]:
        assert reply.audio is not None
        path = self._options.sounds / f"{number:07d}.wav"
        contents = io.BytesIO()
        with wave.open(contents, "wb") as file:
            file.setparams((1, 2, reply.sample_rate, 0, "NONE", ""))
            file.writeframes(pcm16(reply.audio))
        replace_file(path, contents.getvalue())
        speech: dict[str, Any] = {"codec_ids": list(reply.codec_ids)}
        voice = self._voice(number)
        if voice is not None:
            speech["voice"] = voice
        if self._codec is not None:
            speech["codec"] = self._codec
        sound = str(path.relative_to(self._options.out.parent))
        return {**values, "speech": speech, "sound": sound, "word_errors": round(errors, 4)}


def self_distill(options: Options) -> None:
    """Writes the rows and their sounds.

    Raises:
      CheckpointError, ConfigError, InputError: if something that was named cannot be used.
      JudgeError: if the recogniser fails.
    """
    check_float("--max-word-errors", options.max_word_errors, 0, 100)
    check_int("--attempts", options.attempts, 1, 64)
    check_int("--max-codes", options.max_codes, 2)
    check_int("--batch-size", options.batch_size, 1, 256)
    rows = open_rows(options.rows)
    recognizer = make_recognizer(options.recognizer, language=options.language)
    print(f"judged by {printable(recognizer.name)}")
    folder = resolve_checkpoint(options.model)
    codec = find_codec(folder) if options.codec is None else options.codec
    distiller = Distiller(omni_jax.load(folder), recognizer, codec, options)
    options.sounds.mkdir(parents=True, exist_ok=True)
    with ResumedRows(options.out, distiller.settings) as made:
        starts = range(made.num_done, len(rows), options.batch_size)
        for start in track(starts, description="speaking", console=Console(stderr=True)):
            numbers = range(start, min(start + options.batch_size, len(rows)))
            results = distiller.make([(number, rows[number]) for number in numbers])
            for number, result in zip(numbers, results, strict=True):
                made.add(number, *result)
        num_rows = made.finish()
    print(f"{options.out}: {num_rows} rows of {len(rows)}")
    for reason, count in sorted(made.counts.items()):
        if reason:
            print(f"  {count} without: {reason}")


def main(options: Options) -> int:
    try:
        self_distill(options)
    except (CheckpointError, ConfigError, InputError, JudgeError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
