"""Wait in the reactor until something is true, or ask until the answer is."""

import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.task import deferLater

from tests.support.deadline import DEADLINE
from tests.support.recording import nothing


@pytest_twisted.inlineCallbacks
def eventually(condition: Callable[[], Any]) -> Any:
    """Wait until a function returns a true value; fires with that value."""
    end = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < end, "the deadline has passed"
        yield deferLater(reactor, 0.002, nothing)
    return value


async def answers(question: Callable[[], Awaitable[Any]]) -> Any:
    """Ask repeatedly until the answer is a true value; return it."""
    end = time.monotonic() + DEADLINE
    while not (value := await question()):
        assert time.monotonic() < end, "the deadline has passed"
    return value
