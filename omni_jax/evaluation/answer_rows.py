"""Rows of what a model speaks: what the tools that make them have in common.

Such a tool reads texts, has a model speak them, has a recogniser judge the answers, and writes rows of those that are
good enough for what the rows are for. ``RowMaker`` says what is made of some texts, ``write_rows`` does it for a file.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import tyro
from rich.console import Console
from rich.progress import track

from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int, printable
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row, open_rows
from omni_jax.engine.outputs import Reply
from omni_jax.errors import CheckpointError, ConfigError, InputError, JudgeError
from omni_jax.evaluation.spoken_answers import SpokenText, make_seed, read_spoken_text, speak_texts
from omni_jax.generation.load_model import load
from omni_jax.generation.options import Options as Request
from omni_jax.processing.read_aloud import QUESTION

# what is made of a row; or none, and the reason
MadeRow: TypeAlias = tuple[dict[str, Any] | None, str]


@dataclass(frozen=True)
class SpeakingOptions:
    """What is spoken, and by whom."""

    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT.jsonl")]
    model: Path
    """A checkpoint that can speak, or the folder of a training run."""
    recognizer: str
    """whisper, whisper:FOLDER, pocketsphinx, a command with {wav}, or module:function."""
    language: str = "en"
    """Of the texts."""
    voices: tuple[str, ...] = ()
    """Who speaks, one row after the other; without any, the checkpoint's default voice."""
    max_codes: int = 1500
    """Of an answer, 50 a second; one that does not end before is left out."""
    codec: str | None = None
    """Fingerprint of the codes; without it, that of the checkpoint's speech tokenizer, if it has one."""
    question: str = QUESTION
    """What is asked for a text; {text} stands for it."""
    media_root: str | None = None
    """Media must lie within this folder; without it, within that of the rows."""
    seed: int = 0


class RowMaker(ABC):
    """Makes rows of texts that a model speaks.

    Attributes:
      settings: what its rows depend on.
    """

    def __init__(self, options: SpeakingOptions, judge_name: str) -> None:
        """Loads the model.

        Raises:
          CheckpointError, ConfigError: if it cannot be loaded.
          InputError: if an option is out of its range.
        """
        check_int("--max-codes", options.max_codes, 2)
        folder = resolve_checkpoint(options.model)
        self._codec = find_codec(folder) if options.codec is None else options.codec
        self._model = load(folder)
        self._speaking = options
        self._voices: Sequence[str | None] = options.voices or (None,)
        self.settings = dataclasses.asdict(options)
        del self.settings["out"]
        self.settings |= {"model": str(options.model), "judge": judge_name, "codec": self._codec}

    @abstractmethod
    def make(self, numbered: Sequence[tuple[int, Row]]) -> list[MadeRow]:
        """What is made of each of some rows, which have their numbers in the file.

        Raises:
          InputError: if a row is no text or dialogue.
          JudgeError: if a recogniser fails.
        """

    def read_text(self, row: Row) -> SpokenText:
        """The text of a row; raises InputError if there is none."""
        options = self._speaking
        return read_spoken_text(row, options.out, options.question, options.media_root)

    def speak(
        self, texts: Sequence[SpokenText], numbers: Sequence[int], answers: Sequence[int], **talker: Any
    ) -> list[Reply]:
        """Has the model speak texts at once.

        Args:
          texts: what is spoken.
          numbers: of their rows, which say whose voice it is.
          answers: which of the answers to its row each is; another one is drawn differently.
          talker: how codes are drawn.
        """
        requests = []
        for text, number, answer in zip(texts, numbers, answers, strict=True):
            seed = make_seed(self._speaking.seed, number, answer)
            drawing = {**talker, "max_tokens": self._speaking.max_codes, "seed": seed}
            requests.append(
                Request.create(
                    modalities=("text", "audio"),
                    reply_text=text.text,
                    voice=self._voice(number),
                    talker=drawing,
                    noise_seed=seed,
                )
            )
        return speak_texts(self._model, texts, requests)

    def has_ended(self, reply: Reply) -> bool:
        """Whether an answer has an end; in one that was cut off there is none to be learned."""
        return 0 < len(reply.codec_ids) < self._speaking.max_codes

    def make_speech(self, number: int, answers: Mapping[str, Any]) -> dict[str, Any]:
        """``speech`` of the row that is made of a row (``data.spoken_rows``), from what it says of the answers."""
        speech = dict(answers)
        voice = self._voice(number)
        if voice is not None:
            speech["voice"] = voice
        if self._codec is not None:
            speech["codec"] = self._codec
        return speech

    def _voice(self, number: int) -> str | None:
        return self._voices[number % len(self._voices)]


def write_rows(make_maker: Callable[[], RowMaker], options: SpeakingOptions, batch_size: int, kind: str) -> int:
    """Writes what is made of a file of rows, and prints of how many rows nothing was made, by the reason.

    Args:
      make_maker: makes what makes the rows, once they are opened.
      options: of it.
      batch_size: rows that are taken together.
      kind: what is made, in the plural.

    Returns:
      The exit status: 1 after an error, which is printed.
    """
    try:
        _write_rows(make_maker, options, batch_size, kind)
    except (CheckpointError, ConfigError, InputError, JudgeError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 1
    return 0


def _write_rows(make_maker: Callable[[], RowMaker], options: SpeakingOptions, batch_size: int, kind: str) -> None:
    rows = open_rows(options.rows)
    maker = make_maker()
    print(f"judged by {printable(maker.settings['judge'])}")
    with ResumedRows(options.out, maker.settings) as made:
        starts = range(made.num_done, len(rows), batch_size)
        for start in track(starts, description=kind, console=Console(stderr=True)):
            numbers = range(start, min(start + batch_size, len(rows)))
            results = maker.make([(number, rows[number]) for number in numbers])
            for number, result in zip(numbers, results, strict=True):
                made.add(number, *result)
        num_made = made.finish()
    print(f"{options.out}: {num_made} {kind} of {len(rows)}")
    for reason, count in sorted(made.counts.items()):
        if reason:
            print(f"  {count} without: {reason}")
