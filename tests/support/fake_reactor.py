"""A reactor whose clock and events the test controls."""

from collections.abc import Callable
from functools import partial
from typing import Any

from twisted.internet.testing import MemoryReactorClock


class FakeReactor(MemoryReactorClock):
    """A running reactor; records stops, calls from threads and shutdown triggers, and accepts fake descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.stops = 0
        self.from_threads: list[Callable[[], Any]] = []
        self.at_end: list[Callable[[], Any]] = []

    def callWhenRunning(self, call: Callable[..., Any], *arguments: Any) -> None:
        call(*arguments)

    def callFromThread(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.from_threads.append(partial(call, *arguments))

    def addSystemEventTrigger(self, phase: str, event: str, call: Callable[..., Any], *arguments: Any) -> None:
        self.at_end.append(partial(call, *arguments))

    def stop(self) -> None:
        self.stops += 1

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def addWriter(self, writer: Any) -> None:
        self.writers.add(writer)

    def removeWriter(self, writer: Any) -> None:
        self.writers.discard(writer)
