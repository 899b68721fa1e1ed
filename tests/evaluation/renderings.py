"""Sounds whose words and pauses are known: noise where somebody speaks, and hardly any where nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.word_times import Word

RATE = 16_000
WORD_SECONDS = 0.3
SPEECH_LEVEL = 0.2
NOISE_LEVEL = 1e-4  # of the silences: 66 dB below
FADE = 0.02  # seconds, at both ends of a word


@dataclass(frozen=True)
class Rendering:
    """A sound, and what a recogniser that makes no errors finds in it."""

    samples: Float[np.ndarray, " n"]
    transcript: Transcript


def render(text: str, lead: float = 0.1, tail: float = 0.1) -> Rendering:
    """Of words with pauses in seconds between them, as "Good (0.3) morning"; a word without one follows at once.

    Args:
      text: words and pauses.
      lead, tail: silence before the first and behind the last word, in seconds.
    """
    rng = np.random.default_rng(0)
    pieces = [silence(lead, rng)]
    words = []
    time = lead
    for item in text.split():
        if item.startswith("("):
            pieces.append(silence(float(item.strip("()")), rng))
            time += float(item.strip("()"))
        else:
            pieces.append(noise(WORD_SECONDS, rng))
            words.append(Word(item, time, time + WORD_SECONDS, 0.9))
            time += WORD_SECONDS
    pieces.append(silence(tail, rng))
    spoken = " ".join(word.text for word in words)
    return Rendering(np.concatenate(pieces).astype(np.float32), Transcript(spoken, tuple(words)))


def noise(seconds: float, rng: np.random.Generator) -> np.ndarray:
    samples = SPEECH_LEVEL * rng.standard_normal(round(seconds * RATE))
    fade = np.minimum(1, np.arange(len(samples)) / (FADE * RATE))
    return samples * fade * fade[::-1]


def silence(seconds: float, rng: np.random.Generator) -> np.ndarray:
    return NOISE_LEVEL * rng.standard_normal(round(seconds * RATE))


@dataclass
class FakeRecognizer:
    """Gives the transcripts that it was made with, one after the other."""

    transcripts: Sequence[Transcript]
    name: str = "fake"
    calls: int = field(default=0)

    def transcribe(self, samples: np.ndarray, rate: int) -> Transcript:
        self.calls += 1
        return self.transcripts[self.calls - 1]
