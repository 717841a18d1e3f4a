"""The register: what it tells a log reader, whom it refuses, whom it ends and when, to the tick of a clock."""

import contextlib
import errno
import importlib.util
import select
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Any, cast

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransportWithDisconnection
from twisted.internet.threads import deferToThread
from twisted.logger import Logger, formatEvent
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.interfaces import IDrainable
from rtservice.net.address import escaped
from rtservice.net.port import Port
from rtservice.process.registry import (
    COLUMNS,
    Limits,
    Registry,
    end_reason,
    first_rows,
    peer_group,
    peer_name,
)
from rtservice.protocols.echo import EchoFactory


def now(result: Deferred) -> Any:
    """What a Deferred that has fired gives."""
    found: list[Any] = []
    result.addCallback(found.append)
    [value] = found
    return value


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
    connections = Registry(Logger(observer=events.append), Limits(max_connections=10))
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
    connections = Registry(Logger(observer=lambda event: None), Limits(max_connections=10))
    protocol = connections.wrap(Factory.forProtocol(Protocol), "x").buildProtocol(None)
    protocol.makeConnection(StringTransportWithDisconnection())
    assert not IHalfCloseableProtocol.providedBy(protocol)


@pytest.mark.parametrize("build", [lambda address: None, lambda address: 1 / 0], ids=["None", "raises"])
def test_a_client_that_a_factory_gives_no_protocol_is_not_left_in_silence(build) -> None:
    """Twisted's wrappers would keep it connected."""
    factory = Factory()
    factory.buildProtocol = build
    protocol = Registry(Logger(), Limits(max_connections=10)).wrap(factory, "x").buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = Protocol()
    protocol.makeConnection(transport)
    assert not transport.connected


# --- a register with a clock and clients from anywhere ---


class Queue:
    """A listening socket whose clients come from wherever a test says."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        self.waiting: list[tuple[socket.socket, Any]] = []
        self._descriptor = socket.socket()
        self.fileno = self._descriptor.fileno
        self.close = self._descriptor.close

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop(0)


class Reactor(Clock):
    """The part of a reactor that connections need; `turn` handles what there is to handle now."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()
        self.writers: set[Any] = set()
        self.addReader, self.removeReader = self.readers.add, self.readers.discard
        self.addWriter, self.removeWriter = self.writers.add, self.writers.discard

    def getReaders(self) -> list[Any]:
        return list(self.readers)

    def turn(self) -> None:
        busy = True
        while busy:
            busy = False
            for port in [one for one in self.readers if isinstance(one, Port)]:
                if port in self.readers and port.socket.waiting:  # not paused by the one before it
                    busy = True
                    port.doRead()
            selectables = [one for one in self.readers if not isinstance(one, Port)]
            readable, writable, _ = select.select(selectables, list(self.writers), [], 0)
            for one in readable:
                busy = True
                why = one.doRead()
                if isinstance(why, ConnectionDone):
                    self.readers.discard(one)
                    one.readConnectionLost(Failure(why))
                elif why:
                    one.connectionLost(Failure(why))
            for one in writable:
                busy = True
                one.doWrite()
        self.advance(0)  # what was to be done later


IPV4 = "192.0.2.1"


class World:
    """A register, its ports and its clients, on a clock that stands still until `advance`."""

    def __init__(self, factory: Factory | None = None, **limits: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.clock = Reactor()
        self.factory = factory or EchoFactory()
        self.limits = Limits(**{"max_connections": 100, **limits})
        self.connections = Registry(Logger(observer=self.events.append), self.limits)
        self.connections.start(self.clock)
        self.clients: list[socket.socket] = []
        self.port = self.add_port()

    def add_port(self, *, proxied: bool = False, tls: ssl.SSLContext | None = None) -> Port:
        port = Port(
            self.clock,
            cast(Any, Queue()),
            self.factory,
            name="test",
            proxied=proxied,
            tls=tls,
            opened=self.connections.opened,
            identified=self.connections.identified,
            closed=self.connections.closed,
        )
        self.connections.ports.append(port)
        port.startListening()
        return port

    def client(self, host: str | None = IPV4, port: Port | None = None, first: bytes = b"") -> socket.socket:
        """A client from this address (None: of a UNIX socket) that has sent this, and whatever follows from it."""
        near, far = socket.socketpair()
        far.settimeout(0)
        far.sendall(first)
        address: Any = "" if host is None else (host, 1, 0, 0) if ":" in host else (host, 1)
        (port or self.port).socket.waiting.append((near, address))  # type: ignore[attr-defined]  # a Queue
        self.clients += [near, far]
        self.clock.turn()
        return far

    def apply(self, **limits: Any) -> None:
        self.limits = replace(self.limits, **limits)
        self.connections.apply(self.limits)
        self.clock.turn()

    def leave(self, client: socket.socket) -> None:
        client.close()
        self.clock.turn()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.clock.turn()

    @property
    def lines(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.events]

    @property
    def reasons(self) -> list[str]:
        """Why connections ended, from their records."""
        return [event["reason"] for event in self.events if "reason" in event]

    def close(self) -> None:
        self.connections.stop()
        for sock in (*self.clients, *(port.socket for port in self.connections.ports)):
            sock.close()


@pytest.fixture
def world() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(factory: Factory | None = None, **limits: Any) -> World:
        made.append(World(factory, **limits))
        return made[-1]

    yield make
    for one in made:
        one.close()


def is_served(client: socket.socket) -> bool:
    """Whether it was greeted; False while it waits."""
    try:
        return client.recv(100).startswith(b"Hello from the server!")
    except BlockingIOError:
        return False


def is_closed(client: socket.socket) -> bool:
    """Whether it was closed without a byte."""
    try:
        return client.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# --- limits ---


def test_at_the_limit_every_listener_pauses_and_a_free_place_is_the_next_ones(world) -> None:
    one = world(max_connections=3)
    other = one.add_port()
    inside = [one.client(), one.client("192.0.2.2", other), one.client(None)]
    assert all(map(is_served, inside))
    waiting = one.client()
    waiting_too = one.client(port=other)
    assert not is_served(waiting)
    assert not is_served(waiting_too)
    assert len(one.connections.open) == 3
    one.leave(inside.pop())
    assert is_served(waiting) + is_served(waiting_too) == 1
    one.leave(inside.pop())
    assert is_served(waiting) + is_served(waiting_too) == 1
    assert len(one.connections.open) == 3
    assert one.connections.refused["max-connections"] == 0
    assert len([line for line in one.lines if "--max-connections 3 reached" in line]) == 1


def test_at_the_limit_a_client_is_closed_at_once_and_counted_with_reject(world) -> None:
    one = world(max_connections=2, at_limit="reject")
    inside = [one.client(), one.client()]
    assert all(map(is_served, inside))
    assert is_closed(one.client())
    assert is_closed(one.client(None))
    assert one.connections.refused == {"max-connections": 2, "max-connections-per-peer": 0, "proxy-from": 0}
    one.leave(inside[0])
    assert is_served(one.client())
    assert (one.connections.ended, len(one.reasons)) == (1, 1)  # a refused client has no record, and is no end


def test_a_connection_takes_a_place_from_its_first_moment_to_its_last(world) -> None:
    one = world(max_connections=4, at_limit="reject", proxy_from=(ip_network("192.0.2.0/24"),))
    one.client(port=one.add_port(proxied=True), first=b"PROXY TCP4 ")
    one.client(port=one.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    closing = one.client()  # and has not read its greeting, which is waited for
    next(each for each in one.connections.open if each.phase == "open").loseConnection()
    one.client()
    assert one.connections.phases() == {"proxy": 1, "tls": 1, "open": 1, "closing": 1}
    assert is_closed(one.client())
    assert is_served(closing)
    assert is_closed(closing)
    one.leave(closing)
    assert is_served(one.client())


@pytest.mark.parametrize(
    ("host", "other", "prefix", "same"),
    [
        ("192.0.2.1", "192.0.2.1", 64, True),
        ("192.0.2.1", "192.0.2.2", 64, False),
        ("192.0.2.1", "::ffff:192.0.2.1", 64, True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", 1, False),
        ("2001:db8::1", "2001:db8::2", 64, True),
        ("2001:db8::1", "2001:db8:0:1::1", 64, False),
        ("2001:db8::1", "2001:db8:0:1::1", 48, True),
        ("2001:db8::1", "2001:db8::2", 128, False),
        ("2001:db8::1", "fe80::1", 1, False),
        ("fe80::1%lo", "fe80::2", 64, True),
        ("::1", "0.0.0.1", 128, False),
    ],
)
def test_who_counts_as_one_peer(host, other, prefix, same) -> None:
    def group(name: str) -> Any:
        return peer_group((IPv6Address if ":" in name else IPv4Address)("TCP", name, 1), prefix)

    assert (group(host) == group(other)) is same


@pytest.mark.parametrize("at_limit", ["pause", "reject"])
def test_a_peer_has_so_many_and_others_are_not_touched(world, at_limit) -> None:
    one = world(max_connections_per_peer=2, at_limit=at_limit)
    mine = [one.client(), one.client(f"::ffff:{IPV4}")]
    assert all(map(is_served, mine))
    assert is_closed(one.client())
    assert is_closed(one.client(f"::ffff:{IPV4}"))
    assert is_served(one.client("192.0.2.2"))
    assert one.connections.refused["max-connections-per-peer"] == 2
    one.leave(mine[0])
    assert is_served(one.client())
    assert is_closed(one.client())


def test_ipv6_peers_are_networks_of_the_prefix(world) -> None:
    one = world(max_connections_per_peer=1, peer_prefix_v6=64)
    assert is_served(one.client("2001:db8::1"))
    assert is_closed(one.client("2001:db8::2"))
    assert is_served(one.client("2001:db8:0:1::1"))
    one.apply(peer_prefix_v6=128)
    assert is_served(one.client("2001:db8::2"))
    assert is_closed(one.client("2001:db8::1"))


def test_clients_of_a_unix_socket_are_no_peers(world) -> None:
    one = world(max_connections_per_peer=1)
    assert all(is_served(one.client(None)) for _ in range(5))


def test_a_peer_that_has_gone_is_not_remembered(world) -> None:
    one = world(max_connections_per_peer=1)
    proxied = one.add_port(proxied=True)
    one.apply(proxy_from=(ip_network(IPV4),))
    for first in (b"PROXY TCP4 192.0.2.9 192.0.2.10 1 2\r\n", b"PROXY", b"nonsense"):
        one.leave(one.client(port=proxied, first=first))
    for host in (IPV4, "2001:db8::1", None):
        one.leave(one.client(host))
    assert not one.connections.open
    assert one.connections._peers == {}
    assert one.connections.ended == 6


# --- limits with a PROXY header ---


def header(source: str) -> bytes:
    return f"PROXY TCP4 {source} 192.0.2.100 1 2\r\n".encode()


def test_behind_a_proxy_the_peer_is_the_real_client_and_never_the_proxy(world) -> None:
    one = world(max_connections_per_peer=1, proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    first = one.client(port=port, first=header("192.0.2.9"))
    assert is_served(first)
    assert is_served(one.client(port=port, first=header("192.0.2.10")))
    assert is_closed(one.client(port=port, first=header("192.0.2.9")))
    assert is_served(one.client())  # the proxy itself, on a listener without
    assert len(one.connections.open) == 3
    one.leave(first)
    assert is_served(one.client(port=port, first=header("192.0.2.9")))


def test_a_client_that_is_refused_once_it_is_known_leaves_its_place_to_who_waits(world) -> None:
    one = world(max_connections=2, max_connections_per_peer=1, proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    assert is_served(one.client(port=port, first=header("192.0.2.9")))
    late = one.client(port=port)
    waiting = one.client("192.0.2.2")
    assert not is_served(waiting)
    late.sendall(header("192.0.2.9"))
    one.clock.turn()
    assert is_closed(late)
    assert is_served(waiting)
    one.advance(60)
    assert one.clock.getDelayedCalls() == []  # of its deadline nothing is left


@pytest.mark.parametrize(
    ("host", "networks", "believed"),
    [
        ("192.0.2.1", "192.0.2.0/24", True),
        ("192.0.2.1", "192.0.2.1/32", True),
        ("192.0.2.1", "192.0.2.2/32 2001:db8::/32", False),
        ("::ffff:192.0.2.1", "192.0.2.0/24", True),
        ("::ffff:192.0.2.1", "::/0", False),
        ("2001:db8::1", "192.0.2.0/24 2001:db8::/32", True),
        ("2001:db8::1", "0.0.0.0/0", False),
        ("192.0.2.1", "", False),
        (None, "", True),
    ],
)
def test_whose_headers_are_believed(world, host, networks, believed) -> None:
    one = world(proxy_from=tuple(map(ip_network, networks.split())))
    client = one.client(host, one.add_port(proxied=True), header("192.0.2.9"))
    assert (is_served if believed else is_closed)(client)
    assert one.connections.refused["proxy-from"] == (not believed)
    assert one.reasons == []
    if not believed:
        assert (
            f"refused {host if '.' in host[:4] else f'[{host}]'}:1 on test: its address is not in --proxy-from"
            in (one.lines[0])
        )
    assert is_served(one.client(host))  # without a header there is nothing to believe


# --- a change while it serves ---


def test_a_higher_limit_lets_those_in_who_wait(world) -> None:
    one = world(max_connections=1)
    clients = [one.client() for _ in range(4)]
    assert list(map(is_served, clients)) == [True, False, False, False]
    one.apply(max_connections=3)
    assert list(map(is_served, clients)) == [False, True, True, False]


def test_a_lower_limit_ends_nobody_and_lets_nobody_in(world) -> None:
    one = world(max_connections=3)
    inside = [one.client() for _ in range(3)]
    one.apply(max_connections=1)
    assert all(map(is_served, inside))
    waiting = one.client()
    one.leave(inside.pop())
    one.leave(inside.pop())
    assert not is_served(waiting)
    one.leave(inside.pop())
    assert is_served(waiting)


def test_whoever_waits_is_refused_when_that_is_asked_for(world) -> None:
    one = world(max_connections=1)
    inside, waiting = one.client(), one.client()
    one.apply(at_limit="reject")
    assert is_closed(waiting)
    one.apply(at_limit="pause")
    waiting = one.client()
    assert not is_closed(waiting)
    one.leave(inside)
    assert is_served(waiting)


def test_a_limit_for_each_peer_counts_who_is_there_already(world) -> None:
    one = world()
    inside = [one.client() for _ in range(3)]
    one.apply(max_connections_per_peer=2)
    assert is_closed(one.client())
    assert all(map(is_served, inside))
    one.leave(inside.pop())
    assert is_closed(one.client())
    one.leave(inside.pop())
    assert is_served(one.client())
    one.apply(max_connections_per_peer=0)
    assert is_served(one.client())


# --- what is logged of refusals ---


def test_refusals_are_all_counted_and_logged_once_in_ten_seconds(world) -> None:
    one = world(max_connections=1, at_limit="reject")
    one.client()
    for _ in range(1000):
        one.client("192.0.2.2").close()
    one.advance(9.9)
    one.client("192.0.2.3")
    assert one.lines == ["refused 192.0.2.2:1 on test: --max-connections are open"]
    one.advance(0.1)
    one.client("192.0.2.4")
    one.advance(10)
    one.client("192.0.2.5")
    assert one.lines[1:] == [
        "refused 192.0.2.4:1 on test: --max-connections are open (1000 more since the last such line)",
        "refused 192.0.2.5:1 on test: --max-connections are open (0 more since the last such line)",
    ]
    assert one.connections.refused["max-connections"] == 1003


def test_each_reason_has_its_own_line(world) -> None:
    one = world(max_connections=2, max_connections_per_peer=1, at_limit="reject")
    for host in (IPV4, IPV4, "192.0.2.2", "192.0.2.3"):
        one.client(host)
    one.client(port=one.add_port(proxied=True))
    one.apply(max_connections=9)
    one.client(port=one.connections.ports[1])
    assert [line.partition(": ")[2] for line in one.lines] == [
        "--max-connections-per-peer are open from its address",
        "--max-connections are open",
        "its address is not in --proxy-from, so no PROXY header of its is believed",
    ]


# --- what is logged of bad PROXY headers ---


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", r"'GET / HTTP/1.1\r\nHost: a\r\n\r\n'"),
        (b"\x16\x03\x01\x02\0\x01", r"'\x16\x03\x01\x02\x00\x01'"),
        (b"a\x1b[2J\x00\x07'\"\\{peer}", r"""'a\x1b[2J\x00\x07\'"\\{peer}'"""),
        ("\u202eü".encode(), r"'\xe2\x80\xae\xc3\xbc'"),
        (b"PROXY TCP4 not.an.address 1.2.3.4 1 2\r\n", r"'PROXY TCP4 not.an.address 1.2.3.4 1 2\r\n'"),
        (b"x" * 1000, f"'{'x' * 64}'"),
    ],
)
def test_a_bad_proxy_header_is_logged_with_its_beginning_and_harms_no_terminal(world, sent, shown) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    assert is_closed(one.client(port=one.add_port(proxied=True), first=sent))
    line, record = one.lines
    assert line.startswith("bad PROXY header from 192.0.2.1:1 on test: ")
    assert line.endswith(f"; it begins {shown}")
    assert line.isascii()
    assert line.isprintable()
    assert one.events[0]["log_level"].name == "info"
    assert record.endswith("invalid PROXY header")


def test_a_header_that_turns_bad_later_is_shown_from_its_first_byte(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    client = one.client(port=one.add_port(proxied=True), first=b"PROXY TCP4 192")
    client.sendall(b".0.2.9 nobody\r\n")
    one.clock.turn()
    assert one.lines[0].endswith(r"; it begins 'PROXY TCP4 192.0.2.9 nobody\r\n'")


def bad_headers(one: World) -> list[str]:
    return [line for line in one.lines if "bad PROXY header" in line]


def test_bad_proxy_headers_are_a_few_lines_and_a_sum_whatever_their_number(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    for _ in range(500):
        one.client(port=port, first=b"junk").close()
    assert len(bad_headers(one)) == 5
    one.advance(10)
    assert bad_headers(one)[5:] == ["495 more bad PROXY headers on test"]
    one.advance(100)
    assert len(bad_headers(one)) == 6
    for _ in range(6):
        one.client(port=port, first=b"junk").close()
    one.advance(10)
    assert bad_headers(one)[11:] == ["1 more bad PROXY header on test"]
    assert one.connections.counters()["handshake_failed\tinvalid PROXY header\ttest"] == 506


def test_the_sum_is_logged_at_the_end_at_the_latest(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    for _ in range(7):
        one.client(port=port, first=b"junk").close()
    one.apply(max_connections=50)  # which has nothing to do with it
    assert len(bad_headers(one)) == 5
    one.connections.stop()
    assert bad_headers(one)[5:] == ["2 more bad PROXY headers on test"]
    one.advance(10)
    assert len(bad_headers(one)) == 6


def test_who_says_nothing_has_no_bad_header(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    one.leave(one.client(port=one.add_port(proxied=True)))
    one.leave(one.client(port=one.add_port(proxied=True), first=b"PROXY TCP4 1"))
    assert bad_headers(one) == []


# --- deadlines ---


def still_open(world: World, until: float, step: float = 0.25) -> None:
    """Let time pass until `until`, and see that nobody is ended before."""
    while world.clock.seconds() + step < until:
        world.advance(step)
        assert world.reasons == []
    world.advance(until - world.clock.seconds())


def test_a_silent_connection_is_closed_between_the_timeout_and_two_sweeps_more(world) -> None:
    one = world(idle_timeout=20)  # a sweep each second
    client = one.client()
    assert is_served(client)
    still_open(one, 21)
    assert one.reasons == ["idle"]
    assert is_closed(client)
    assert one.connections.aborted == 0


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_byte_in_either_direction_starts_the_clock_again(world, direction) -> None:
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


def test_whoever_speaks_now_and_then_stays(world) -> None:
    one = world(idle_timeout=20)
    client = one.client()
    for _ in range(10):
        still_open(one, one.clock.seconds() + 19.5)
        client.sendall(b"x")
        one.clock.turn()
    assert one.reasons == []


def test_zero_is_never(world) -> None:
    one = world(idle_timeout=0)
    one.client()
    one.advance(1e6)
    assert one.reasons == []
    assert one.clock.getDelayedCalls() == []


def test_a_new_timeout_is_in_force_at_once(world) -> None:
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


class Flood(Protocol):
    """Sends more than any kernel holds for a peer."""

    def connectionMade(self) -> None:
        self.transport.write(bytes(10 << 20))


def test_a_peer_that_stopped_reading_is_cut_by_the_same_clock(world) -> None:
    one = world(Factory.forProtocol(Flood), idle_timeout=20)
    one.client()
    still_open(one, 21)
    assert one.reasons == ["stopped reading"]
    assert (one.connections.ended, one.connections.aborted) == (1, 1)


def test_a_peer_that_reads_slowly_is_not_cut(world) -> None:
    one = world(Factory.forProtocol(Flood), idle_timeout=20)
    client = one.client()
    for _ in range(10):
        still_open(one, one.clock.seconds() + 19.5)
        client.recv(1 << 20)
        one.clock.turn()
    assert one.reasons == []


def test_a_peer_that_does_not_read_cannot_prevent_a_close_that_its_protocol_asked_for(world) -> None:
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


def test_a_producer_that_never_finishes_keeps_nobody_for_more_than_another_sweep(world) -> None:
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


def test_a_peer_in_twisteds_tls_that_answers_no_close_notify_is_not_waited_for(world, certificates) -> None:
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


def test_a_handshake_is_no_idle_time_and_none_of_it_counts(world) -> None:
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


def test_a_header_that_does_not_come_is_its_own_deadline(world) -> None:
    one = world(idle_timeout=2, proxy_from=(ip_network(IPV4),))
    one.client(port=one.add_port(proxied=True), first=b"PROXY ")
    one.client(port=one.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    still_open(one, 10)
    assert one.reasons == ["PROXY header timed out", "TLS handshake timed out"]
    assert one.clock.getDelayedCalls() == [one.connections._sweeping.call]


# --- the end ---


def test_close_all_sends_what_is_buffered_and_aborts_who_has_nothing(world) -> None:
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


def test_close_all_closes_also_a_transport_that_is_its_own_producer_and_paused(world) -> None:
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


def test_abort_all_leaves_nobody_in_any_phase(world) -> None:
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


def test_a_protocol_that_wants_to_know_of_the_drain_is_told_once(world) -> None:
    one = world(Factory.forProtocol(Polite), proxy_from=(ip_network(IPV4),))
    first = one.client()
    late = one.client(port=one.add_port(proxied=True))
    one.connections.when_empty = lambda: None
    for _ in range(3):
        one.connections.tell_drain()
        one.clock.turn()
    assert first.recv(100) == b"bye"
    late.sendall(header("192.0.2.9"))
    one.clock.turn()
    one.connections.tell_drain()
    one.clock.turn()
    assert late.recv(100) == b"bye"
    assert len(one.connections.open) == 2


def test_a_protocol_below_a_layer_that_wraps_it_is_told(world) -> None:
    one = world(Factory.forProtocol(Polite))
    client = one.client()
    (connection,) = one.connections.open
    layer = ProtocolWrapper(WrappingFactory(one.factory), connection.protocol)
    connection.protocol = layer  # as startTLS does it with pyOpenSSL's contexts
    one.connections.tell_drain()
    one.clock.turn()
    assert client.recv(100) == b"bye"


def test_a_protocol_that_fails_in_drain_loses_its_own_connection(world) -> None:
    one = world(Factory.forProtocol(Impolite))
    one.client()
    one.factory.protocol = Polite
    bystander = one.client()
    one.connections.tell_drain()
    one.clock.turn()
    assert bystander.recv(100) == b"bye"
    assert len(one.connections.open) == 1
    assert one.connections.aborted == 1
    assert [event["log_failure"].type for event in one.events if "log_failure" in event] == [ZeroDivisionError]


def test_a_protocol_that_knows_nothing_of_a_drain_is_left_alone(world) -> None:
    one = world()
    client = one.client()
    one.connections.tell_drain()
    one.clock.turn()
    assert is_served(client)
    assert len(one.connections.open) == 1


# --- transports that are not ours ---


@pytest.fixture
def listen():
    """Serves a factory through a register on a port of Twisted's own; gives the port's number."""
    ports = []

    def start(connections: Registry) -> int:
        ports.append(reactor.listenTCP(0, connections.wrap(EchoFactory(), "twisted"), interface="127.0.0.1"))
        return ports[-1].getHost().port

    yield start
    for port in ports:
        pytest_twisted.blockon(port.stopListening())


@pytest.mark.parametrize("limit", ["max_connections", "max_connections_per_peer"])
@pytest_twisted.inlineCallbacks
def test_limits_hold_for_foreign_transports_too(listen, limit):
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

    def missed() -> Deferred[None]:
        empty: Deferred[None] = Deferred()
        connections.when_empty = lambda: reactor.callLater(0, empty.callback, None)
        return empty.addTimeout(20, reactor)

    for refused in (1, 2):
        clients = []
        for _ in range(3):
            clients.append((yield deferToThread(attempt)))
        assert [answer for _, answer in clients] == [b"Hello from the server!"] * 2 + [b""]
        assert connections.refused[limit.replace("_", "-")] == refused
        assert len(connections.open) == 2
        empty = missed()
        for client, _ in clients:
            client.close()
        yield empty


def wrapped(connections: Registry) -> tuple[Any, StringTransportWithDisconnection]:
    protocol = connections.wrap(EchoFactory(), "x").buildProtocol(None)
    transport = StringTransportWithDisconnection()
    transport.protocol = protocol
    protocol.makeConnection(transport)
    return protocol, transport


def test_a_silent_foreign_transport_is_closed_and_one_that_does_not_close_is_cut(world) -> None:
    one = world(idle_timeout=20)
    wrapped(one.connections)
    still_open(one, 21)
    assert one.reasons == ["idle"]
    protocol, transport = wrapped(one.connections)
    transport.loseConnection = lambda: None
    transport.abortConnection = lambda: protocol.connectionLost(Failure(ConnectionAborted()))
    one.advance(1)
    for _ in range(21):
        one.advance(1)
    assert one.reasons == ["idle", "stopped reading"]


def test_a_foreign_transport_ends_with_the_others(world) -> None:
    one = world()
    wrapped(one.connections)
    one.connections.close_all("drained")
    wrapped(one.connections)
    one.connections.abort_all("cut off")
    assert one.reasons == ["drained", "cut off"]
    assert not one.connections.open


# --- what is counted and who is shown ---


def test_what_an_open_connection_moved_is_counted_and_stays_so(world) -> None:
    one = world()
    client = one.client(first=b"hello")
    open_now = one.connections.counters()
    assert (open_now["opened\t\ttest"], open_now["phase\topen\ttest"]) == (1, 1)
    assert (open_now["in\t\ttest"], open_now["out\t\ttest"]) == (5, 27)
    client.recv(100)
    one.leave(client)
    gone = one.connections.counters()
    assert "phase\topen\ttest" not in gone
    assert gone["closed\tpeer finished\ttest"] == 1
    assert (gone["in\t\ttest"], gone["out\t\ttest"]) == (5, 27)


def test_whoever_was_opened_is_there_or_closed_also_when_refused_once_known(world) -> None:
    one = world(max_connections_per_peer=1, proxy_from=(ip_network("192.0.2.0/24"),))
    proxied = one.add_port(proxied=True)
    one.client(port=proxied, first=header("198.51.100.1"))
    one.client(port=proxied, first=header("198.51.100.1"))
    one.client(port=proxied, first=b"no header")
    found = one.connections.counters()
    now = sum(count for name, count in found.items() if name.startswith("phase\t"))
    closed = sum(count for name, count in found.items() if name.startswith("closed\t"))
    assert (found["opened\t\ttest"], now, closed) == (3, 1, 2)
    assert found["closed\trefused\ttest"] == found["refused\tmax-connections-per-peer\ttest"] == 1
    assert found["handshake_failed\tinvalid PROXY header\ttest"] == 1


def test_connections_are_shown_in_the_order_that_is_asked_for(world) -> None:
    one = world(idle_timeout=100)
    for number, size in enumerate((20, 300, 1)):
        one.client(host=f"192.0.2.{number}", first=b"x" * size)
    one.advance(5)  # a sweep has seen them

    def shown(sort: str, count: int = 10) -> list[Any]:
        return [row[0] for row in now(one.connections.rows(sort, count))]

    first, second, third = "192.0.2.0:1", "192.0.2.1:1", "192.0.2.2:1"
    assert shown("bytes_in") == [third, first, second]
    assert shown("-bytes_in", 2) == [second, first]
    assert shown("-age") == [first, second, third]
    assert shown("age", 1) == [third]
    assert shown("-peer") == [third, second, first]
    one.clients[3].sendall(b"y")
    one.advance(10)
    one.advance(5)
    idle = {row[0]: row[COLUMNS.index("idle")] for row in now(one.connections.rows("-idle", 10))}
    assert list(idle)[-1] == second
    assert idle[first] == idle[third] > idle[second]


def test_without_an_idle_timeout_nobody_knows_who_is_idle(world) -> None:
    one = world()
    one.client()
    [row] = now(one.connections.rows("idle", 10))
    assert row[COLUMNS.index("idle")] is None
    assert first_rows([[1, *row], [0, *row]], "-idle", 5) == [[1, *row], [0, *row]]


class Stranger:
    """An open connection whose peer has a very long name."""

    opened, phase, bytes_in, bytes_out = 0.0, "open", 0, 0

    def getPeer(self) -> UNIXAddress:
        return UNIXAddress("/" + "\U0001f600" * 100)


def test_a_row_is_short_whatever_a_client_calls_itself(world) -> None:
    one = world()
    one.connections._add(Stranger(), "test")
    [row] = now(one.connections.rows("age", 10))
    assert row[0].isascii()
    assert len(row[0]) == 64


class Many:
    """An open connection of many."""

    phase = "open"
    seen = -1

    def __init__(self, number: int) -> None:
        self.opened = self.bytes_in = number
        self.bytes_out = 2 * number

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", self.bytes_in)


@pytest.fixture
def many(monkeypatch) -> tuple[Registry, Clock, list[Many]]:
    """A register with 95 connections, of which 10 are looked at in one turn of its clock."""
    monkeypatch.setattr("rtservice.process.registry.SLICE", 10)
    connections, clock = Registry(Logger(observer=lambda event: None), Limits(max_connections=1000)), Clock()
    connections.start(clock)
    opened = [Many(number) for number in range(1, 96)]
    for one in opened:
        connections._add(one, "test")
    return connections, clock, opened


def turns(clock: Clock, done: list[Any]) -> int:
    """How many steps of work a clock had until something was done."""
    count = 0
    while not done:
        count += 1
        assert count < 1000
        clock.advance(0.01)
    return count


def test_many_connections_are_listed_over_several_turns(many) -> None:
    connections, clock, opened = many
    found: list[Any] = []
    connections.rows("-bytes_in", 20).addCallback(found.append)
    clock.advance(0.01)
    closed = opened[94]
    del connections.open[closed]  # in the meantime
    assert turns(clock, found) >= 9
    assert [row[COLUMNS.index("bytes_in")] for row in found[0]] == list(range(94, 74, -1))


def test_many_connections_are_counted_over_several_turns_and_no_total_falls(many) -> None:
    connections, clock, opened = many
    done: list[Any] = []
    connections.refresh().addCallback(done.append)
    clock.advance(0.01)
    last = opened[94]
    tally = connections.open.pop(last)  # which is closed before its turn
    tally.ended("closed", "open", 1.0, last.bytes_in, last.bytes_out)
    assert turns(clock, done) >= 9
    found = connections.counters()
    assert found["open"] == 94
    assert found["phase\topen\ttest"] == 95
    assert found["in\t\ttest"] == sum(range(1, 96))
    del done[:]
    clock.pump([0.01] * 20)  # counters() has begun another count
    again = connections.counters()
    assert again["phase\topen\ttest"] == 94
    assert again["in\t\ttest"] == sum(range(1, 96))
    assert connections.phases() == {"proxy": 0, "tls": 0, "open": 94, "closing": 0}


def test_two_who_ask_for_a_count_share_it(many) -> None:
    connections, clock, _ = many
    first: list[Any] = []
    second: list[Any] = []
    connections.refresh().addCallback(first.append)
    connections.refresh().addCallback(second.append)
    steps = turns(clock, second)
    assert first == second == [None]
    assert steps <= 11


def test_few_connections_are_counted_at_once(world) -> None:
    one = world()
    one.client(first=b"hello")
    assert now(one.connections.refresh()) is None
    assert one.connections.counters()["in\t\ttest"] == 5
