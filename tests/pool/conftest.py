"""A pool of workers with a clock and processes that the test moves."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rtservice.pool import pool as pool_module
from tests.support.pool_world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Makes a World; nothing in it may fail unseen, and nothing may be left to be called in one that has stopped."""
    made: list[World] = []

    def make(slots: int = 2, **given: Any) -> World:
        one = World(slots, **given)
        made.append(one)
        monkeypatch.setattr("twisted.internet.reactor", one.reactor)
        monkeypatch.setattr(signal, "signal", one.handlers.__setitem__)
        monkeypatch.setattr(pool_module, "globalLogPublisher", one.events.append)
        return one

    # In the middle of what chance may choose.
    monkeypatch.setattr(pool_module.random, "random", lambda: 0.5)
    monkeypatch.setattr(pool_module.random, "uniform", lambda low, high: (low + high) / 2)
    yield make
    for one in made:
        assert not [event["log_failure"] for event in one.events if "log_failure" in event]
        if one.done:
            assert one.done == [None]
            assert one.reactor.getDelayedCalls() == []
