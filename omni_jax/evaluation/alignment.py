"""Words of a text beside the words that a recogniser found: which belong together, and what lies between them."""

from __future__ import annotations

from collections.abc import Sequence

import jiwer

from omni_jax.processing.spoken_text import WORD
from omni_jax.processing.word_times import Word


def split_words(words: Sequence[Word]) -> list[Word]:
    """The words of a transcript as ``split_text`` has them; the parts of one share its time by their letters."""
    found = []
    for word in words:
        parts = [match.group().lower() for match in WORD.finditer(word.text)]
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
