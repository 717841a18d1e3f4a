"""The register's records: what a log reader is told about each connection."""

import errno

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure

from rtservice.host.connections import Connections, Limits, end_reason, escaped, peer_name
from rtservice.protocols.echo import EchoFactory


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (IPv4Address("TCP", "192.0.2.1", 4711), "192.0.2.1:4711"),
        (IPv6Address("TCP", "2001:db8::1", 4711), "[2001:db8::1]:4711"),
        (UNIXAddress(None), "unix"),
        (UNIXAddress(b"/run/client"), "unix:/run/client"),
        (UNIXAddress(b"/tmp/\x1b[31m\nx\xff"), r"unix:/tmp/\x1b[31m\nx\xff"),
    ],
)
def test_a_peer_is_named_and_what_it_controls_is_escaped(address, name) -> None:
    assert peer_name(address) == name


def test_nothing_that_a_terminal_acts_on_gets_through() -> None:
    everything = "".join(map(chr, [*range(0x500), 0x202E, 0x2028]))
    assert escaped(everything).isprintable()


@pytest.mark.parametrize(
    ("error", "peer_finished", "code", "reason"),
    [
        (ConnectionDone(), True, None, "peer finished"),
        (ConnectionDone(), False, None, "closed"),
        (ConnectionAborted(), False, None, "aborted"),
        (ConnectionLost(), False, errno.ECONNRESET, "reset by peer"),
        (ConnectionLost(), True, errno.EPIPE, "reset by peer"),
        (ConnectionLost(), False, errno.ETIMEDOUT, "timed out"),
        (ConnectionLost(), False, errno.EHOSTUNREACH, "lost"),
        (ConnectionLost(), False, None, "lost"),
        (ZeroDivisionError(), False, None, "failed"),
    ],
)
def test_an_end_has_one_of_a_few_reasons(error, peer_finished, code, reason) -> None:
    problem = None if code is None else OSError(code, "of the test")
    assert end_reason(Failure(error), peer_finished=peer_finished, problem=problem) == reason


def test_a_wrapped_connection_is_registered_counted_and_recorded() -> None:
    events: list[dict] = []
    connections = Connections(Logger(observer=events.append), Limits(max_connections=10))
    factory = connections.wrap(EchoFactory(), "stdio:")
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


def test_a_wrapped_protocol_that_knows_nothing_of_half_close_stays_so() -> None:
    connections = Connections(Logger(observer=lambda event: None), Limits(max_connections=10))
    protocol = connections.wrap(Factory.forProtocol(Protocol), "x").buildProtocol(None)
    protocol.makeConnection(StringTransportWithDisconnection())
    assert not IHalfCloseableProtocol.providedBy(protocol)


def test_a_factory_that_refuses_is_left_to_refuse() -> None:
    factory = Factory()
    factory.buildProtocol = lambda address: None
    assert Connections(Logger(), Limits(max_connections=10)).wrap(factory, "x").buildProtocol(None) is None
