"""Admission of clients: connection limits, connections per peer, trusted PROXY peers, and the log of refusals.

This module opens and closes no connection. `process.registry` calls it, and applies its decisions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Any, Literal

from twisted.logger import Logger

from rtservice.events import CONNECTION_LIMIT_REACHED, CONNECTION_REFUSED
from rtservice.log_rate import LogRateLimit
from rtservice.net.address import peer_name
from rtservice.net.phases import OPEN, PROXY, Phase

# Reasons to refuse a client: the name of the setting, and the text for the log.
REFUSALS = {
    "max-connections": "--max-connections reached",
    "max-connections-per-peer": "--max-connections-per-peer reached for its address",
    "proxy-from": "its address is not in --proxy-from, so its PROXY header is not trusted",
}

# Seconds between two log records with the same reason.
_LOG_PERIOD = 10.0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits on the connections of a process. A reload may replace them.

    `max_connections` (at least 1) counts each accepted connection, in every phase. At this limit, with `pause`,
    rtservice's listeners stop accepting, and clients wait in the backlog; with `reject`, new clients are closed at
    once. Twisted's endpoints cannot pause, and always reject.

    `max_connections_per_peer` (0: no limit) closes further clients of the same peer at once, with `pause` too. IPv6
    addresses that share their first `peer_prefix_v6` bits are one peer.

    An open connection is closed after `idle_timeout` seconds (0: never) without a byte in either direction.

    PROXY headers are trusted from the networks `proxy_from`, and from all clients of UNIX sockets.
    """

    max_connections: int
    max_connections_per_peer: int = 0
    peer_prefix_v6: int = 64
    at_limit: Literal["pause", "reject"] = "pause"
    idle_timeout: float = 0.0
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = ()


def peer_group(address: Any, prefix_v6: int) -> Hashable:
    """Return the unit of the limit per peer: an IPv4 address, an IPv6 network of `prefix_v6` bits, or None for UNIX.

    An IPv4-mapped IPv6 address (RFC 4291, section 2.5.5.2) is the IPv4 address.
    """
    host: str | None = getattr(address, "host", None)
    if host is None or ":" not in host:
        return host
    number = int(IPv6Address(host))
    if number >> 32 == 0xFFFF:
        return str(IPv4Address(number & 0xFFFFFFFF))
    return number >> (128 - prefix_v6)


class Admission:
    """Decides whether a client may connect, and counts the connections of each peer.

    Peers are addresses as `getPeer` returns them. Without `max_connections_per_peer` no peer needs to be counted:
    `add_peer` and `remove_peer` are called only while `limits` has one.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._peers: dict[Hashable, int] = {}

    def apply(self, limits: Limits, peers: Iterable[Any]) -> None:
        """Replace the limits. `peers` are the peers of the open connections whose PROXY header, if any, is complete."""
        self.limits = limits
        self._peers = {}
        if limits.max_connections_per_peer:
            for peer in peers:
                self.add_peer(peer)

    def refusal(self, peer: Any, count: int, phase: Phase = OPEN) -> str:
        """Return the reason to refuse a new client, a key of REFUSALS, or an empty text to accept it.

        `count` is the number of open connections. `phase` is the first phase of the client's connection.
        """
        limits = self.limits
        if count >= limits.max_connections:
            return "max-connections"
        if phase is PROXY:
            return "" if self._is_trusted(peer) else "proxy-from"
        if limits.max_connections_per_peer and self.is_peer_full(peer):
            return "max-connections-per-peer"
        return ""

    def is_full(self, count: int) -> bool:
        """Return whether listeners must not accept while `count` connections are open."""
        return self.limits.at_limit == "pause" and count >= self.limits.max_connections

    def is_peer_full(self, peer: Any) -> bool:
        """Return whether a peer has `max_connections_per_peer` connections."""
        group = peer_group(peer, self.limits.peer_prefix_v6)
        return self._peers.get(group, 0) >= self.limits.max_connections_per_peer

    def add_peer(self, peer: Any) -> None:
        """Count one more connection of a peer. UNIX clients are not counted."""
        group = peer_group(peer, self.limits.peer_prefix_v6)
        if group is not None:
            self._peers[group] = self._peers.get(group, 0) + 1

    def remove_peer(self, peer: Any) -> None:
        """Count one connection of a peer less. A peer without connections is removed."""
        group = peer_group(peer, self.limits.peer_prefix_v6)
        count = self._peers.pop(group, 0) - 1
        if count > 0:
            self._peers[group] = count

    def _is_trusted(self, peer: Any) -> bool:
        host: str | None = getattr(peer, "host", None)
        if host is None:  # the permissions of the socket file decide who may connect
            return True
        address = ip_address(host)
        address = getattr(address, "ipv4_mapped", None) or address
        return any(address in network for network in self.limits.proxy_from)


class RefusalLog:
    """Logs refused clients: at most one record in ten seconds for each reason."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self._rates: dict[str, LogRateLimit] = {}  # by reason

    def refused(self, peer: Any, listener: str, reason: str, now: float) -> None:
        """Log that a client was refused, at `now` in seconds. `reason` is a key of REFUSALS."""
        if self._may_log(reason, now):
            CONNECTION_REFUSED.log(
                self._log,
                peer=peer_name(peer),
                listener=listener,
                setting=reason,
                problem=REFUSALS[reason],
                suppressed=self._rates[reason].take_suppressed(),
            )

    def paused(self, limit: int, now: float) -> None:
        """Log that listeners stop accepting, at `now` in seconds."""
        if self._may_log("pause", now):
            CONNECTION_LIMIT_REACHED.log(self._log, limit=limit)

    def _may_log(self, subject: str, now: float) -> bool:
        rate = self._rates.get(subject)
        if rate is None:
            rate = self._rates[subject] = LogRateLimit(1, _LOG_PERIOD)
        return rate.may_log(now)
