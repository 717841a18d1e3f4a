"""Rate limit for log records that peers can cause in any number."""

from __future__ import annotations

import math


class LogRateLimit:
    """Admit the first `most` events of each period of `seconds`, and count the others.

    A period begins with the first event after the previous period.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._seconds = seconds
        self._end = -math.inf
        self._admitted = 0
        self._suppressed = 0

    def may_log(self, now: float) -> bool:
        """Return whether to log an event that happens at `now`, in seconds of any clock."""
        if now >= self._end:
            self._end = now + self._seconds
            self._admitted = 0
        if self._admitted < self._most:
            self._admitted += 1
            return True
        self._suppressed += 1
        return False

    def take_suppressed(self) -> int:
        """Return the number of events that were not admitted since the last call."""
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
