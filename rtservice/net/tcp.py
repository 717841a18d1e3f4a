"""TCP listeners: from a host name or address and a port to sockets that listen."""

from __future__ import annotations

import errno
import socket

from twisted.logger import Logger

from rtservice.net.description import ListenError, address_name
from rtservice.net.listener import RESERVE_SOCKETS, Listener
from rtservice.net.places import TCPPlace
from rtservice.net.sockets import bind, cannot_listen, close_all, lower_first, socket_name, start_listening, zone_name

_log = Logger()

# Why a socket cannot be had on a host without IPv6: no such family, or the family with every address disabled.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

# How often the system is asked for one port number that is free on IPv4 and IPv6.
_SAME_PORT_TRIES = 32
Address = tuple[socket.AddressFamily, str, int]  # family, host, IPv6 scope


def is_local(interface: str) -> bool:
    """Return whether a host takes no name server: an address, or `localhost` (RFC 6761, section 6.3)."""
    if interface.lower().removesuffix(".") in ("localhost", "*"):
        return True
    try:
        socket.getaddrinfo(interface, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def tcp_place(family: int, host: str, port: int, scope: int) -> TCPPlace:
    """Return an address as a place to listen."""
    six = family == socket.AF_INET6
    return TCPPlace(six, host, port, scope, address_name(host, port, zone_name(scope)))


def resolve(interface: str, port: int, family: int) -> list[Address]:
    """Return the addresses of a host name or address, IPv4 first. Raises ListenError."""
    try:
        found = socket.getaddrinfo(interface, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ListenError(f"cannot resolve the interface {interface!r}: {lower_first(reason)}") from error
    addresses: list[Address] = []
    for kind, _, _, _, address in found:
        entry = (kind, str(address[0]), int(address[3]) if len(address) == 4 else 0)
        if entry not in addresses:
            addresses.append(entry)
    # IPv4 first, so that a port of 0 is picked where most hosts have the more sockets.
    return sorted(addresses, key=lambda entry: entry[0] == socket.AF_INET6)


def open_tcp(addresses: list[Address], port: int, backlog: int, slots: int, interface: str) -> list[Listener]:
    """Return a listener for each address, all on one port; `_may_be_missing` says when IPv6 is left out.

    Raises ListenError.
    """
    for attempt in range(_SAME_PORT_TRIES):
        sockets: list[socket.socket] = []
        number = port
        try:
            for family, host, scope in addresses:
                try:
                    sockets.append(bind(family, host, scope, number))
                except OSError as error:
                    if sockets and _may_be_missing(error, family, host, interface):
                        continue
                    taken_by_other_family = error.errno == errno.EADDRINUSE and port == 0 and sockets
                    if taken_by_other_family and attempt < _SAME_PORT_TRIES - 1:
                        break
                    raise cannot_listen(family, host, number, error, interface) from error
                number = sockets[0].getsockname()[1]
            else:
                if slots:
                    return [_with_slots(sock, backlog, slots) for sock in sockets]
                for sock in sockets:
                    start_listening(sock, backlog)
                return [Listener(sock, socket_name(sock)) for sock in sockets]
        except BaseException:
            close_all(sockets)
            raise
        close_all(sockets)
    raise AssertionError("the last attempt returns or raises")


def check_tcp(addresses: list[Address], port: int, interface: str) -> None:
    """Check with UDP sockets that the addresses are this host's: no TCP port is bound. Raises ListenError."""
    found = False
    for family, host, scope in addresses:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as listeners are bound: no ::ffff:…
                    probe.bind((host, 0, 0, scope))
                else:
                    probe.bind((host, 0))
        except OSError as error:
            if found and _may_be_missing(error, family, host, interface):
                continue
            raise cannot_listen(family, host, port, error, interface) from error
        found = True


def _may_be_missing(error: OSError, family: socket.AddressFamily, host: str, interface: str) -> bool:
    """Whether the address of IPv6 is left out, where another address of the same listener was bound.

    Without an interface it is, on a host without IPv6. An address of a host name is what clients are told to connect
    to: one that this host does not have, or not yet, is an error, after which a service manager tries again. Where the
    host has no IPv6 at all, nobody can: `localhost` is `::1` too in the hosts file of most containers. That is logged.
    """
    if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
        return False
    if not interface:
        return True
    if _has_ipv6():
        return False
    _log.warn("{interface}: its address {host} is not served: this host has no IPv6", interface=interface, host=host)
    return True


def _has_ipv6() -> bool:
    """Whether this host has IPv6: its loopback address, without which there is no other (RFC 4291, section 2.8)."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _with_slots(found: socket.socket, backlog: int, slots: int) -> Listener:
    """A listener with a socket for each slot, and some in reserve, on the address of a socket that is bound alone.

    That one is closed. It shows that no other service listens there: one that shares its port would let ours share it.
    """
    host, port, *rest = found.getsockname()
    scope = rest[1] if rest else 0
    found.close()
    sockets: list[socket.socket] = []
    try:
        for _ in range(slots + RESERVE_SOCKETS):
            sockets.append(bind(found.family, host, scope, port, reuse_port=True))
        for sock in sockets[:slots]:
            start_listening(sock, backlog)
    except BaseException as error:
        close_all(sockets)
        if isinstance(error, OSError):
            raise cannot_listen(found.family, host, port, error) from error
        raise
    return Listener(
        sockets[0],
        socket_name(sockets[0]),
        slot_sockets=sockets[:slots],
        reserve_sockets=sockets[slots:],
        _backlog=backlog,
    )
