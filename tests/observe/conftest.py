"""A reactor that does what lines need of one when it is told to, and what is logged about outputs."""

import pytest
from twisted.logger import formatEvent, globalLogPublisher

from rtservice.observe import lines
from tests.support.fake_reactor import FakeReactor


@pytest.fixture
def reactor() -> FakeReactor:
    """One of them."""
    return FakeReactor()


@pytest.fixture
def new_reactor() -> type[FakeReactor]:
    """Makes one."""
    return FakeReactor


@pytest.fixture
def logged():
    """What is logged meanwhile."""
    events = []
    globalLogPublisher.addObserver(events.append)
    yield lambda: [formatEvent(event) for event in events if event["log_namespace"] == lines.__name__]
    globalLogPublisher.removeObserver(events.append)
