"""How much codes say of who speaks: the accuracy of a simple classifier on the codes of an utterance.

Codes of which a classifier cannot tell the speaker leave the voice to what Token2Wav is given beside them (timbre
disentanglement, paper section 4.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from omni_jax.errors import InputError


class SpeakerProbe:
    """Naive Bayes over how often each code is in an utterance.

    Attributes:
      speakers: their names, in order.
    """

    def __init__(self, codes: Sequence[Int[np.ndarray, " n"]], speakers: Sequence[str], num_codes: int) -> None:
        """Counts the codes of each speaker.

        Args:
          codes: of each utterance.
          speakers: who speaks each.
          num_codes: of the codebook.

        Raises:
          InputError: if fewer than two speakers are there, or a code is none of the codebook.
        """
        self.speakers = sorted(set(speakers))
        if len(self.speakers) < 2:
            raise InputError(f"a probe needs two speakers at least, and there are {len(self.speakers)}")
        self._num_codes = num_codes
        counts = np.zeros((len(self.speakers), num_codes))  # [speakers, codes]
        for of_utterance, speaker in zip(codes, speakers, strict=True):
            counts[self.speakers.index(speaker)] += self._count(of_utterance)
        # one more of each, so that a code that a speaker never had is not impossible
        smoothed = counts + 1
        self._log_frequencies: Float[np.ndarray, "speakers codes"] = np.log(
            smoothed / smoothed.sum(axis=1, keepdims=True)
        )

    def guess(self, codes: Int[np.ndarray, " n"]) -> str:
        """The likeliest speaker of an utterance."""
        return self.speakers[int(np.argmax(self._log_frequencies @ self._count(codes)))]

    def accuracy(self, codes: Sequence[Int[np.ndarray, " n"]], speakers: Sequence[str]) -> float:
        """Share of utterances whose speaker it guesses.

        Raises:
          InputError: if there is no utterance.
        """
        if not codes:
            raise InputError("there is no utterance to guess the speaker of")
        count = 0
        for of_utterance, speaker in zip(codes, speakers, strict=True):
            count += self.guess(of_utterance) == speaker
        return count / len(codes)

    def _count(self, codes: Int[np.ndarray, " n"]) -> Float[np.ndarray, " codes"]:
        if len(codes) and not 0 <= codes.min() <= codes.max() < self._num_codes:
            raise InputError(f"codes are {codes.min()} to {codes.max()}; the codebook has 0 to {self._num_codes - 1}")
        return np.bincount(codes, minlength=self._num_codes).astype(np.float64)
