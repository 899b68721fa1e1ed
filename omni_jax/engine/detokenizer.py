"""From the token ids of a reply, as they come, to its text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol


class TextStream(Protocol):
    """From token ids to characters (``processing.tokenizer.TextStream``)."""

    def push(self, token: int) -> str:
        """Takes a token; returns the characters that it completes."""
        ...

    def flush(self) -> str:
        """Ends the text; returns what is left of it."""
        ...


class Detokenizer:
    """The text of one reply.

    Attributes:
      token_ids: so far, the end mark included.
      finish_reason: once the text is complete.
    """

    def __init__(self, stream: TextStream, stop_ids: Iterable[int], stop: Iterable[str] = ()):
        """For a reply that has not begun.

        Args:
          stream: from token ids to characters.
          stop_ids: ids that end the reply.
          stop: strings that end it; they are not part of the text.
        """
        self.token_ids: list[int] = []
        self.finish_reason: Literal["stop", "length"] | None = None
        self._stream = stream
        self._stop_ids = frozenset(stop_ids)
        self._stop = tuple(stop)
        self._text = ""
        self._num_emitted = 0  # characters that have been returned
        self._starts: list[int] = []  # of each token, where its characters begin in the text
        self._is_cut = False  # whether a stop string was removed

    @property
    def finished(self) -> bool:
        """Whether the text is complete."""
        return self.finish_reason is not None

    @property
    def text(self) -> str:
        """What is certain of the text."""
        return self._text[: self._num_emitted]

    @property
    def has_stop_strings(self) -> bool:
        return bool(self._stop)

    @property
    def num_spoken(self) -> int:
        """Tokens that the Talker is given, as far as that is known.

        Of a finished reply these are the tokens of the text and the one after them, which ends it; of a stop string
        nothing is spoken but what shares a token with the text. While the text goes on, they are the tokens that no
        stop string can remove any more.
        """
        if not self.finished:
            # a token whose characters are held back may still be removed, so it is not to be spoken
            return self._count_before(self._num_emitted) if self._stop else len(self.token_ids)
        # one more than the text has: the Talker never reads the last token, which marks the end
        if self._is_cut:
            return min(self._count_before(len(self._text)) + 1, len(self.token_ids))
        return len(self.token_ids)

    def push(self, tokens: Iterable[int]) -> str:
        """Takes tokens and returns the text that is certain now; tokens after the end are passed over."""
        for token in tokens:
            if self.finished:
                break
            self.token_ids.append(int(token))
            # before the text grows: the characters of this token begin at its present end
            self._starts.append(len(self._text))
            if token in self._stop_ids:
                # a stop id stays among the ids of the reply, and adds no characters
                self._finish("stop")
            else:
                self._append(self._stream.push(int(token)))
        return self._emit()

    def finish(self) -> str:
        """Says that no token follows; returns the rest of the text."""
        if not self.finished:
            self._finish("length")
        return self._emit()

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        # bytes that complete no character come out now, as U+FFFD
        self._append(self._stream.flush())
        # the flush may have completed a stop string
        self.finish_reason = self.finish_reason or reason

    def _append(self, piece: str) -> None:
        self._text += piece
        place = self._find_stop()
        if place is not None:
            self._text = self._text[:place]
            self._is_cut = True
            self.finish_reason = "stop"

    def _find_stop(self) -> int | None:
        """Where the first stop string begins in the text; None if it holds none."""
        # the whole text is searched: a stop string may have begun in an earlier piece
        first = None
        for string in self._stop:
            place = self._text.find(string)
            if place >= 0 and (first is None or place < first):
                first = place
        return first

    def _emit(self) -> str:
        end = len(self._text)
        if not self.finished:
            # what may be the beginning of a stop string has to wait
            overlap = 0
            for string in self._stop:
                overlap = max(overlap, _count_overlap(self._text, string))
            end -= overlap
        # what was returned once cannot be taken back
        piece = self._text[self._num_emitted : max(end, self._num_emitted)]
        self._num_emitted += len(piece)
        return piece

    def _count_before(self, end: int) -> int:
        """Tokens whose characters begin before a place in the text."""
        return sum(start < end for start in self._starts)


def _count_overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of the stop string."""
    # the longest beginning first; the whole string would have ended the text already
    for count in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
