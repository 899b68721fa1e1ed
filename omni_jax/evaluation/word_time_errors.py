"""How far times of words are from those of a recogniser's forced alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from omni_jax.evaluation.sphinx_recognizer import SphinxRecognizer
from omni_jax.processing.word_times import find_word_times


@dataclass(frozen=True)
class WordTimeErrors:
    """Errors of words' beginnings and ends together.

    Attributes:
      words: that were compared.
      median, percentile_90: absolute, in seconds.
    """

    words: int
    median: float
    percentile_90: float


def measure_word_times(
    texts: Sequence[str], sounds: Sequence[Float[np.ndarray, " n"]], rate: int
) -> WordTimeErrors | None:
    """Compares ``find_word_times`` with Pocketsphinx, which is told each text.

    Args:
      texts: all that each sound says.
      sounds: mono, from -1 to 1.
      rate: samples a second.

    Returns:
      The errors; None where no text was aligned with its sound.

    Raises:
      InputError: if Pocketsphinx does not know a word.
      JudgeError: if it is not installed.
    """
    errors: list[float] = []
    for text, samples in zip(texts, sounds, strict=True):
        found = find_word_times(text, samples, rate)
        aligned = SphinxRecognizer(sentences=[text]).transcribe(samples, rate).words or ()
        # none where the sound says something else, and another number where a word is parted in one of them alone
        if len(aligned) == len(found):
            for ours, theirs in zip(found, aligned, strict=True):
                errors += [abs(ours.begin - theirs.begin), abs(ours.end - theirs.end)]
    if not errors:
        return None
    return WordTimeErrors(len(errors) // 2, float(np.median(errors)), float(np.percentile(errors, 90)))
