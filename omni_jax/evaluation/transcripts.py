"""What recognisers of speech give: text, and the times of its words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from omni_jax.checks import shown
from omni_jax.errors import JudgeError
from omni_jax.processing.word_times import Word

_LATE = 0.5  # seconds that a word may end behind the sound: recognisers count in frames, and pad


@dataclass(frozen=True)
class Transcript:
    """What was recognised in a sound.

    Attributes:
      text: empty where nobody speaks.
      words: of the text in order; None if the recogniser gives no times.
    """

    text: str
    words: tuple[Word, ...] | None = None


class Recognizer(Protocol):
    """From sound to text.

    Attributes:
      name: of the recogniser and its weights, with their version or hash: it stands beside each figure.
    """

    @property
    def name(self) -> str: ...

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """The transcript of mono sound from -1 to 1 with so many samples a second."""
        ...


def read_transcript(values: Any) -> Transcript:
    """Of an object as commands print it.

    Raises:
      JudgeError: if it is none.
    """
    if not isinstance(values, dict) or not set(values) <= {"text", "words"} or not values:
        raise JudgeError(f"gave {shown(values)}; it must be an object with text, words or both")
    words = None
    if "words" in values:
        if not isinstance(values["words"], list):
            raise JudgeError(f"gave words {shown(values['words'])}; they must be a list")
        words = tuple(_read_word(word) for word in values["words"])
    if "text" in values:
        return Transcript(values["text"], words)
    return Transcript(" ".join(word.text.strip() for word in words or ()), words)


def _read_word(values: Any) -> Word:
    try:
        return Word(values["text"], values["begin"], values["end"], values.get("probability"))
    except (TypeError, LookupError, AttributeError) as e:
        raise JudgeError(f"gave the word {shown(values)}; it must be an object with text, begin and end") from e


def check_transcript(transcript: Any, seconds: float) -> Transcript:
    """What a recogniser gave for a sound of so many seconds.

    Raises:
      JudgeError: if it is no transcript of such a sound.
    """
    if not isinstance(transcript, Transcript) or not isinstance(transcript.text, str):
        raise JudgeError(f"gave {shown(transcript)}, which is no transcript")
    if transcript.words is None:
        return transcript
    last_begin = 0.0
    for word in transcript.words:
        times = (word.begin, word.end, 0.0 if word.probability is None else word.probability)
        is_number = all(isinstance(time, int | float | np.floating) and math.isfinite(time) for time in times)
        if not isinstance(word.text, str) or not is_number:
            raise JudgeError(f"gave the word {shown(word)}, whose times are no numbers")
        if not last_begin <= word.begin <= word.end <= seconds + _LATE:
            raise JudgeError(f"gave the word {shown(word)}, out of order or outside of the sound's {seconds:.2f} s")
        last_begin = word.begin
    if transcript.words and not transcript.text.strip():
        raise JudgeError(f"gave {len(transcript.words)} words and no text")
    return transcript
