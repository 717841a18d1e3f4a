"""The real reactor, with timers on a fake clock."""

from typing import Any

from twisted.internet import reactor
from twisted.internet.task import Clock


class Timed:
    """The reactor with timers on `clock`; with `at_once`, calls without delay stay on the reactor."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.clock = Clock()
        self._at_once = at_once

    def callLater(self, delay: float, *call: Any, **named: Any) -> Any:
        """Schedule a call on the clock, or on the reactor if `at_once` is set and there is no delay."""
        timers: Any = reactor if self._at_once and not delay else self.clock
        return timers.callLater(delay, *call, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)
