"""Where the service's own records go, and from which level up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from twisted.logger import LogEvent, Logger, LogLevel

LevelName = Literal["debug", "info", "warn", "error", "critical"]


class Log:
    """A logger of rtservice's records whose level may be changed; `publish` takes those of its level and above."""

    def __init__(self, level: LevelName, publish: Callable[[LogEvent], None]) -> None:
        self.level = level
        self._publish = publish
        # A function is an observer. Twisted's FilteringLogObserver takes a fifth of what a connection's record costs.
        self.logger = Logger(namespace="rtservice", observer=self._observe)  # type: ignore[arg-type]  # as said

    @property
    def level(self) -> LevelName:
        """The least level that is logged."""
        return self._level

    @level.setter
    def level(self, level: LevelName) -> None:
        self._level = level
        levels = list(LogLevel.iterconstants())
        self._enough = frozenset(levels[levels.index(LogLevel.lookupByName(level)) :])

    def _observe(self, event: LogEvent) -> None:
        if event["log_level"] in self._enough:
            self._publish(event)
