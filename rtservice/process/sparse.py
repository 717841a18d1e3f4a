"""Rate limit for log records of events whose number a peer decides."""

from __future__ import annotations

import math


class Sparse:
    """Admits the first `most` events of each `seconds`, and counts the others.

    The time begins with the first event after the last one is over.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.seconds = seconds
        self._most = most
        self._end = -math.inf
        self._admitted = 0
        self._missed = 0

    def admit(self, now: float) -> bool:
        """Whether an event is to be logged that happens now, in seconds of any clock."""
        if now >= self._end:
            self._end = now + self.seconds
            self._admitted = 0
        if self._admitted < self._most:
            self._admitted += 1
            return True
        self._missed += 1
        return False

    def take_missed(self) -> int:
        """How many were not admitted since this was last asked, for a line that sums them up."""
        missed, self._missed = self._missed, 0
        return missed
