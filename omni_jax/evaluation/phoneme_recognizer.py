"""Phonemes by hama, which knows no words: what it finds is not mended by a language model, as words are.

It has a model of how texts are pronounced too, so that what is expected is written in the same symbols.
"""

from __future__ import annotations

import re

import numpy as np
from jaxtyping import Float

from omni_jax.evaluation.judge_files import Package
from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.audio import resample
from omni_jax.processing.word_times import Word

_PACKAGE = Package("hama", "1.7.0")
_SHA256 = {
    "hama/assets/asr_waveform.hama": "a9fcfe73e179ca48e399cd76a90a6b3e1887bf5037ecc52b778d13a149563328",
    "hama/assets/encoder.hama": "ae527c1aa758cd1b038c63d4d768d05313adce7c50706c5366600ab4f4ef8d75",
    "hama/assets/decoder_step.hama": "9ac34717f88b7bed2ef84a779b6fda1ec24b0b88d37bb813631493116581369d",
}
_RATE = 16_000  # Hz


class PhonemeRecognizer:
    """English and Korean.

    Attributes:
      name: of the package and its weights.
    """

    def __init__(self) -> None:
        """Loads the weights.

        Raises:
          JudgeError: if the package is not installed or another.
        """
        for path, sha256 in _SHA256.items():
            _PACKAGE.find_file(path, sha256)
        import hama  # pyright: ignore[reportMissingImports], an extra

        self._recognizer = hama.ASRModel()
        self._pronunciation = hama.G2PModel()
        digests = [sha256[:8] for sha256 in _SHA256.values()]
        self.name = f"hama {_PACKAGE.version} (SHA-256 {' '.join(digests)}), phonemes"

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """Phonemes with spaces between them; each has its times, which are coarse."""
        if not len(samples):
            return Transcript("", ())
        result = self._recognizer(resample(samples, rate, _RATE), _RATE)
        seconds = len(samples) / rate
        words = []
        for span in self._recognizer.phoneme_spans(result):
            begin = min(span.start_ms / 1000, seconds)
            words.append(Word(span.phoneme, begin, max(begin, min(span.end_ms / 1000, seconds))))
        return Transcript(" ".join(word.text for word in words), tuple(words))

    def phonemize(self, text: str) -> str:
        """How a text is pronounced, word by word: phonemes with spaces between them."""
        phonemes = []
        for word in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", text.lower()):
            for alignment in self._pronunciation.predict(word).alignments:
                if alignment.phoneme.strip():
                    phonemes.append(alignment.phoneme)
        return " ".join(phonemes)
