"""Admission of clients, without a reactor: limits, peers, trusted proxies, and the log of refusals."""

from ipaddress import ip_network
from typing import Any

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.logger import Logger, formatEvent

from rtservice.net.phases import OPEN, PROXY, TLS
from rtservice.process.admission import REFUSALS, Admission, Limits, RefusalLog, peer_group


def address(host: str | None) -> Any:
    """Return the address of a client at this host; None is a UNIX client."""
    if host is None:
        return UNIXAddress(None)
    return (IPv6Address if ":" in host else IPv4Address)("TCP", host, 1)


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
def test_peers_are_grouped_by_ipv4_address_and_ipv6_prefix(host, other, prefix, same) -> None:
    assert (peer_group(address(host), prefix) == peer_group(address(other), prefix)) is same


PEER = address("192.0.2.1")


@pytest.mark.parametrize("phase", [OPEN, TLS, PROXY])
def test_client_is_refused_at_the_connection_limit_in_each_initial_phase(phase) -> None:
    admission = Admission(Limits(max_connections=3, proxy_from=(ip_network("192.0.2.0/24"),)))
    assert [admission.refusal(PEER, count, phase) for count in (0, 2, 3, 4)] == ["", "", *["max-connections"] * 2]


@pytest.mark.parametrize(
    ("at_limit", "counts", "full"),
    [("pause", (0, 2, 3, 4), [False, False, True, True]), ("reject", (0, 2, 3, 4), [False] * 4)],
)
def test_listeners_pause_at_the_limit_unless_clients_are_rejected(at_limit, counts, full) -> None:
    admission = Admission(Limits(max_connections=3, at_limit=at_limit))
    assert [admission.is_full(count) for count in counts] == full


def test_only_the_peer_at_its_connection_limit_is_refused() -> None:
    admission = Admission(Limits(max_connections=9, max_connections_per_peer=2))
    for _ in range(2):
        assert admission.refusal(PEER, 0) == ""
        admission.add_peer(PEER)
    assert admission.refusal(PEER, 2) == "max-connections-per-peer"
    assert admission.refusal(address("::ffff:192.0.2.1"), 2) == "max-connections-per-peer"
    assert admission.refusal(address("192.0.2.2"), 2) == ""
    admission.remove_peer(PEER)
    assert admission.refusal(PEER, 1) == ""


def test_connections_of_a_trusted_proxy_are_not_counted_for_its_address() -> None:
    limits = Limits(max_connections=9, max_connections_per_peer=1, proxy_from=(ip_network("192.0.2.1"),))
    admission = Admission(limits)
    admission.add_peer(PEER)
    assert admission.refusal(PEER, 1, PROXY) == ""
    assert admission.refusal(PEER, 1, OPEN) == "max-connections-per-peer"


def test_unix_clients_are_not_counted_as_peers() -> None:
    admission = Admission(Limits(max_connections=9, max_connections_per_peer=1))
    for _ in range(3):
        assert admission.refusal(address(None), 0) == ""
        admission.add_peer(address(None))
    admission.remove_peer(address(None))
    assert admission._peers == {}


def test_new_limits_recount_the_peers_of_open_connections() -> None:
    admission = Admission(Limits(max_connections=9))
    first, second = address("2001:db8::1"), address("2001:db8::2")
    admission.apply(Limits(max_connections=9, max_connections_per_peer=2), [first, second])
    assert admission.refusal(first, 2) == "max-connections-per-peer"
    admission.apply(Limits(max_connections=9, max_connections_per_peer=2, peer_prefix_v6=128), [first, second])
    assert admission.refusal(first, 2) == ""
    admission.apply(Limits(max_connections=9), [first, second])
    assert admission._peers == {}


@pytest.mark.parametrize(
    ("host", "networks", "trusted"),
    [
        ("192.0.2.1", "192.0.2.0/24", True),
        ("192.0.2.1", "192.0.2.2/32 2001:db8::/32", False),
        ("::ffff:192.0.2.1", "192.0.2.0/24", True),
        ("::ffff:192.0.2.1", "::/0", False),
        ("2001:db8::1", "192.0.2.0/24 2001:db8::/32", True),
        ("192.0.2.1", "", False),
        (None, "", True),
    ],
)
def test_proxy_header_is_accepted_only_from_trusted_networks(host, networks, trusted) -> None:
    admission = Admission(Limits(max_connections=9, proxy_from=tuple(map(ip_network, networks.split()))))
    assert admission.refusal(address(host), 0, PROXY) == ("" if trusted else "proxy-from")
    assert admission.refusal(address(host), 0, OPEN) == ""


def test_each_refusal_reason_is_logged_once_in_10_seconds_with_the_suppressed_count() -> None:
    events: list[Any] = []
    log = RefusalLog(Logger(observer=events.append))
    for now in (0.0, 0.1, 9.9):
        for reason in REFUSALS:
            log.refused(PEER, "tcp:1", reason, now)
        log.paused(5, now)
    assert [formatEvent(event) for event in events] == [
        *(f"client 192.0.2.1:1 on tcp:1 refused: {text}" for text in REFUSALS.values()),
        "--max-connections 5 reached: new clients wait in the backlog",
    ]
    del events[:]
    log.refused(PEER, "tcp:1", "proxy-from", 10.0)
    log.refused(PEER, "tcp:1", "proxy-from", 20.0)
    text = f"client 192.0.2.1:1 on tcp:1 refused: {REFUSALS['proxy-from']}"
    assert [formatEvent(event) for event in events] == [
        f"{text} (2 more since the last such record)",
        text,
    ]
