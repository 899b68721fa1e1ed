"""Rows of sound with its text to examples for the speech tokenizer.

A row is ``{"audio": ..., "text": "what is said"}``. The text's labels are the bytes of UTF-8 of its letters and digits,
in lower case and with single spaces: what can be told from the sound.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from omni_jax.checks import shown
from omni_jax.data.examples import Reject, TooLong, examples_or_reject
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import Row
from omni_jax.errors import InputError, TooLongError
from omni_jax.processing.audio import MelSettings, log_mel
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.speech_mel import RATE, speech_log_mel

NO_LABEL = 0
_APOSTROPHE = "'"


@dataclass(frozen=True)
class TranscribedExample:
    """What one row is trained on.

    Attributes:
      mel: log-mel of the tokenizer (``processing.audio``).
      target_mel: log-mel of Token2Wav (``processing.speech_mel``), as many frames.
      labels: of the text; a byte and one.
      name: of the row.
    """

    mel: Float[np.ndarray, "frames M"]
    target_mel: Float[np.ndarray, "frames 80"]
    labels: Int[np.ndarray, " L"]
    name: str

    @property
    def num_tokens(self) -> int:
        """Codes."""
        return (len(self.mel) + 1) // 2


@dataclass(frozen=True)
class PrepareTranscribed:
    """Reads a row and its sound.

    Attributes:
      mel: how sound becomes frames.
      max_codes: of an example.
      max_labels: of an example.
      access: from where sound may be fetched.
      media_root: the folder that it must lie within; None: that of the row's file.
      too_long: whether a row that is too long ends the run ("error"); there is no splitting.
    """

    mel: MelSettings
    max_codes: int
    max_labels: int
    access: RemoteAccess
    media_root: str | None = None
    too_long: TooLong = "skip"

    def __call__(self, row: Row) -> list[TranscribedExample] | Reject:
        """The row's example; or, if anything is wrong with it, why it cannot be used."""
        return examples_or_reject(lambda row: [self.example(row)], row, self.too_long)

    def example(self, row: Row) -> TranscribedExample:
        """Of a row.

        Raises:
          InputError: if it is not what it should be.
          TooLongError: if its sound or its text is too long.
        """
        values = row_values(row)
        return self.make(row, values, self.read_samples(row, values))

    def read_samples(self, row: Row, values: Mapping[str, Any]) -> Float[np.ndarray, " n"]:
        """The sound of a row, at ``speech_mel.RATE``, once its text has been looked at.

        Raises:
          InputError: if it or its text is not what it should be.
        """
        text = values.get("text")
        if not isinstance(text, str):
            raise InputError(f"text is {shown(text)}; it must be what is said")
        if not len(text_labels(text)):
            raise InputError(f"text is {shown(text)}, which has no letters")
        return read_sound(row, values, "audio", RATE, self.access, self.media_root)

    def make(self, row: Row, values: Mapping[str, Any], samples: Float[np.ndarray, " n"]) -> TranscribedExample:
        """The example of a row whose sound was read; see ``example``."""
        labels = text_labels(values["text"])
        target = speech_log_mel(samples)
        mel = log_mel(samples, self.mel)
        # the last frame of the one may see less than a hop of sound, for which the other has none
        target = np.concatenate([target, np.repeat(target[-1:], len(mel) - len(target), axis=0)])
        example = TranscribedExample(mel, target, labels, row.name)
        if example.num_tokens > self.max_codes:
            raise TooLongError(f"it has {example.num_tokens} codes, over {self.max_codes} (objective.max_codes)")
        if len(labels) > self.max_labels:
            raise TooLongError(f"its text has {len(labels)} labels, over {self.max_labels} (objective.max_labels)")
        # a path of labels needs another one between two that are equal
        least = len(labels) + int(np.sum(labels[1:] == labels[:-1]))
        if least > example.num_tokens:
            raise InputError(
                f"its text has {len(labels)} labels and its sound {example.num_tokens} codes, too few to say it"
            )
        return example


def text_labels(text: str) -> Int[np.ndarray, " L"]:
    """The labels of a text; none of one without letters and digits."""
    kept = []
    for character in unicodedata.normalize("NFKC", text).casefold():
        if character == _APOSTROPHE or unicodedata.category(character)[0] in "LNM":
            kept.append(character)
        else:
            kept.append(" ")
    words = "".join(kept).split()
    data = " ".join(words).encode()
    return np.frombuffer(data, np.uint8).astype(np.int32) + 1


def labels_text(labels: Int[np.ndarray, " L"]) -> str:
    """The text of labels, as ``text_labels`` takes it."""
    return bytes((labels - 1).astype(np.uint8)).decode(errors="replace")
