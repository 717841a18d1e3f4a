"""Open TCP listeners: resolve a host name or address, and bind its sockets."""

from __future__ import annotations

import errno
import socket

from twisted.logger import Logger

from rtservice.events import LISTENER_ADDRESS_SKIPPED
from rtservice.net.description import ListenError, address_name
from rtservice.net.listen_conflicts import TCPPlace
from rtservice.net.listener import RESERVE_SOCKETS, Listener
from rtservice.net.sockets import bind, cannot_listen, close_all, lower_first, socket_name, start_listening, zone_name

_log = Logger()

# Errors of a host without IPv6: no such family, or the family with every address disabled.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

# Attempts to find a port number that is free on both IPv4 and IPv6, for port 0.
_SAME_PORT_TRIES = 32
Address = tuple[socket.AddressFamily, str, int]  # family, host, IPv6 scope


def is_local(interface: str) -> bool:
    """Return whether a host needs no name server: an address, or `localhost` (RFC 6761, section 6.3)."""
    if interface.lower().removesuffix(".") in ("localhost", "*"):
        return True
    try:
        socket.getaddrinfo(interface, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def tcp_place(family: int, host: str, port: int, scope: int) -> TCPPlace:
    """Return the TCPPlace of an address."""
    is_ipv6 = family == socket.AF_INET6
    return TCPPlace(is_ipv6, host, port, scope, address_name(host, port, zone_name(scope)))


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
    # IPv4 first: port 0 is chosen in the family in which most hosts have more sockets.
    return sorted(addresses, key=lambda entry: entry[0] == socket.AF_INET6)


def open_tcp(addresses: list[Address], port: int, backlog: int, slots: int, interface: str) -> list[Listener]:
    """Return a listener for each address, all on one port. `_may_be_missing` tells when IPv6 is omitted.

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
    """Check that the addresses are local, with UDP sockets: no TCP port is bound. Raises ListenError."""
    found = False
    for family, host, scope in addresses:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as for listeners: rejects ::ffff:…
                    probe.bind((host, 0, 0, scope))
                else:
                    probe.bind((host, 0))
        except OSError as error:
            if found and _may_be_missing(error, family, host, interface):
                continue
            raise cannot_listen(family, host, port, error, interface) from error
        found = True


def _may_be_missing(error: OSError, family: socket.AddressFamily, host: str, interface: str) -> bool:
    """Return whether to omit an IPv6 address that cannot be bound, when another address of the listener was bound.

    Without an interface it is omitted on a host without IPv6. With a host name, clients may connect to any of its
    addresses: one that this host does not have (yet) is an error, and a service manager tries again. If the host has no
    IPv6 at all, the address is omitted and that is logged: most containers map `localhost` to `::1` too.
    """
    if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
        return False
    if not interface:
        return True
    if _has_ipv6():
        return False
    LISTENER_ADDRESS_SKIPPED.log(_log, host=host, interface=interface)
    return True


def _has_ipv6() -> bool:
    """Return whether this host has IPv6, by its loopback address, which is required (RFC 4291, section 2.8)."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _with_slots(found: socket.socket, backlog: int, slots: int) -> Listener:
    """Return a listener with a socket for each slot, and reserve sockets, on the address of the bound socket `found`.

    `found`, bound without SO_REUSEPORT, shows that no other service listens there, and is closed. A check is needed: if
    another service uses SO_REUSEPORT too, binding with it succeeds, and both share the port. Raises ListenError.
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
