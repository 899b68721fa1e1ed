"""Words of a text beside the words that a recogniser found: which belong together, and what lies between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jiwer

from omni_jax.evaluation.transcripts import Word

Pause = Literal["none", "clause", "sentence"]

_SENTENCE_ENDS = ".?!…。？！"
_CLAUSE_ENDS = ",;:，；：、"
_DASHES = "-–—"  # on their own, between spaces; within a word they part it
# writing without spaces: a word each; of other writing, letters and digits with apostrophes within
_WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[^\\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+(?:['’][^\\W_]+)*"
)


@dataclass(frozen=True)
class ExpectedWord:
    """A word of a text that is to be spoken.

    Attributes:
      text: lower case, without punctuation.
      pause: that the punctuation behind it asks for.
    """

    text: str
    pause: Pause


def split_text(text: str) -> list[ExpectedWord]:
    """The words of a text, and the pauses that its punctuation asks for."""
    matches = list(_WORD.finditer(text))
    words = []
    for number, match in enumerate(matches):
        end = matches[number + 1].start() if number + 1 < len(matches) else len(text)
        words.append(ExpectedWord(match.group().lower(), _find_pause(text[match.end() : end])))
    return words


def _find_pause(between: str) -> Pause:
    """What stands between two words asks for.

    A point or a comma asks for none within a number ("3.5"), where no space follows.
    """
    if not between.strip():
        return "none"
    is_joined = len(between) == 1 and between in ".,:'’-"
    if is_joined:
        return "none"
    if any(character in _SENTENCE_ENDS for character in between):
        return "sentence"
    has_dash = any(character in _DASHES for character in between)
    return "clause" if has_dash or any(character in _CLAUSE_ENDS for character in between) else "none"


def split_words(words: Sequence[Word]) -> list[Word]:
    """The words of a transcript as ``split_text`` has them; the parts of one share its time by their letters."""
    found = []
    for word in words:
        parts = [match.group().lower() for match in _WORD.finditer(word.text)]
        num_letters = sum(map(len, parts))
        begin = word.begin
        for part in parts:
            end = begin + (word.end - word.begin) * len(part) / num_letters
            found.append(Word(part, begin, end, word.probability))
            begin = end
    return found


def align(expected: Sequence[str], found: Sequence[str]) -> list[int | None]:
    """For each expected word the place of the one that was found for it, right or wrong; None if it is missing."""
    places: list[int | None] = [None] * len(expected)
    if not expected or not found:
        return places
    (chunks,) = jiwer.process_words(" ".join(expected), " ".join(found)).alignments
    for chunk in chunks:
        if chunk.type in ("equal", "substitute"):
            for offset in range(chunk.ref_end_idx - chunk.ref_start_idx):
                places[chunk.ref_start_idx + offset] = chunk.hyp_start_idx + offset
    return places
