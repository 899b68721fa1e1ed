"""Words of a text that is to be spoken, and the pauses that its punctuation asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Pause = Literal["none", "clause", "sentence"]

_SENTENCE_ENDS = ".?!…。？！"
_CLAUSE_ENDS = ",;:，；：、"
_DASHES = "-–—"  # on their own, between spaces; within a word they part it
# writing without spaces: a word each; of other writing, letters and digits with apostrophes within
WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    "|[^\\W_\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+(?:['’][^\\W_]+)*"
)


@dataclass(frozen=True)
class ExpectedWord:
    """A word of a text that is to be spoken.

    Attributes:
      text: lower case, without punctuation.
      pause: that the punctuation behind it asks for.
      begin, end: its characters in the text.
    """

    text: str
    pause: Pause
    begin: int = field(compare=False)
    end: int = field(compare=False)


def split_text(text: str) -> list[ExpectedWord]:
    """The words of a text, and the pauses that its punctuation asks for."""
    matches = list(WORD.finditer(text))
    words = []
    for number, match in enumerate(matches):
        end = matches[number + 1].start() if number + 1 < len(matches) else len(text)
        words.append(ExpectedWord(match.group().lower(), _find_pause(text[match.end() : end]), *match.span()))
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
