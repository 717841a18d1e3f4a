"""What is logged of bad PROXY headers."""

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
    one = world(proxy_from=(ip_network(IPV4),))
    assert is_closed(one.client(port=one.add_port(proxied=True), first=sent))
    invalid, closed = one.events
    assert (invalid["event"], closed["event"]) == ("proxy.header_invalid", "connection.closed")
    assert (invalid["peer"], invalid["listener"], invalid["beginning"]) == ("192.0.2.1:1", "test", shown)
    assert invalid["log_level"].name == "info"
    assert one.lines[0].isascii()
    assert one.lines[0].isprintable()
    assert closed["reason"] == "invalid PROXY header"


def test_header_that_becomes_invalid_later_is_logged_from_its_first_byte(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    client = one.client(port=one.add_port(proxied=True), first=b"PROXY TCP4 192")
    client.sendall(b".0.2.9 nobody\r\n")
    one.clock.turn()
    assert one.events[0]["beginning"] == r"'PROXY TCP4 192.0.2.9 nobody\r\n'"


def bad_headers(one: World) -> list[int]:
    """What was logged of bad headers: 1 for each record of one, and the number of the others for each sum."""
    return [event.get("count", 1) for event in one.events if event["event"].startswith("proxy.")]


def test_many_invalid_proxy_headers_are_logged_as_a_few_records_and_a_count(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    for _ in range(500):
        one.client(port=port, first=b"junk").close()
    assert len(bad_headers(one)) == 5
    one.advance(10)
    assert bad_headers(one)[5:] == [495]
    one.advance(100)
    assert len(bad_headers(one)) == 6
    for _ in range(6):
        one.client(port=port, first=b"junk").close()
    one.advance(10)
    assert bad_headers(one)[6:] == [1, 1, 1, 1, 1, 1]
    assert one.events[-1]["event"] == "proxy.headers_suppressed"
    assert one.connections.counters()[CounterKey("handshake_failed", "invalid PROXY header", "test")] == 506


def test_suppressed_count_is_logged_at_the_latest_when_the_registry_stops(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    port = one.add_port(proxied=True)
    for _ in range(7):
        one.client(port=port, first=b"junk").close()
    one.apply(max_connections=50)  # which has nothing to do with it
    assert len(bad_headers(one)) == 5
    one.connections.stop()
    assert bad_headers(one)[5:] == [2]
    one.advance(10)
    assert len(bad_headers(one)) == 6


def test_connection_without_a_complete_header_is_not_an_invalid_header(world) -> None:
    one = world(proxy_from=(ip_network(IPV4),))
    one.leave(one.client(port=one.add_port(proxied=True)))
    one.leave(one.client(port=one.add_port(proxied=True), first=b"PROXY TCP4 1"))
    assert bad_headers(one) == []
