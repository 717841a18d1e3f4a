"""A pool of workers with a clock and processes that the test controls."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rtservice.pool import pool as pool_module
from tests.support.pool_world import World


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Return a function that makes a World. At its end, check for logged failures and delayed calls."""
    made: list[World] = []

    def make(slots: int = 2, **given: Any) -> World:
        running = World(slots, **given)
        made.append(running)
        monkeypatch.setattr("twisted.internet.reactor", running.reactor)
        monkeypatch.setattr(signal, "signal", running.handlers.__setitem__)
        monkeypatch.setattr(pool_module, "globalLogPublisher", running.events.append)
        return running

    # The middle of each random range.
    monkeypatch.setattr(pool_module.random, "random", lambda: 0.5)
    monkeypatch.setattr(pool_module.random, "uniform", lambda low, high: (low + high) / 2)
    yield make
    for running in made:
        for process in running.processes:
            process.link_end.close()
            process.protocol.link_channel.close()
        assert not [event["log_failure"] for event in running.events if "log_failure" in event]
        if running.done:
            assert running.done == [None]
            assert running.reactor.getDelayedCalls() == []
