"""The real reactor, with timers that the test moves."""

from typing import Any

from twisted.internet import reactor
from twisted.internet.task import Clock


class Timed:
    """The reactor, with the timers of `clock`; with `at_once`, but for those that are due at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.clock = Clock()
        self._at_once = at_once

    def callLater(self, delay: float, *call: Any, **named: Any) -> Any:
        """Call in the reactor's next turn, or when the clock gets there."""
        timers: Any = reactor if self._at_once and not delay else self.clock
        return timers.callLater(delay, *call, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)
