"""Whether two sounds are of one voice: the cosine of their speaker vectors, by Resemblyzer.

Its wheel (Apache-2.0) holds the weights of a network of the GE2E loss (Wan et al. 2018). It names a package that has to
be compiled, so it is installed apart: ``pip install --no-deps Resemblyzer==0.1.4``, beside ``omni_jax[judges]`` and
PyTorch, which this package itself never imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation.judge_files import Package

_PACKAGE = Package("Resemblyzer", "0.1.4", "pip install --no-deps Resemblyzer==0.1.4 && pip install omni_jax[judges]")
_WEIGHTS = "resemblyzer/pretrained.pt"
_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
_LEAST_SECONDS = 0.5  # of speech; a vector of less says little


class SpeakerJudge:
    """From sound to the vector of its voice.

    Attributes:
      name: of the package and its weights.
    """

    def __init__(self) -> None:
        """Loads the weights.

        Raises:
          JudgeError: if the package is not installed or another.
        """
        # before the library reads it: the file is a pickle, which could run anything
        _PACKAGE.find_file(_WEIGHTS, _SHA256)
        try:
            import resemblyzer  # pyright: ignore[reportMissingImports], an extra

            self._encoder = resemblyzer.VoiceEncoder("cpu", verbose=False)
        except Exception as e:  # what it needs may be missing, or of another version
            raise JudgeError(f"cannot load Resemblyzer: {type(e).__name__}: {e}; {_PACKAGE.advice}") from e
        self._preprocess = resemblyzer.preprocess_wav
        self.name = f"Resemblyzer {_PACKAGE.version} (SHA-256 {_SHA256[:12]})"

    def embed(self, samples: Float[np.ndarray, " n"], rate: int) -> Float[np.ndarray, "256"]:
        """The vector of a voice, of length 1; float32.

        Raises:
          JudgeError: if there is too little speech in the sound, or the library fails.
        """
        try:
            speech = self._preprocess(samples.astype(np.float32), rate)  # 16 kHz, without long silences
            if len(speech) < _LEAST_SECONDS * 16_000:
                raise JudgeError(f"there is less than {_LEAST_SECONDS} s of speech in the sound")
            return np.asarray(self._encoder.embed_utterance(speech), np.float32)
        except JudgeError:
            raise
        except Exception as e:
            raise JudgeError(f"{self.name}: {type(e).__name__}: {e}") from e


def cosine(first: Float[np.ndarray, " D"], second: Float[np.ndarray, " D"]) -> float:
    """From -1 to 1."""
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    if not norm > 0:
        raise JudgeError("a speaker vector is zero or no number")
    return float(first @ second) / norm


def count_own_voice(
    vectors: Sequence[tuple[str, Float[np.ndarray, " D"]]], voices: Mapping[str, Float[np.ndarray, " D"]]
) -> tuple[int, int]:
    """How many sounds are nearer to their own voice than to any other.

    Args:
      vectors: of each sound, with the name of its voice.
      voices: a vector of each voice, for instance of another sound of it.

    Returns:
      How many are, and of how many.

    Raises:
      InputError: if there are fewer than two voices, or a sound's is not among them.
    """
    missing = {name for name, _ in vectors} - set(voices)
    if missing or len(voices) < 2:
        raise InputError(f"there are {len(voices)} voices, and none of {', '.join(sorted(missing)) or 'others'}")
    count = 0
    for name, vector in vectors:
        similarities = {other: cosine(vector, own) for other, own in voices.items()}
        count += max(similarities, key=lambda other: similarities[other]) == name
    return count, len(vectors)
