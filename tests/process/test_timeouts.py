"""Idle timeout and handshake timeout, on a clock that the test advances."""

import contextlib
import importlib.util
import ssl
from ipaddress import ip_network
from typing import Any

import pytest
from twisted.internet.protocol import Factory, Protocol

from tests.support.registry_world import IPV4, Flood, header, is_closed, is_served, still_open


def test_idle_connection_is_closed_within_two_sweeps_after_the_timeout(world) -> None:
    running = world(idle_timeout=20)  # a sweep each second
    client = running.client()
    assert is_served(client)
    still_open(running, 21)
    assert running.reasons == ["idle"]
    assert is_closed(client)
    assert running.connections.aborted == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_byte_in_either_direction_restarts_the_idle_timeout(world, direction) -> None:
    running = world(Factory.forProtocol(Protocol), idle_timeout=20)
    client = running.client()
    (connection,) = running.connections.open
    still_open(running, 20.5)
    if direction == "in":
        client.sendall(b"x")
    else:
        connection.write(b"x")
    running.clock.turn()
    assert client.recv(10) == b"x" if direction == "out" else True
    still_open(running, 41)  # the sweep at 21 registered the byte
    assert running.reasons == ["idle"]


def test_connection_active_before_each_timeout_stays_open(world) -> None:
    running = world(idle_timeout=20)
    client = running.client()
    for _ in range(10):
        still_open(running, running.clock.seconds() + 19.5)
        client.sendall(b"x")
        running.clock.turn()
    assert running.reasons == []


def test_idle_timeout_of_zero_disables_it(world) -> None:
    running = world(idle_timeout=0)
    running.client()
    running.advance(1e6)
    assert running.reasons == []
    assert running.clock.getDelayedCalls() == []


def test_new_idle_timeout_applies_at_once(world) -> None:
    running = world(idle_timeout=0)
    assert is_served(running.client())
    running.advance(100)
    running.apply(idle_timeout=2)  # a sweep each tenth of a second
    still_open(running, 102.1, 0.05)
    assert running.reasons == ["idle"]
    running.client()
    running.apply(idle_timeout=0)
    running.advance(1e6)
    assert running.reasons == ["idle"]


def test_peer_that_stopped_reading_is_aborted_after_the_idle_timeout(world) -> None:
    running = world(Factory.forProtocol(Flood), idle_timeout=20)
    running.client()
    still_open(running, 21)
    assert running.reasons == ["stopped reading"]
    assert (running.connections.ended, running.connections.aborted) == (1, 1)


def test_peer_that_reads_slowly_is_not_aborted(world) -> None:
    running = world(Factory.forProtocol(Flood), idle_timeout=20)
    client = running.client()
    for _ in range(10):
        still_open(running, running.clock.seconds() + 19.5)
        client.recv(1 << 20)
        running.clock.turn()
    assert running.reasons == []


def test_peer_that_does_not_read_cannot_prevent_a_close_by_the_protocol(world) -> None:
    running = world(Factory.forProtocol(Flood), idle_timeout=20)
    running.client()
    (connection,) = running.connections.open
    connection.loseConnection()
    still_open(running, 21)
    assert running.reasons == ["stopped reading"]


class UnfinishedProducer(Protocol):
    """Registers a producer that never finishes."""

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, False)

    def resumeProducing(self) -> None:
        pass

    def stopProducing(self) -> None:
        pass


def test_unfinished_producer_delays_the_close_by_at_most_one_sweep(world) -> None:
    running = world(Factory.forProtocol(UnfinishedProducer), idle_timeout=20)
    running.client()
    still_open(running, 20)
    running.advance(1)
    running.advance(1)
    assert len(running.reasons) == 1


class Upgrading(Protocol):
    """Starts TLS with a context of Twisted."""

    def connectionMade(self) -> None:
        self.transport.startTLS(self.factory.context)


def test_missing_close_notify_in_the_tls_of_twisted_does_not_delay_the_close(world, certificates) -> None:
    if importlib.util.find_spec("OpenSSL") is None:
        pytest.skip("pyOpenSSL (twisted[tls]) is not installed")
    from twisted.internet.ssl import DefaultOpenSSLContextFactory

    factory: Any = Factory.forProtocol(Upgrading)
    factory.context = DefaultOpenSSLContextFactory(certificates["server.key"], certificates["server.pem"])
    running = world(factory, idle_timeout=20)
    trusting = ssl.create_default_context(cafile=certificates["ca.pem"])
    plain = running.client()
    running.clients.append(
        client := trusting.wrap_socket(plain, server_hostname="localhost", do_handshake_on_connect=False)
    )
    for _ in range(2):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        running.clock.turn()
    assert client.version() is not None
    for _ in range(100):
        running.advance(0.5)
    assert running.reasons == ["idle"]


def test_handshake_time_does_not_count_as_idle_time(world) -> None:
    """The handshake timeout is ten seconds, longer than this idle timeout."""
    running = world(Factory.forProtocol(Protocol), idle_timeout=2, proxy_from=(ip_network(IPV4),))
    client = running.client(port=running.add_port(proxied=True))
    still_open(running, 9, 0.05)
    client.sendall(header("192.0.2.9"))
    running.clock.turn()
    still_open(running, 11, 0.05)
    assert running.reasons == []
    running.advance(0.2)
    assert running.reasons == ["idle"]


def test_missing_proxy_header_and_missing_tls_handshake_time_out_separately(world) -> None:
    running = world(idle_timeout=2, proxy_from=(ip_network(IPV4),))
    running.client(port=running.add_port(proxied=True), first=b"PROXY ")
    running.client(port=running.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    still_open(running, 10)
    assert running.reasons == ["PROXY header timed out", "TLS handshake timed out"]
    assert running.clock.getDelayedCalls() == [running.connections._sweeping.call]
