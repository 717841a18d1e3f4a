"""Idle timeout and handshake timeout, to the tick of a clock."""

import contextlib
import importlib.util
import ssl
from ipaddress import ip_network
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol

from tests.support.registry_world import IPV4, Flood, header, is_closed, is_served, still_open


def test_idle_connection_is_closed_within_two_sweeps_after_the_timeout(world) -> None:
    one = world(idle_timeout=20)  # a sweep each second
    client = one.client()
    assert is_served(client)
    still_open(one, 21)
    assert one.reasons == ["idle"]
    assert is_closed(client)
    assert one.connections.aborted == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_byte_in_either_direction_restarts_the_idle_timeout(world, direction) -> None:
    one = world(Factory.forProtocol(Protocol), idle_timeout=20)
    client = one.client()
    (connection,) = one.connections.open
    still_open(one, 20.5)
    if direction == "in":
        client.sendall(b"x")
    else:
        connection.write(b"x")
    one.clock.turn()
    assert client.recv(10) == b"x" if direction == "out" else True
    still_open(one, 41)  # a sweep saw it at 21
    assert one.reasons == ["idle"]


def test_connection_active_before_each_timeout_stays_open(world) -> None:
    one = world(idle_timeout=20)
    client = one.client()
    for _ in range(10):
        still_open(one, one.clock.seconds() + 19.5)
        client.sendall(b"x")
        one.clock.turn()
    assert one.reasons == []


def test_idle_timeout_of_zero_disables_it(world) -> None:
    one = world(idle_timeout=0)
    one.client()
    one.advance(1e6)
    assert one.reasons == []
    assert one.clock.getDelayedCalls() == []


def test_new_idle_timeout_applies_at_once(world) -> None:
    one = world(idle_timeout=0)
    assert is_served(one.client())
    one.advance(100)
    one.apply(idle_timeout=2)  # a sweep each tenth of a second
    still_open(one, 102.1, 0.05)
    assert one.reasons == ["idle"]
    one.client()
    one.apply(idle_timeout=0)
    one.advance(1e6)
    assert one.reasons == ["idle"]


def test_peer_that_stopped_reading_is_aborted_after_the_idle_timeout(world) -> None:
    one = world(Factory.forProtocol(Flood), idle_timeout=20)
    one.client()
    still_open(one, 21)
    assert one.reasons == ["stopped reading"]
    assert (one.connections.ended, one.connections.aborted) == (1, 1)


def test_peer_that_reads_slowly_is_not_aborted(world) -> None:
    one = world(Factory.forProtocol(Flood), idle_timeout=20)
    client = one.client()
    for _ in range(10):
        still_open(one, one.clock.seconds() + 19.5)
        client.recv(1 << 20)
        one.clock.turn()
    assert one.reasons == []


def test_peer_that_does_not_read_cannot_prevent_a_close_by_the_protocol(world) -> None:
    one = world(Factory.forProtocol(Flood), idle_timeout=20)
    one.client()
    (connection,) = one.connections.open
    connection.loseConnection()
    still_open(one, 21)
    assert one.reasons == ["stopped reading"]


class Stubborn(Protocol):
    """Has a producer that never says that it has finished."""

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        pass


def test_unfinished_producer_delays_the_close_by_at_most_one_sweep(world) -> None:
    one = world(Factory.forProtocol(Stubborn), idle_timeout=20)
    one.client()
    still_open(one, 20)
    one.advance(1)
    one.advance(1)
    assert len(one.reasons) == 1


class Upgrading(Protocol):
    """Starts TLS with a context of Twisted's."""

    def connectionMade(self) -> None:
        self.transport.startTLS(self.factory.context)


def test_missing_close_notify_in_the_tls_of_twisted_does_not_delay_the_close(world, certificates) -> None:
    if importlib.util.find_spec("OpenSSL") is None:
        pytest.skip("pyOpenSSL (twisted[tls]) is not installed")
    from twisted.internet.ssl import DefaultOpenSSLContextFactory

    factory: Any = Factory.forProtocol(Upgrading)
    factory.context = DefaultOpenSSLContextFactory(certificates["server.key"], certificates["server.pem"])
    one = world(factory, idle_timeout=20)
    trusting = ssl.create_default_context(cafile=certificates["ca.pem"])
    plain = one.client()
    one.clients.append(
        client := trusting.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
    )
    for _ in range(2):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        one.clock.turn()
    assert client.version() is not None
    for _ in range(100):
        one.advance(0.5)
    assert one.reasons == ["idle"]


def test_handshake_time_does_not_count_as_idle_time(world) -> None:
    """The handshake's own deadline is ten seconds; this clock is shorter."""
    one = world(Factory.forProtocol(Protocol), idle_timeout=2, proxy_from=(ip_network(IPV4),))
    client = one.client(port=one.add_port(proxied=True))
    still_open(one, 9, 0.05)
    client.sendall(header("192.0.2.9"))
    one.clock.turn()
    still_open(one, 11, 0.05)
    assert one.reasons == []
    one.advance(0.2)
    assert one.reasons == ["idle"]


def test_missing_proxy_header_and_missing_tls_handshake_time_out_separately(world) -> None:
    one = world(idle_timeout=2, proxy_from=(ip_network(IPV4),))
    one.client(port=one.add_port(proxied=True), first=b"PROXY ")
    one.client(port=one.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    still_open(one, 10)
    assert one.reasons == ["PROXY header timed out", "TLS handshake timed out"]
    assert one.clock.getDelayedCalls() == [one.connections._sweeping.call]
