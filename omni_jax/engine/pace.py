"""How long Token2Wav takes, for those who have to plan: a player that starts, and lists that streams leave time for."""

from __future__ import annotations

from collections import deque

_NUM_INTERVALS = 16  # of the last pieces of any stream


class Pace:
    """What has been measured so far.

    Attributes:
      seconds_per_block: of a list of whole replies; from a stream, whose blocks cost more, where no list was made yet;
        None where nothing is known.
    """

    def __init__(self) -> None:
        self.seconds_per_block: float | None = None
        self._is_of_list = False
        self._intervals: deque[float] = deque(maxlen=_NUM_INTERVALS)

    def add_list(self, seconds: float, num_blocks: int) -> None:
        """Notes what a list of so many blocks took."""
        self.seconds_per_block = seconds / num_blocks
        self._is_of_list = True

    def add_piece(self, seconds: float, num_blocks: int) -> None:
        """Notes what a later piece of a stream took, of so many blocks."""
        if not self._is_of_list:
            self.seconds_per_block = seconds / num_blocks

    def add_interval(self, seconds: float) -> None:
        """Notes the time from one piece of a stream to the next, with all that was done between them."""
        self._intervals.append(seconds)

    def hold_back(self, first_seconds: float) -> float | None:
        """Seconds that a player should wait before it starts with a first piece of so many seconds.

        The next piece then comes in time, if it takes no longer than any of the last ones. None where there were none.
        """
        if not self._intervals:
            return None
        return max(max(self._intervals) - first_seconds, 0.0)
