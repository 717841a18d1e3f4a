"""A reactor that does what lines need of one when it is told to, and what is logged about outputs."""

import pytest
from twisted.internet.task import Clock
from twisted.logger import formatEvent, globalLogPublisher

from rtservice.observe import lines


class Reactor(Clock):
    """A clock with what else Lines needs of a reactor."""

    def __init__(self) -> None:
        super().__init__()
        self.from_threads = []
        self.at_end = []

    def callWhenRunning(self, call, *arguments) -> None:
        call(*arguments)

    def addSystemEventTrigger(self, phase, event, call) -> None:
        self.at_end.append(call)

    def callFromThread(self, call) -> None:
        self.from_threads.append(call)


@pytest.fixture
def reactor() -> Reactor:
    """One of them."""
    return Reactor()


@pytest.fixture
def new_reactor() -> type[Reactor]:
    """Makes one."""
    return Reactor


@pytest.fixture
def said():
    """What is logged meanwhile."""
    events = []
    globalLogPublisher.addObserver(events.append)
    yield lambda: [formatEvent(event) for event in events if event["log_namespace"] == lines.__name__]
    globalLogPublisher.removeObserver(events.append)
