"""Limits on connections: who waits, who is refused, and what is logged."""

import ssl
from ipaddress import ip_network

import pytest

from tests.support.registry_world import IPV4, header, is_closed, is_served

# --- limits ---


def test_every_listener_pauses_at_the_limit_and_accepts_one_client_for_each_closed(world) -> None:
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
    assert one.refused["max-connections"] == 0
    assert [event["limit"] for event in one.events if event["event"] == "connection.limit_reached"] == [3]


def test_reject_closes_and_counts_each_client_at_the_limit(world) -> None:
    one = world(max_connections=2, at_limit="reject")
    inside = [one.client(), one.client()]
    assert all(map(is_served, inside))
    assert is_closed(one.client())
    assert is_closed(one.client(None))
    assert one.refused == {"max-connections": 2}
    one.leave(inside[0])
    assert is_served(one.client())
    assert (one.connections.ended, len(one.reasons)) == (1, 1)  # a refused client has no record, and is no end


def test_connection_counts_towards_the_limit_in_every_phase(world) -> None:
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


@pytest.mark.parametrize("at_limit", ["pause", "reject"])
def test_limit_per_peer_does_not_affect_other_peers(world, at_limit) -> None:
    one = world(max_connections_per_peer=2, at_limit=at_limit)
    mine = [one.client(), one.client(f"::ffff:{IPV4}")]
    assert all(map(is_served, mine))
    assert is_closed(one.client())
    assert is_closed(one.client(f"::ffff:{IPV4}"))
    assert is_served(one.client("192.0.2.2"))
    assert one.refused["max-connections-per-peer"] == 2
    one.leave(mine[0])
    assert is_served(one.client())
    assert is_closed(one.client())


def test_ipv6_peers_are_grouped_by_the_prefix(world) -> None:
    one = world(max_connections_per_peer=1, peer_prefix_v6=64)
    assert is_served(one.client("2001:db8::1"))
    assert is_closed(one.client("2001:db8::2"))
    assert is_served(one.client("2001:db8:0:1::1"))
    one.apply(peer_prefix_v6=128)
    assert is_served(one.client("2001:db8::2"))
    assert is_closed(one.client("2001:db8::1"))


def test_unix_clients_have_no_limit_per_peer(world) -> None:
    one = world(max_connections_per_peer=1)
    assert all(is_served(one.client(None)) for _ in range(5))


def test_peer_without_connections_is_removed_from_the_count(world) -> None:
    one = world(max_connections_per_peer=1)
    proxied = one.add_port(proxied=True)
    one.apply(proxy_from=(ip_network(IPV4),))
    for first in (b"PROXY TCP4 192.0.2.9 192.0.2.10 1 2\r\n", b"PROXY", b"nonsense"):
        one.leave(one.client(port=proxied, first=first))
    for host in (IPV4, "2001:db8::1", None):
        one.leave(one.client(host))
    assert not one.connections.open
    assert one.connections._admission._peers == {}
    assert one.connections.ended == 6


# --- limits with a PROXY header ---


def test_limit_per_peer_applies_to_the_client_behind_a_proxy_not_to_the_proxy(world) -> None:
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


def test_client_refused_after_its_proxy_header_frees_a_place_for_a_waiting_client(world) -> None:
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
def test_client_with_a_proxy_header_is_served_only_from_trusted_networks(world, host, networks, believed) -> None:
    one = world(proxy_from=tuple(map(ip_network, networks.split())))
    client = one.client(host, one.add_port(proxied=True), header("192.0.2.9"))
    assert (is_served if believed else is_closed)(client)
    assert one.refused["proxy-from"] == (not believed)
    assert one.reasons == []
    if not believed:
        assert (
            f"client {host if '.' in host[:4] else f'[{host}]'}:1 on test refused: its address is not in --proxy-from"
            in (one.lines[0])
        )
    assert is_served(one.client(host))  # without a header there is nothing to believe


# --- a change while it serves ---


def test_raised_limit_accepts_waiting_clients(world) -> None:
    one = world(max_connections=1)
    clients = [one.client() for _ in range(4)]
    assert list(map(is_served, clients)) == [True, False, False, False]
    one.apply(max_connections=3)
    assert list(map(is_served, clients)) == [False, True, True, False]


def test_lowered_limit_keeps_open_connections_and_accepts_no_new_clients(world) -> None:
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


def test_waiting_clients_are_refused_after_a_change_to_reject(world) -> None:
    one = world(max_connections=1)
    inside, waiting = one.client(), one.client()
    one.apply(at_limit="reject")
    assert is_closed(waiting)
    one.apply(at_limit="pause")
    waiting = one.client()
    assert not is_closed(waiting)
    one.leave(inside)
    assert is_served(waiting)


def test_new_limit_per_peer_counts_open_connections(world) -> None:
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


def test_all_refusals_are_counted_and_logged_once_in_10_seconds(world) -> None:
    one = world(max_connections=1, at_limit="reject")
    one.client()
    for _ in range(1000):
        one.client("192.0.2.2").close()
    one.advance(9.9)
    one.client("192.0.2.3")
    assert one.lines == ["client 192.0.2.2:1 on test refused: --max-connections reached"]
    one.advance(0.1)
    one.client("192.0.2.4")
    one.advance(10)
    one.client("192.0.2.5")
    assert [(event["event"], event["peer"], event["setting"], event["suppressed"]) for event in one.events] == [
        ("connection.refused", "192.0.2.2:1", "max-connections", 0),
        ("connection.refused", "192.0.2.4:1", "max-connections", 1000),
        ("connection.refused", "192.0.2.5:1", "max-connections", 0),
    ]
    assert one.refused["max-connections"] == 1003


def test_each_refusal_reason_is_logged_separately(world) -> None:
    one = world(max_connections=2, max_connections_per_peer=1, at_limit="reject")
    for host in (IPV4, IPV4, "192.0.2.2", "192.0.2.3"):
        one.client(host)
    one.client(port=one.add_port(proxied=True))
    one.apply(max_connections=9)
    one.client(port=one.connections.ports[1])
    settings = [event["setting"] for event in one.events if event["event"] == "connection.refused"]
    assert settings == ["max-connections-per-peer", "max-connections", "proxy-from"]
    assert len(settings) == len(one.events)
