"""The end of all connections, and protocols that are told of a drain."""

import ssl
from ipaddress import ip_network

from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

from rtservice.interfaces import IDrainable
from tests.support.registry_world import IPV4, Flood, header, is_closed, is_served


def test_close_all_flushes_buffers_and_aborts_unfinished_handshakes(world) -> None:
    one = world(Factory.forProtocol(Flood), proxy_from=(ip_network(IPV4),))
    reading = one.client()
    one.client(port=one.add_port(proxied=True), first=b"PROXY ")
    one.connections.close_all("drained")
    one.clock.turn()
    received = 0
    while received < 10 << 20:
        received += len(reading.recv(1 << 20))
        one.clock.turn()
    assert is_closed(reading)
    one.leave(reading)
    assert one.reasons == ["drained", "drained"]
    assert (one.connections.ended, one.connections.aborted) == (2, 1)


def test_close_all_closes_a_paused_transport_registered_as_its_producer(world) -> None:
    one = world()
    client = one.client()
    (connection,) = one.connections.open
    connection.write(bytes(1 << 20))
    assert connection.producer is connection
    one.connections.close_all("drained")
    received = 0
    while received < (1 << 20) + 22:
        one.clock.turn()
        received += len(client.recv(1 << 20))
    one.clock.turn()
    assert is_closed(client)


def test_abort_all_closes_connections_in_every_phase(world) -> None:
    one = world(Factory.forProtocol(Flood), proxy_from=(ip_network(IPV4),))
    one.client()
    one.client(port=one.add_port(proxied=True), first=b"PROXY ")
    one.client(port=one.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    one.connections.abort_all("cut off")
    one.connections.abort_all("cut off")
    one.clock.turn()
    assert one.reasons == ["cut off"] * 3
    assert (one.connections.ended, one.connections.aborted) == (3, 3)
    assert one.clock.getDelayedCalls() == []


@implementer(IDrainable)
class Polite(Protocol):
    """Says goodbye."""

    def drain(self) -> None:
        self.transport.write(b"bye")


@implementer(IDrainable)
class Impolite(Protocol):
    """Fails to."""

    def drain(self) -> None:
        raise ZeroDivisionError


def test_drainable_protocol_is_notified_once(world) -> None:
    one = world(Factory.forProtocol(Polite), proxy_from=(ip_network(IPV4),))
    first = one.client()
    late = one.client(port=one.add_port(proxied=True))
    one.connections.when_empty = lambda: None
    for _ in range(3):
        one.connections.notify_drain()
        one.clock.turn()
    assert first.recv(100) == b"bye"
    late.sendall(header("192.0.2.9"))
    one.clock.turn()
    one.connections.notify_drain()
    one.clock.turn()
    assert late.recv(100) == b"bye"
    assert len(one.connections.open) == 2


def test_wrapped_drainable_protocol_is_notified(world) -> None:
    one = world(Factory.forProtocol(Polite))
    client = one.client()
    (connection,) = one.connections.open
    layer = ProtocolWrapper(WrappingFactory(one.factory), connection.protocol)
    connection.protocol = layer  # as startTLS does it with pyOpenSSL's contexts
    one.connections.notify_drain()
    one.clock.turn()
    assert client.recv(100) == b"bye"


def test_failure_in_drain_aborts_only_the_connection_of_that_protocol(world) -> None:
    one = world(Factory.forProtocol(Impolite))
    one.client()
    one.factory.protocol = Polite
    bystander = one.client()
    one.connections.notify_drain()
    one.clock.turn()
    assert bystander.recv(100) == b"bye"
    assert len(one.connections.open) == 1
    assert one.connections.aborted == 1
    assert [event["log_failure"].type for event in one.events if "log_failure" in event] == [ZeroDivisionError]


def test_protocol_without_drain_support_is_served_during_the_drain(world) -> None:
    one = world()
    client = one.client()
    one.connections.notify_drain()
    one.clock.turn()
    assert is_served(client)
    assert len(one.connections.open) == 1
