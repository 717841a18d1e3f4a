"""Connections on transports of other endpoints: limits, timeouts and records."""

import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.internet.threads import deferToThread
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure

from rtservice.process.admission import Limits
from rtservice.process.foreign import ForeignFactory
from rtservice.process.registry import Registry
from rtservice.protocols.echo import EchoFactory
from tests.support.registry_world import refused, still_open


def wrap(factory: Any, connections: Registry, name: str = "x") -> ForeignFactory:
    return ForeignFactory(factory, name, connections, Logger())


def test_foreign_connection_is_registered_counted_and_recorded() -> None:
    events: list[dict] = []
    connections = Registry(Logger(observer=events.append), Limits(max_connections=10))
    factory = wrap(EchoFactory(), connections, "stdio:")
    protocol = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
    assert protocol is not None
    transport = StringTransportWithDisconnection(peerAddress=IPv4Address("TCP", "192.0.2.1", 1))
    transport.protocol = protocol
    protocol.makeConnection(transport)
    assert list(connections.open) == [protocol]
    assert IHalfCloseableProtocol.providedBy(protocol)
    protocol.dataReceived(b"hello")
    assert transport.value() == b"Hello from the server!hello"
    protocol.readConnectionLost()
    assert not connections.open
    (event,) = events
    assert (event["bytes_in"], event["bytes_out"], event["reason"]) == (5, 27, "peer finished")
    assert formatEvent(event).startswith("192.0.2.1:1 on stdio:: 0.0")


def test_foreign_protocol_without_half_close_support_gets_none() -> None:
    connections = Registry(Logger(observer=lambda event: None), Limits(max_connections=10))
    protocol = wrap(Factory.forProtocol(Protocol), connections).buildProtocol(None)
    protocol.makeConnection(StringTransportWithDisconnection())
    assert not IHalfCloseableProtocol.providedBy(protocol)


@pytest.mark.parametrize("build", [lambda address: None, lambda address: 1 / 0], ids=["None", "raises"])
def test_foreign_connection_without_a_protocol_is_closed(build) -> None:
    """The wrappers of Twisted would keep the client connected."""
    factory = Factory()
    factory.buildProtocol = build
    protocol = wrap(factory, Registry(Logger(), Limits(max_connections=10))).buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = Protocol()
    protocol.makeConnection(transport)
    assert not transport.connected


@pytest.fixture
def listen():
    """Return a function that serves an EchoFactory through a Registry on a Twisted port, and returns its number."""
    ports = []

    def start(connections: Registry) -> int:
        ports.append(reactor.listenTCP(0, wrap(EchoFactory(), connections), interface="127.0.0.1"))
        return ports[-1].getHost().port

    yield start
    for port in ports:
        pytest_twisted.blockon(port.stopListening())


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_peer"])
@pytest_twisted.inlineCallbacks
def test_connection_limits_apply_to_foreign_transports(listen, limit):
    connections = Registry(Logger(observer=lambda event: None), Limits(**{"max_connections": 9, limit: 2}))
    port = listen(connections)

    def attempt() -> tuple[socket.socket, bytes]:
        client = socket.socket()
        client.settimeout(20)
        try:
            client.connect(("127.0.0.1", port))
            return client, client.recv(100)
        except ConnectionResetError:
            return client, b""

    def becomes_empty() -> Deferred[None]:
        empty: Deferred[None] = Deferred()
        connections.when_empty = lambda: reactor.callLater(0, empty.callback, None)
        return empty.addTimeout(20, reactor)

    for count in (1, 2):
        clients = []
        for _ in range(3):
            clients.append((yield deferToThread(attempt)))
        assert [answer for _, answer in clients] == [b"Hello from the server!"] * 2 + [b""]
        assert refused(connections)[limit.replace("_", "-")] == count
        assert len(connections.open) == 2
        empty = becomes_empty()
        for client, _ in clients:
            client.close()
        yield empty


def connect_wrapped(connections: Registry) -> tuple[Any, StringTransportWithDisconnection]:
    protocol = wrap(EchoFactory(), connections).buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    return protocol, transport


def test_idle_foreign_transport_is_closed_then_aborted_if_it_stays_open(world) -> None:
    running = world(idle_timeout=20)
    connect_wrapped(running.connections)
    still_open(running, 21)
    assert running.reasons == ["idle"]
    protocol, transport = connect_wrapped(running.connections)
    transport.loseConnection = lambda: None
    transport.abortConnection = lambda: protocol.connectionLost(Failure(ConnectionAborted()))
    running.advance(1)
    for _ in range(21):
        running.advance(1)
    assert running.reasons == ["idle", "stopped reading"]


def test_close_all_and_abort_all_include_foreign_transports(world) -> None:
    running = world()
    connect_wrapped(running.connections)
    running.connections.close_all("drained")
    connect_wrapped(running.connections)
    running.connections.abort_all("cut off")
    assert running.reasons == ["drained", "cut off"]
    assert not running.connections.open
