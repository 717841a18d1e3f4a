"""Rate limit for log records of events that peers can cause."""

from __future__ import annotations

import math


class Sparse:
    """Admits the first `most` events in each period of `seconds`, and counts the others.

    A period begins with the first event after the end of the previous one.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.seconds = seconds
        self._most = most
        self._end = -math.inf
        self._admitted = 0
        self._missed = 0

    def admit(self, now: float) -> bool:
        """Return whether to log an event that happens at `now`, in seconds of any clock."""
        if now >= self._end:
            self._end = now + self.seconds
            self._admitted = 0
        if self._admitted < self._most:
            self._admitted += 1
            return True
        self._missed += 1
        return False

    def take_missed(self) -> int:
        """Return the number of events not admitted since the last call, for a summary in the log."""
        missed, self._missed = self._missed, 0
        return missed
