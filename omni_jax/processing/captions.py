"""Captions of speech whose words have times, as SubRip (.srt) and WebVTT (.vtt) have them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from omni_jax.processing.spoken_text import split_text
from omni_jax.processing.word_times import Word

CaptionFormat = Literal["srt", "vtt"]
CAPTION_FORMATS: tuple[str, ...] = get_args(CaptionFormat)
_WIDTH = 84  # of a caption, two lines of 42 letters; letters of Chinese, Japanese and Korean take two
_SECONDS = 7.0  # that a caption stays, at most
_PAUSE = 1.0  # seconds of silence, behind which another caption begins


@dataclass(frozen=True)
class Caption:
    """What is shown at once.

    Attributes:
      text: on one line.
      begin, end: seconds.
    """

    text: str
    begin: float
    end: float


def make_captions(text: str, words: Sequence[Word]) -> list[Caption]:
    """Captions of whole sentences where they fit.

    Args:
      text: that is spoken.
      words: all of the text (``find_word_times``).
    """
    spoken = split_text(text)
    assert len(spoken) == len(words) or not words
    begins = [0, *(word.begin for word in spoken[1:]), len(text)]
    captions = []
    first = 0
    for number, word in enumerate(words):
        is_last = number + 1 == len(words)
        if is_last or _ends(text[begins[first] : begins[number + 2]], words[first : number + 2], spoken[number].pause):
            shown = " ".join(text[begins[first] : begins[number + 1]].split())
            captions.append(Caption(shown, words[first].begin, word.end))
            first = number + 1
    return captions


def _ends(with_next: str, words: Sequence[Word], pause: str) -> bool:
    """Whether a caption ends before the last of these words."""
    width = sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in with_next.strip())
    too_long = width > _WIDTH or words[-1].end - words[0].begin > _SECONDS
    return pause == "sentence" or too_long or words[-1].begin - words[-2].end > _PAUSE


def write_captions(captions: Sequence[Caption], caption_format: CaptionFormat) -> str:
    """A file of captions."""
    blocks = ["WEBVTT\n"] if caption_format == "vtt" else []
    mark = "." if caption_format == "vtt" else ","
    for number, caption in enumerate(captions, start=1):
        times = f"{_clock(caption.begin, mark)} --> {_clock(caption.end, mark)}"
        # in WebVTT these begin markup, and neither format may have an arrow in the text
        shown = caption.text.replace("-->", "→")
        if caption_format == "vtt":
            shown = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        blocks.append(f"{number}\n{times}\n{shown}\n")
    return "\n".join(blocks)


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(1000 * seconds)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{mark}{milliseconds % 1000:03d}"
