"""Pocketsphinx with its own US English model: an open vocabulary, or a closed grammar of sentences or words.

What a closed grammar finds is no open judgement: it can only be among what the grammar has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from omni_jax.checks import shown
from omni_jax.errors import InputError
from omni_jax.evaluation.judge_files import Package
from omni_jax.evaluation.transcripts import Transcript
from omni_jax.processing.audio import resample
from omni_jax.processing.word_times import Word

_PACKAGE = Package("pocketsphinx", "5.1.1")
_FILES = {
    "pocketsphinx/model/en-us/en-us/means": "832019e32cac12eb318964f96f469034acb12d0348eeddc3831831a100cb4dd4",
    "pocketsphinx/model/en-us/en-us.lm.bin": "db21d0642286677699e6dbc859d2e5395570222361999387ce60f6e1d01995d6",
    "pocketsphinx/model/en-us/cmudict-en-us.dict": "20b5c293e1f311fb375fe067e500ec5636f4fc7af5594967263696def9b23bfe",
}
_RATE = 16_000  # Hz
_FRAMES_PER_SECOND = 100
_VARIANT = re.compile(r"\(\d+\)$")  # of how a word is spoken: "the(2)"
_GRAMMAR = "grammar"


class SphinxRecognizer:
    """A decoder that begins each sound anew.

    Attributes:
      name: of the program and the models, and whether its grammar is closed.
    """

    def __init__(self, sentences: Sequence[str] = (), *, words: Sequence[str] = ()) -> None:
        """Loads the models.

        Args:
          sentences: all that may be said, each as a whole.
          words: that may follow each other in any order and number. With neither all of English may be said.

        Raises:
          InputError: for both, or a word that the dictionary does not have.
          JudgeError: if the package is not installed or another.
        """
        digests = []
        for path, sha256 in _FILES.items():
            _PACKAGE.find_file(path, sha256)
            digests.append(sha256[:8])
        from pocketsphinx import Decoder  # pyright: ignore[reportMissingImports], an extra

        if sentences and words:
            raise InputError("a closed grammar has either sentences or words")
        closed = [split_words(text) for text in sentences] or [split_words(text) for text in words]
        self.name = f"pocketsphinx {_PACKAGE.version} (SHA-256 {' '.join(digests)})"
        if not closed:
            self._decoder = Decoder(samprate=_RATE, loglevel="FATAL")
            self.name += ", open vocabulary"
            return
        # without the second search, over the lattice of words: where any may follow any other it takes thirty times as
        # long as the first, and is no better (docs/speech-training.md, Rewards)
        self._decoder = Decoder(samprate=_RATE, loglevel="FATAL", lm=None, bestpath=False)
        unknown = set()
        for sentence in closed:
            unknown |= {word for word in sentence if self._decoder.lookup_word(word) is None}
        if unknown:
            raise InputError(f"the dictionary of pocketsphinx does not have {', '.join(map(shown, sorted(unknown)))}")
        self._decoder.add_jsgf_string(_GRAMMAR, _write_grammar(closed, repeats=bool(words)))
        self._decoder.activate_search(_GRAMMAR)
        self.name += f", a closed grammar of {len(closed)} {'words' if words else 'sentences'}"

    def transcribe(self, samples: Float[np.ndarray, " n"], rate: int) -> Transcript:
        """What is said, with the times of words; empty where nothing of the grammar is found."""
        sound = resample(samples, rate, _RATE)
        pcm = np.round(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes()
        decoder = self._decoder
        decoder.reinit_feat()  # or the mean of the sounds before would count
        decoder.start_utt()
        decoder.process_raw(pcm, full_utt=True)
        decoder.end_utt()
        if decoder.hyp() is None:
            return Transcript("", ())
        words = []
        for segment in decoder.seg():
            text = _VARIANT.sub("", segment.word)
            # <s>, <sil>, [NOISE], ++breath++, (NULL) where the grammar begins and ends
            if not text.startswith(("<", "[", "+", "(")):
                end = (segment.end_frame + 1) / _FRAMES_PER_SECOND
                words.append(Word(text, segment.start_frame / _FRAMES_PER_SECOND, end))
        return Transcript(" ".join(word.text for word in words), tuple(words))


def split_words(text: str) -> list[str]:
    """Words as the dictionary has them: lower case, without punctuation.

    Raises:
      InputError: if there is none.
    """
    words = re.findall(r"[\w']+", text.lower())
    if not words:
        raise InputError(f"{shown(text)} has no word")
    return words


def _write_grammar(sentences: Sequence[Sequence[str]], *, repeats: bool) -> str:
    """In JSGF."""
    alternatives = " | ".join(dict.fromkeys(" ".join(words) for words in sentences))
    return f"#JSGF V1.0; grammar {_GRAMMAR}; public <all> = ({alternatives}){'+' if repeats else ''};"
