"""Listeners and served factories, closed at the end of each test."""

from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, globalLogPublisher

from rtservice.net.listen_types import open_description
from rtservice.net.listener import Listener
from rtservice.net.port import Port
from tests.support.deadline import DEADLINE
from tests.support.listeners import described


@pytest.fixture
def serve():
    """Serve a factory on a free loopback port; return its address and the closed connections."""
    started = []
    connections: set[Any] = set()
    idle: list[Deferred] = []  # fires when the last connection has ended

    def start(factory, description="tcp:0:interface=127.0.0.1", ports=None):
        (listener,) = open_description(description, backlog=100)
        ended = []

        def closed(connection, reason):
            ended.append(connection)
            connections.discard(connection)
            if idle and not connections:
                idle.pop().callback(None)

        port = Port(reactor, listener.socket, factory, name=listener.name, opened=connections.add, closed=closed)
        port.startListening()
        started.append((port, listener))
        if ports is not None:
            ports.append((port, listener))
        return listener.socket.getsockname(), ended

    yield start
    for port, listener in started:
        port.stopListening()
        listener.close()
    if connections:
        idle.append(Deferred())
        waiting = idle[0].addTimeout(DEADLINE, reactor)
        for connection in list(connections):
            connection.abortConnection()
        pytest_twisted.blockon(waiting)


@pytest.fixture
def opened():
    """Open descriptions; the listeners are closed after the test."""
    listeners: list[Listener] = []

    def open_all(description: str) -> list[Listener]:
        found = open_description(description, backlog=10)
        listeners.extend(found)
        return found

    yield open_all
    for listener in listeners:
        listener.close()


@pytest.fixture
def open_secure(certificates):
    """Open an `ssl:` description in which {NAME} is a file of the certificates; return its Listener."""
    listeners: list[Listener] = []

    def open_one(description: str) -> Listener:
        (listener,) = open_description(described(certificates, description), backlog=10)
        listeners.append(listener)
        return listener

    yield open_one
    for listener in listeners:
        listener.close()


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """The errors logged during the test."""
    events: list[Any] = []

    def observe(event: Any) -> None:
        if event["log_level"] >= LogLevel.error:
            events.append(event)

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)
