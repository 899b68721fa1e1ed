"""Recognisers of speech, whatever program or library they are: sound in, text and the times of its words out.

A recogniser that fails ends the run with a ``JudgeError``; what it could not read is never an empty text, which would
be scored as if nothing had been spoken.
"""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import tempfile
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from omni_jax.checks import shown
from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation.transcripts import Recognizer, Transcript, check_transcript, read_transcript

WAV_PLACE = "{wav}"  # in a command: the file that is to be read
COMMAND_SECONDS = 120.0  # that a command may take for one sound
_MAX_SHOWN_ERROR = 500  # characters of what a command says


class CheckedRecognizer:
    """A recogniser whose every failure is a ``JudgeError``.

    Attributes:
      name: that of the recogniser.
    """

    def __init__(self, recognizer: Recognizer) -> None:
        self.name = recognizer.name
        self._recognizer = recognizer

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """The transcript.

        Raises:
          JudgeError: if the recogniser raises anything, or gives what is no transcript of this sound.
        """
        try:
            transcript = self._recognizer.transcribe(samples, rate)
            return check_transcript(transcript, len(samples) / rate)
        except JudgeError as e:
            raise JudgeError(f"recogniser {self.name}: {e}") from e
        except Exception as e:  # of any library
            raise JudgeError(f"recogniser {self.name}: {type(e).__name__}: {e}") from e


class CommandRecognizer:
    """A program that is called for each sound.

    It prints the text, or an object ``{"text": ..., "words": [{"text": ..., "begin": ..., "end": ...,
    "probability": ...}]}``, of which ``text`` or ``words`` may be missing; and its exit status is 0.

    Attributes:
      name: the command.
    """

    def __init__(self, command: str, seconds: float = COMMAND_SECONDS) -> None:
        """Runs nothing yet.

        Args:
          command: as for a shell, but none is started; ``{wav}`` stands for the file, 16 bits and one channel.
          seconds: after which a call is ended.

        Raises:
          InputError: if it names no program or has no ``{wav}``.
        """
        try:
            self._arguments = shlex.split(command)
        except ValueError as e:
            raise InputError(f"the command {shown(command)} cannot be split: {e}") from e
        if not any(WAV_PLACE in argument for argument in self._arguments[1:]):
            raise InputError(f"the command {shown(command)} must name the sound that it is to read: {WAV_PLACE}")
        self.name = command
        self._seconds = seconds

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """What the program prints.

        Raises:
          JudgeError: if it cannot be started, takes too long, fails, or prints no transcript.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sound.wav")
            _write_wav(path, samples, rate)
            arguments = [argument.replace(WAV_PLACE, str(path)) for argument in self._arguments]
            try:
                run = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=self._seconds)
            except OSError as e:
                raise JudgeError(f"cannot be started: {e.strerror or e}") from e
            except subprocess.TimeoutExpired as e:
                raise JudgeError(f"did not end within {self._seconds:g} s") from e
        if run.returncode:
            error = run.stderr.decode(errors="replace").strip()[-_MAX_SHOWN_ERROR:]
            raise JudgeError(f"ended with status {run.returncode}: {error}")
        try:
            printed = run.stdout.decode().strip()
        except UnicodeDecodeError as e:
            raise JudgeError(f"printed what is not UTF-8: {e}") from e
        if not printed.startswith("{"):
            return Transcript(printed)
        try:
            return read_transcript(json.loads(printed))
        except (ValueError, RecursionError) as e:
            raise JudgeError(f"printed what is not JSON: {e}") from e


class FunctionRecognizer:
    """A function of Python's, called as ``function(samples, rate)``.

    It gives a ``Transcript``, a text, or the object that a command prints.

    Attributes:
      name: ``module:function``.
    """

    def __init__(self, name: str) -> None:
        """Imports the module.

        Raises:
          InputError: if there is no such function.
        """
        module, _, attribute = name.partition(":")
        try:
            function = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as e:
            raise InputError(f"there is no recogniser {shown(name)}: {e}") from e
        if not callable(function):
            raise InputError(f"{name} is no function")
        self.name = name
        self._function: Callable[[np.ndarray, int], Any] = function

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """What the function gives."""
        found = self._function(samples, rate)
        if isinstance(found, Transcript):
            return found
        return Transcript(found) if isinstance(found, str) else read_transcript(found)


def _write_wav(path: Path, samples: Float[np.ndarray, " n"], rate: int) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(np.round(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def make_recognizer(name: str, *, language: str = "en", sentences: Sequence[str] = ()) -> CheckedRecognizer:
    """A recogniser by what a user calls it.

    Args:
      name: a command with ``{wav}``; ``module:function``; ``whisper``, Whisper base from its wheels, or
        ``whisper:FOLDER``, any in CTranslate2's format; ``pocketsphinx``.
      language: that is spoken.
      sentences: with ``pocketsphinx``, all that may be said: a closed grammar.

    Raises:
      InputError: if there is none of this name.
      JudgeError: if its package is not installed, or its weights are not those that are known.
    """
    # a name without any of these is one of ours: what is needed for it is imported here alone
    kind, _, folder = name.partition(":")
    if WAV_PLACE in name:
        return CheckedRecognizer(CommandRecognizer(name))
    if kind == "whisper":
        from omni_jax.evaluation.whisper_recognizer import WhisperRecognizer, assemble_weights

        return CheckedRecognizer(WhisperRecognizer(Path(folder) if folder else assemble_weights(), language))
    if name == "pocketsphinx":
        from omni_jax.evaluation.sphinx_recognizer import SphinxRecognizer

        return CheckedRecognizer(SphinxRecognizer(sentences))
    if folder:
        return CheckedRecognizer(FunctionRecognizer(name))
    raise InputError(
        f"there is no recogniser {shown(name)}; name a command with {WAV_PLACE}, a function as module:function, "
        "whisper, whisper:FOLDER or pocketsphinx"
    )
