"""Log records of invalid PROXY headers."""

from ipaddress import ip_network

import pytest

from rtservice.process.counters import CounterKey
from tests.support.registry_world import IPV4, World, is_closed


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
def test_invalid_proxy_header_is_logged_with_its_first_bytes_escaped(world, sent, shown) -> None:
    running = world(proxy_from=(ip_network(IPV4),))
    assert is_closed(running.client(port=running.add_port(proxied=True), first=sent))
    invalid, closed = running.events
    assert (invalid["event"], closed["event"]) == ("proxy.header_invalid", "connection.closed")
    assert (invalid["peer"], invalid["listener"], invalid["beginning"]) == ("192.0.2.1:1", "test", shown)
    assert invalid["log_level"].name == "info"
    assert running.lines[0].isascii()
    assert running.lines[0].isprintable()
    assert closed["reason"] == "invalid PROXY header"


def test_header_that_becomes_invalid_later_is_logged_from_its_first_byte(world) -> None:
    running = world(proxy_from=(ip_network(IPV4),))
    client = running.client(port=running.add_port(proxied=True), first=b"PROXY TCP4 192")
    client.sendall(b".0.2.9 nobody\r\n")
    running.clock.turn()
    assert running.events[0]["beginning"] == r"'PROXY TCP4 192.0.2.9 nobody\r\n'"


def logged_headers(running: World) -> list[int]:
    """Return the logged invalid headers: 1 for each single record, the suppressed count for each summary record."""
    return [event.get("count", 1) for event in running.events if event["event"].startswith("proxy.")]


def test_many_invalid_proxy_headers_are_logged_as_a_few_records_and_a_count(world) -> None:
    running = world(proxy_from=(ip_network(IPV4),))
    port = running.add_port(proxied=True)
    for _ in range(500):
        running.client(port=port, first=b"junk").close()
    assert len(logged_headers(running)) == 5
    running.advance(10)
    assert logged_headers(running)[5:] == [495]
    running.advance(100)
    assert len(logged_headers(running)) == 6
    for _ in range(6):
        running.client(port=port, first=b"junk").close()
    running.advance(10)
    assert logged_headers(running)[6:] == [1, 1, 1, 1, 1, 1]
    assert running.events[-1]["event"] == "proxy.headers_suppressed"
    assert running.connections.counters()[CounterKey("handshake_failed", "invalid PROXY header", "test")] == 506


def test_suppressed_count_is_logged_at_the_latest_when_the_registry_stops(world) -> None:
    running = world(proxy_from=(ip_network(IPV4),))
    port = running.add_port(proxied=True)
    for _ in range(7):
        running.client(port=port, first=b"junk").close()
    running.apply(max_connections=50)  # an unrelated change
    assert len(logged_headers(running)) == 5
    running.connections.stop()
    assert logged_headers(running)[5:] == [2]
    running.advance(10)
    assert len(logged_headers(running)) == 6


def test_connection_without_a_complete_header_is_not_an_invalid_header(world) -> None:
    running = world(proxy_from=(ip_network(IPV4),))
    running.leave(running.client(port=running.add_port(proxied=True)))
    running.leave(running.client(port=running.add_port(proxied=True), first=b"PROXY TCP4 1"))
    assert logged_headers(running) == []
