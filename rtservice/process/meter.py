"""What a process measures about itself: the lag of its reactor, memory and CPU, and dropped log lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rtservice.process.counters import DROPPED, CounterKey, Lag, process_counters


class ProcessMeter:
    """The counters of one process, a server or a supervisor. `dropped` returns the number of dropped log lines."""

    def __init__(self, dropped: Callable[[], int] = lambda: 0) -> None:
        self._dropped = dropped
        self._lag = Lag()

    def start(self, reactor: Any) -> None:
        """Start to measure the lag of this reactor."""
        self._lag.start(reactor)

    def stop(self) -> None:
        """Stop measuring the lag."""
        self._lag.stop()

    def counters(self) -> dict[CounterKey, float]:
        """Return the current counters: see `process/counters.py`."""
        return {**self._lag.counters(), **process_counters(), DROPPED: self._dropped()}
