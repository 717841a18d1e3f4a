"""The registry: names of peers, counters and the list of connections."""

from ipaddress import ip_network
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock
from twisted.logger import Logger

from rtservice.net.address import peer_name
from rtservice.net.phases import OPEN
from rtservice.process.admission import Limits
from rtservice.process.counters import OPEN_CONNECTIONS, CounterKey
from rtservice.process.registry import COLUMNS, Registry, first_rows
from tests.support.registry_world import header


def result_of(result: Deferred) -> Any:
    """Return the result of a Deferred that has fired."""
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
def test_peer_name_is_its_address_with_control_characters_escaped(address, name) -> None:
    assert peer_name(address) == name


# --- counters and the list of connections ---


def test_bytes_of_an_open_connection_are_counted_and_kept_after_it_closes(world) -> None:
    running = world()
    client = running.client(first=b"hello")
    open_now = running.connections.counters()
    assert (open_now[CounterKey("opened", "", "test")], open_now[CounterKey("phase", "open", "test")]) == (1, 1)
    assert (open_now[CounterKey("in", "", "test")], open_now[CounterKey("out", "", "test")]) == (5, 27)
    client.recv(100)
    running.leave(client)
    gone = running.connections.counters()
    assert CounterKey("phase", "open", "test") not in gone
    assert gone[CounterKey("closed", "peer finished", "test")] == 1
    assert (gone[CounterKey("in", "", "test")], gone[CounterKey("out", "", "test")]) == (5, 27)


def test_opened_connections_equal_open_plus_closed_including_those_refused_after_the_header(world) -> None:
    running = world(max_connections_per_peer=1, proxy_from=(ip_network("192.0.2.0/24"),))
    proxied = running.add_port(proxied=True)
    running.client(port=proxied, first=header("198.51.100.1"))
    running.client(port=proxied, first=header("198.51.100.1"))
    running.client(port=proxied, first=b"no header")
    found = running.connections.counters()
    open_now = sum(count for key, count in found.items() if key.name == "phase")
    closed = sum(count for key, count in found.items() if key.name == "closed")
    assert (found[CounterKey("opened", "", "test")], open_now, closed) == (3, 1, 2)
    assert found[CounterKey("closed", "refused", "test")] == 1
    assert found[CounterKey("refused", "max-connections-per-peer", "test")] == 1
    assert found[CounterKey("handshake_failed", "invalid PROXY header", "test")] == 1


def test_connections_are_listed_in_the_requested_order(world) -> None:
    running = world(idle_timeout=100)
    for number, size in enumerate((20, 300, 1)):
        running.client(host=f"192.0.2.{number}", first=b"x" * size)
    running.advance(5)  # past the next sweep

    def shown(sort: str, count: int = 10) -> list[Any]:
        return [row[0] for row in result_of(running.connections.rows(sort, count))]

    first, second, third = "192.0.2.0:1", "192.0.2.1:1", "192.0.2.2:1"
    assert shown("bytes_in") == [third, first, second]
    assert shown("-bytes_in", 2) == [second, first]
    assert shown("-age") == [first, second, third]
    assert shown("age", 1) == [third]
    assert shown("-peer") == [third, second, first]
    running.clients[3].sendall(b"y")
    running.advance(10)
    running.advance(5)
    idle = {row[0]: row[COLUMNS.index("idle")] for row in result_of(running.connections.rows("-idle", 10))}
    assert list(idle)[-1] == second
    assert idle[first] == idle[third] > idle[second]


def test_idle_time_is_none_without_an_idle_timeout(world) -> None:
    running = world()
    running.client()
    [row] = result_of(running.connections.rows("idle", 10))
    assert row[COLUMNS.index("idle")] is None
    assert first_rows([[1, *row], [0, *row]], "-idle", 5) == [[1, *row], [0, *row]]


class LongNamedConnection:
    """An open connection whose peer has a very long name."""

    port = SimpleNamespace(name="test")
    opened, phase, bytes_in, bytes_out = 0.0, OPEN, 0, 0

    def getPeer(self) -> UNIXAddress:
        return UNIXAddress("/" + "\U0001f600" * 100)


def test_peer_name_in_a_row_is_ascii_and_at_most_64_characters(world) -> None:
    running = world()
    running.connections.add(LongNamedConnection())
    [row] = result_of(running.connections.rows("age", 10))
    assert row[0].isascii()
    assert len(row[0]) == 64


class NumberedConnection:
    """One of many open connections."""

    port = SimpleNamespace(name="test")
    phase = OPEN
    seen = -1

    def __init__(self, number: int) -> None:
        self.opened = self.bytes_in = number
        self.bytes_out = 2 * number

    def getPeer(self) -> IPv4Address:
        return IPv4Address("TCP", "192.0.2.1", self.bytes_in)


@pytest.fixture
def many_connections(monkeypatch) -> tuple[Registry, Clock, list[NumberedConnection]]:
    """A Registry with 95 connections that processes 10 of them in each turn of its clock."""
    monkeypatch.setattr("rtservice.process.registry.SLICE", 10)
    connections, clock = Registry(Logger(observer=lambda event: None), Limits(max_connections=1000)), Clock()
    connections.start(clock)
    opened = [NumberedConnection(number) for number in range(1, 96)]
    for connection in opened:
        connections.add(connection)
    return connections, clock, opened


def advance_until(clock: Clock, done: list[Any]) -> int:
    """Advance the clock until `done` is not empty, and return the number of steps."""
    count = 0
    while not done:
        count += 1
        assert count < 1000
        clock.advance(0.01)
    return count


def test_many_connections_are_listed_over_several_turns(many_connections) -> None:
    connections, clock, opened = many_connections
    found: list[Any] = []
    connections.rows("-bytes_in", 20).addCallback(found.append)
    clock.advance(0.01)
    closed = opened[94]
    del connections.open[closed]  # in the meantime
    assert advance_until(clock, found) >= 9
    assert [row[COLUMNS.index("bytes_in")] for row in found[0]] == list(range(94, 74, -1))


def test_many_connections_are_counted_over_several_turns_and_no_total_decreases(many_connections) -> None:
    connections, clock, opened = many_connections
    done: list[Any] = []
    connections.refresh().addCallback(done.append)
    clock.advance(0.01)
    last = opened[94]
    stats = connections.open.pop(last)  # closed before it is counted
    stats.add_closed("closed", OPEN, 1.0, last.bytes_in, last.bytes_out)
    assert advance_until(clock, done) >= 9
    found = connections.counters()
    assert found[OPEN_CONNECTIONS] == 94
    assert found[CounterKey("phase", "open", "test")] == 95
    assert found[CounterKey("in", "", "test")] == sum(range(1, 96))
    del done[:]
    clock.pump([0.01] * 20)  # counters() has started another count
    again = connections.counters()
    assert again[CounterKey("phase", "open", "test")] == 94
    assert again[CounterKey("in", "", "test")] == sum(range(1, 96))
    assert connections.phases() == {"proxy": 0, "tls": 0, "open": 94, "closing": 0}


def test_concurrent_refreshes_share_one_count(many_connections) -> None:
    connections, clock, _ = many_connections
    first: list[Any] = []
    second: list[Any] = []
    connections.refresh().addCallback(first.append)
    connections.refresh().addCallback(second.append)
    steps = advance_until(clock, second)
    assert first == second == [None]
    assert steps <= 11


def test_few_connections_are_counted_at_once(world) -> None:
    running = world()
    running.client(first=b"hello")
    assert result_of(running.connections.refresh()) is None
    assert running.connections.counters()[CounterKey("in", "", "test")] == 5
