"""The bounded number of connections of the status server: a new one replaces the least important one."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.logger import Logger

from rtservice.net.listener import Listener
from rtservice.net.port import ACCEPTS_PER_EVENT
from rtservice.process.server import default_max_connections, descriptors_for_status
from rtservice.process.status_server import CONNECTIONS, StatusServer


class IdleProtocol(Protocol):
    """Answers each message; it is idle after the message `idle`."""

    idle = False
    since = 0.0
    left: Deferred[None] | None = None

    def connectionMade(self) -> None:
        self.factory.made.append(self)
        self.since = len(self.factory.made)
        self.transport.write(b"here")

    def dataReceived(self, data: bytes) -> None:
        self.idle = data == b"idle"
        self.transport.write(b"ok")

    def connectionLost(self, reason: Any = None) -> None:
        if self.left is not None:
            self.left.callback(None)


@pytest.fixture
def status_server() -> Iterator[
    Callable[[int], tuple[StatusServer, list[IdleProtocol], Callable[[], Deferred[socket.socket]]]]
]:
    """Return a function that starts a StatusServer for `most` connections; it returns the server, its protocols, and a
    function that connects a client.
    """
    started: list[StatusServer] = []
    clients: list[socket.socket] = []

    def start(most: int) -> tuple[StatusServer, list[IdleProtocol], Callable[[], Deferred[socket.socket]]]:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        listener = Listener(listening, "test")
        server = StatusServer(Logger(observer=lambda event: None), [listener], most + 1 + ACCEPTS_PER_EVENT)
        factory = Factory.forProtocol(IdleProtocol)
        factory.made = protocols = []
        server.start(reactor, factory)
        started.append(server)

        def connect() -> socket.socket:
            client = socket.create_connection(listening.getsockname(), timeout=30)
            clients.append(client)
            assert client.recv(4, socket.MSG_WAITALL) == b"here"
            return client

        return server, protocols, lambda: deferToThread(connect)

    yield start
    for server in started:
        server.stop()
    for client in clients:
        client.close()


def send(client: socket.socket, what: bytes) -> Any:
    def exchange() -> bytes:
        client.sendall(what)
        return client.recv(2, socket.MSG_WAITALL)

    return deferToThread(exchange)


def is_closed(client: socket.socket) -> Any:
    """Wait until the other side has closed the connection."""

    def end() -> bool:
        try:
            return client.recv(1) == b""
        except ConnectionResetError:
            return True

    return deferToThread(end)


@pytest_twisted.inlineCallbacks
def test_oldest_unfinished_request_is_closed_first_then_the_oldest_idle_connection(status_server, monkeypatch) -> Any:
    monkeypatch.setattr("rtservice.process.status_server._STAY", 0)
    _, _, connect = status_server(4)
    clients = []
    for _ in range(4):
        clients.append((yield connect()))
    yield send(clients[0], b"idle")
    yield send(clients[2], b"idle")
    clients.append((yield connect()))
    assert (yield is_closed(clients[1]))
    clients.append((yield connect()))
    assert (yield is_closed(clients[3]))
    yield send(clients[4], b"idle")
    yield send(clients[5], b"idle")
    clients.append((yield connect()))
    assert (yield is_closed(clients[0]))
    for number in (2, 4, 5, 6):
        assert (yield send(clients[number], b"more")) == b"ok"


@pytest_twisted.inlineCallbacks
def test_new_connection_is_kept_for_a_minimum_time_while_others_wait(status_server) -> Any:
    _, _, connect = status_server(4)
    began = monotonic()
    clients = []
    for _ in range(12):
        clients.append((yield connect()))
    assert monotonic() - began >= 2 * 0.2
    yield send(clients[11], b"idle")
    for number in range(8):
        assert (yield is_closed(clients[number]))


@pytest_twisted.inlineCallbacks
def test_idle_connections_are_closed_before_a_recent_request(status_server, monkeypatch) -> Any:
    monkeypatch.setattr("rtservice.process.status_server._STAY", 0)
    monkeypatch.setattr("rtservice.process.status_server._SLOW", 1000)
    _, protocols, connect = status_server(4)
    clients = []
    for _ in range(4):
        clients.append((yield connect()))
    for protocol in protocols:
        protocol.since = monotonic()
    for number in (2, 1, 3):
        yield send(clients[number], b"idle")
        protocols[number].since = monotonic()
    for number in (2, 1):
        yield connect()
        protocols[-1].since = monotonic()
        assert (yield is_closed(clients[number]))
    assert (yield send(clients[0], b"more")) == b"ok"


@pytest_twisted.inlineCallbacks
def test_closed_connection_frees_its_place_at_once(status_server) -> Any:
    _, protocols, connect = status_server(4)
    clients = []
    for _ in range(4):
        clients.append((yield connect()))
    left = protocols[2].left = Deferred()
    clients[2].close()
    yield left
    clients.append((yield connect()))
    for number in (0, 1, 3, 4):
        assert (yield send(clients[number], b"more")) == b"ok"


@pytest_twisted.inlineCallbacks
def test_each_of_hundreds_of_idle_clients_is_served(status_server) -> Any:
    server, _, connect = status_server(10)
    for _ in range(200):
        yield connect()
        assert len(server._connections.open) <= 10 + ACCEPTS_PER_EVENT


@pytest.mark.parametrize("descriptors", [64, 128, 256, 320, 1024, 1 << 20])
def test_default_limits_of_service_and_status_server_reserve_descriptors(descriptors: int) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    status_server = StatusServer(Logger(), [Listener(listening, "test")], descriptors_for_status(descriptors))
    connections = default_max_connections(descriptors, status_server.descriptors)
    rest = descriptors - connections - status_server.descriptors
    assert connections >= descriptors // 4
    assert rest >= min(64, descriptors // 4)
    if descriptors >= 320:
        assert status_server.descriptors == CONNECTIONS + 1 + ACCEPTS_PER_EVENT
    listening.close()


def test_without_a_status_server_no_descriptors_are_reserved_for_it() -> None:
    status_server = StatusServer(Logger(), [], descriptors_for_status(1024))
    assert status_server.descriptors == 0
    assert default_max_connections(1024, 0) == 960


def test_without_a_descriptor_limit_the_defaults_are_fixed() -> None:
    assert descriptors_for_status(-1) is None
    assert default_max_connections(-1, 117) == 10_000_000
