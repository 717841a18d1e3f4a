"""Limits on connections: waiting clients, refused clients, and the log."""

import ssl
from ipaddress import ip_network

import pytest

from tests.support.registry_world import IPV4, header, is_closed, is_served

# --- limits ---


def test_every_listener_pauses_at_the_limit_and_accepts_one_client_for_each_closed(world) -> None:
    running = world(max_connections=3)
    other = running.add_port()
    inside = [running.client(), running.client("192.0.2.2", other), running.client(None)]
    assert all(map(is_served, inside))
    waiting = running.client()
    waiting_too = running.client(port=other)
    assert not is_served(waiting)
    assert not is_served(waiting_too)
    assert len(running.connections.open) == 3
    running.leave(inside.pop())
    assert is_served(waiting) + is_served(waiting_too) == 1
    running.leave(inside.pop())
    assert is_served(waiting) + is_served(waiting_too) == 1
    assert len(running.connections.open) == 3
    assert running.refused["max-connections"] == 0
    assert [event["limit"] for event in running.events if event["event"] == "connection.limit_reached"] == [3]


def test_reject_closes_and_counts_each_client_at_the_limit(world) -> None:
    running = world(max_connections=2, at_limit="reject")
    inside = [running.client(), running.client()]
    assert all(map(is_served, inside))
    assert is_closed(running.client())
    assert is_closed(running.client(None))
    assert running.refused == {"max-connections": 2}
    running.leave(inside[0])
    assert is_served(running.client())
    # a refused client has no record and is not counted as ended
    assert (running.connections.ended, len(running.reasons)) == (1, 1)


def test_connection_counts_towards_the_limit_in_every_phase(world) -> None:
    running = world(max_connections=4, at_limit="reject", proxy_from=(ip_network("192.0.2.0/24"),))
    running.client(port=running.add_port(proxied=True), first=b"PROXY TCP4 ")
    running.client(port=running.add_port(tls=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)))
    closing = running.client()  # it has not read its greeting, which is still flushed
    next(each for each in running.connections.open if each.phase == "open").loseConnection()
    running.client()
    assert running.connections.phases() == {"proxy": 1, "tls": 1, "open": 1, "closing": 1}
    assert is_closed(running.client())
    assert is_served(closing)
    assert is_closed(closing)
    running.leave(closing)
    assert is_served(running.client())


@pytest.mark.parametrize("at_limit", ["pause", "reject"])
def test_limit_per_peer_does_not_affect_other_peers(world, at_limit) -> None:
    running = world(max_connections_per_peer=2, at_limit=at_limit)
    mine = [running.client(), running.client(f"::ffff:{IPV4}")]
    assert all(map(is_served, mine))
    assert is_closed(running.client())
    assert is_closed(running.client(f"::ffff:{IPV4}"))
    assert is_served(running.client("192.0.2.2"))
    assert running.refused["max-connections-per-peer"] == 2
    running.leave(mine[0])
    assert is_served(running.client())
    assert is_closed(running.client())


def test_ipv6_peers_are_grouped_by_the_prefix(world) -> None:
    running = world(max_connections_per_peer=1, peer_prefix_v6=64)
    assert is_served(running.client("2001:db8::1"))
    assert is_closed(running.client("2001:db8::2"))
    assert is_served(running.client("2001:db8:0:1::1"))
    running.apply(peer_prefix_v6=128)
    assert is_served(running.client("2001:db8::2"))
    assert is_closed(running.client("2001:db8::1"))


def test_unix_clients_have_no_limit_per_peer(world) -> None:
    running = world(max_connections_per_peer=1)
    assert all(is_served(running.client(None)) for _ in range(5))


def test_peer_without_connections_is_removed_from_the_count(world) -> None:
    running = world(max_connections_per_peer=1)
    proxied = running.add_port(proxied=True)
    running.apply(proxy_from=(ip_network(IPV4),))
    for first in (b"PROXY TCP4 192.0.2.9 192.0.2.10 1 2\r\n", b"PROXY", b"nonsense"):
        running.leave(running.client(port=proxied, first=first))
    for host in (IPV4, "2001:db8::1", None):
        running.leave(running.client(host))
    assert not running.connections.open
    assert running.connections._admission._peers == {}
    assert running.connections.ended == 6


# --- limits with a PROXY header ---


def test_limit_per_peer_applies_to_the_client_behind_a_proxy_not_to_the_proxy(world) -> None:
    running = world(max_connections_per_peer=1, proxy_from=(ip_network(IPV4),))
    port = running.add_port(proxied=True)
    first = running.client(port=port, first=header("192.0.2.9"))
    assert is_served(first)
    assert is_served(running.client(port=port, first=header("192.0.2.10")))
    assert is_closed(running.client(port=port, first=header("192.0.2.9")))
    assert is_served(running.client())  # the proxy itself, on a listener without PROXY headers
    assert len(running.connections.open) == 3
    running.leave(first)
    assert is_served(running.client(port=port, first=header("192.0.2.9")))


def test_client_refused_after_its_proxy_header_frees_a_place_for_a_waiting_client(world) -> None:
    running = world(max_connections=2, max_connections_per_peer=1, proxy_from=(ip_network(IPV4),))
    port = running.add_port(proxied=True)
    assert is_served(running.client(port=port, first=header("192.0.2.9")))
    late = running.client(port=port)
    waiting = running.client("192.0.2.2")
    assert not is_served(waiting)
    late.sendall(header("192.0.2.9"))
    running.clock.turn()
    assert is_closed(late)
    assert is_served(waiting)
    running.advance(60)
    assert running.clock.getDelayedCalls() == []  # the handshake timeout is cancelled


@pytest.mark.parametrize(
    ("host", "networks", "trusted"),
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
def test_client_with_a_proxy_header_is_served_only_from_trusted_networks(world, host, networks, trusted) -> None:
    running = world(proxy_from=tuple(map(ip_network, networks.split())))
    client = running.client(host, running.add_port(proxied=True), header("192.0.2.9"))
    assert (is_served if trusted else is_closed)(client)
    assert running.refused["proxy-from"] == (not trusted)
    assert running.reasons == []
    if not trusted:
        assert (
            f"client {host if '.' in host[:4] else f'[{host}]'}:1 on test refused: its address is not in --proxy-from"
            in (running.lines[0])
        )
    assert is_served(running.client(host))  # without a PROXY header no trust is needed


# --- changes of limits while serving ---


def test_raised_limit_accepts_waiting_clients(world) -> None:
    running = world(max_connections=1)
    clients = [running.client() for _ in range(4)]
    assert list(map(is_served, clients)) == [True, False, False, False]
    running.apply(max_connections=3)
    assert list(map(is_served, clients)) == [False, True, True, False]


def test_lowered_limit_keeps_open_connections_and_accepts_no_new_clients(world) -> None:
    running = world(max_connections=3)
    inside = [running.client() for _ in range(3)]
    running.apply(max_connections=1)
    assert all(map(is_served, inside))
    waiting = running.client()
    running.leave(inside.pop())
    running.leave(inside.pop())
    assert not is_served(waiting)
    running.leave(inside.pop())
    assert is_served(waiting)


def test_waiting_clients_are_refused_after_a_change_to_reject(world) -> None:
    running = world(max_connections=1)
    inside, waiting = running.client(), running.client()
    running.apply(at_limit="reject")
    assert is_closed(waiting)
    running.apply(at_limit="pause")
    waiting = running.client()
    assert not is_closed(waiting)
    running.leave(inside)
    assert is_served(waiting)


def test_new_limit_per_peer_counts_open_connections(world) -> None:
    running = world()
    inside = [running.client() for _ in range(3)]
    running.apply(max_connections_per_peer=2)
    assert is_closed(running.client())
    assert all(map(is_served, inside))
    running.leave(inside.pop())
    assert is_closed(running.client())
    running.leave(inside.pop())
    assert is_served(running.client())
    running.apply(max_connections_per_peer=0)
    assert is_served(running.client())


# --- log of refusals ---


def test_all_refusals_are_counted_and_logged_once_in_10_seconds(world) -> None:
    running = world(max_connections=1, at_limit="reject")
    running.client()
    for _ in range(1000):
        running.client("192.0.2.2").close()
    running.advance(9.9)
    running.client("192.0.2.3")
    assert running.lines == ["client 192.0.2.2:1 on test refused: --max-connections reached"]
    running.advance(0.1)
    running.client("192.0.2.4")
    running.advance(10)
    running.client("192.0.2.5")
    assert [(event["event"], event["peer"], event["setting"], event["suppressed"]) for event in running.events] == [
        ("connection.refused", "192.0.2.2:1", "max-connections", 0),
        ("connection.refused", "192.0.2.4:1", "max-connections", 1000),
        ("connection.refused", "192.0.2.5:1", "max-connections", 0),
    ]
    assert running.refused["max-connections"] == 1003


def test_each_refusal_reason_is_logged_separately(world) -> None:
    running = world(max_connections=2, max_connections_per_peer=1, at_limit="reject")
    for host in (IPV4, IPV4, "192.0.2.2", "192.0.2.3"):
        running.client(host)
    running.client(port=running.add_port(proxied=True))
    running.apply(max_connections=9)
    running.client(port=running.connections.ports[1])
    settings = [event["setting"] for event in running.events if event["event"] == "connection.refused"]
    assert settings == ["max-connections-per-peer", "max-connections", "proxy-from"]
    assert len(settings) == len(running.events)
