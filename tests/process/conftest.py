"""Fixtures: a registry and a server on a clock that the test advances."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from twisted.internet.protocol import Factory

from rtservice.process.service import ServiceProcess
from rtservice.process.state import State
from tests.support.fake_reactor import FakeReactor
from tests.support.registry_world import World
from tests.support.served import server


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """Restore the signal handlers of this process, which a service replaces."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(factory: Factory | None = None, **limits: Any) -> World:
        made.append(World(factory, **limits))
        return made[-1]

    yield make
    for running in made:
        running.close()


@pytest.fixture
def timed(monkeypatch) -> Callable[..., tuple[ServiceProcess, FakeReactor, list[dict[str, Any]]]]:
    """Return a function that starts a server on the clock of a fake reactor."""

    def start(*listeners: Any, **given: Any) -> tuple[ServiceProcess, FakeReactor, list[dict[str, Any]]]:
        clock = FakeReactor()
        monkeypatch.setattr("twisted.internet.reactor", clock)
        service, events = server(listeners, **given)
        service.startService()
        assert service.backend.state is State.SERVING
        return service, clock, events

    return start
