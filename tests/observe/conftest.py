"""Fixtures: a fake reactor, and the log records about outputs."""

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from rtservice.observe import lines
from tests.support.fake_reactor import FakeReactor


@pytest.fixture
def reactor() -> FakeReactor:
    """A fake reactor."""
    return FakeReactor()


@pytest.fixture
def new_reactor() -> type[FakeReactor]:
    """The class of the fake reactor."""
    return FakeReactor


@pytest.fixture
def logged():
    """Return the messages that `lines` logs during the test."""
    events = []
    globalLogPublisher.addObserver(events.append)
    yield lambda: [formatEvent(event) for event in events if event["log_namespace"] == lines.__name__]
    globalLogPublisher.removeObserver(events.append)
