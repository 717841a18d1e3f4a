"""Closing and aborting all connections, and drain notification of protocols."""

import ssl
from ipaddress import ip_network

from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

from rtservice.interfaces import IDrainable
from tests.support.registry_world import IPV4, Flood, header, is_closed, is_served


def test_close_all_flushes_buffers_and_aborts_unfinished_handshakes(world) -> None:
    running = world(Factory.forProtocol(Flood), proxy_from=(ip_network(IPV4),))
    reading = running.client()
    running.client(port=running.add_port(proxied=True), first=b"PROXY ")
    running.connections.close_all("drained")
    running.clock.turn()
    received = 0
    while received < 10 << 20:
        received += len(reading.recv(1 << 20))
        running.clock.turn()
    assert is_closed(reading)
    running.leave(reading)
    assert running.reasons == ["drained", "drained"]
    assert (running.connections.ended, running.connections.aborted) == (2, 1)


def test_close_all_closes_a_paused_transport_registered_as_its_producer(world) -> None:
    running = world()
    client = running.client()
    (connection,) = running.connections.open
    connection.write(bytes(1 << 20))
    assert connection.producer is connection
    running.connections.close_all("drained")
    received = 0
    while received < (1 << 20) + 22:
        running.clock.turn()
        received += len(client.recv(1 << 20))
    running.clock.turn()
    assert is_closed(client)


def test_abort_all_closes_connections_in_every_phase(world) -> None:
    running = world(Factory.forProtocol(Flood), proxy_from=(ip_network(IPV4),))
    running.client()
    running.client(port=running.add_port(proxied=True), first=b"PROXY ")
    running.client(port=running.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    running.connections.abort_all("cut off")
    running.connections.abort_all("cut off")
    running.clock.turn()
    assert running.reasons == ["cut off"] * 3
    assert (running.connections.ended, running.connections.aborted) == (3, 3)
    assert running.clock.getDelayedCalls() == []


@implementer(IDrainable)
class SendsBye(Protocol):
    """Sends a last message in drain."""

    def drain(self) -> None:
        self.transport.write(b"bye")


@implementer(IDrainable)
class FailsInDrain(Protocol):
    """Raises in drain."""

    def drain(self) -> None:
        raise ZeroDivisionError


def test_drainable_protocol_is_notified_once(world) -> None:
    running = world(Factory.forProtocol(SendsBye), proxy_from=(ip_network(IPV4),))
    first = running.client()
    late = running.client(port=running.add_port(proxied=True))
    running.connections.when_empty = lambda: None
    for _ in range(3):
        running.connections.notify_drain()
        running.clock.turn()
    assert first.recv(100) == b"bye"
    late.sendall(header("192.0.2.9"))
    running.clock.turn()
    running.connections.notify_drain()
    running.clock.turn()
    assert late.recv(100) == b"bye"
    assert len(running.connections.open) == 2


def test_wrapped_drainable_protocol_is_notified(world) -> None:
    running = world(Factory.forProtocol(SendsBye))
    client = running.client()
    (connection,) = running.connections.open
    layer = ProtocolWrapper(WrappingFactory(running.factory), connection.protocol)
    connection.protocol = layer  # like startTLS with a pyOpenSSL context
    running.connections.notify_drain()
    running.clock.turn()
    assert client.recv(100) == b"bye"


def test_failure_in_drain_aborts_only_the_connection_of_that_protocol(world) -> None:
    running = world(Factory.forProtocol(FailsInDrain))
    running.client()
    running.factory.protocol = SendsBye
    bystander = running.client()
    running.connections.notify_drain()
    running.clock.turn()
    assert bystander.recv(100) == b"bye"
    assert len(running.connections.open) == 1
    assert running.connections.aborted == 1
    assert [event["log_failure"].type for event in running.events if "log_failure" in event] == [ZeroDivisionError]


def test_protocol_without_drain_support_is_served_during_the_drain(world) -> None:
    running = world()
    client = running.client()
    running.connections.notify_drain()
    running.clock.turn()
    assert is_served(client)
    assert len(running.connections.open) == 1
