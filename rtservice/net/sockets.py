"""Functions for TCP sockets: bind, listen, names and error reasons."""

from __future__ import annotations

import errno
import socket

from rtservice.net.description import ListenError, address_name, tcp_name


def bind(family: socket.AddressFamily, host: str, scope: int, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a non-blocking TCP socket that is bound to an address. Raises OSError.

    `scope` is the number of a network interface for link-local IPv6 addresses, and 0 otherwise. `reuse_port` sets
    SO_REUSEPORT.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of a predecessor may be in TIME_WAIT, and would block the port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port, 0, scope))
        else:
            sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def start_listening(sock: socket.socket, backlog: int) -> None:
    """Listen on a bound TCP socket. Raises ListenError."""
    try:
        sock.listen(backlog)
    except OSError as error:  # with SO_REUSEADDR two processes can bind a port, but only one can listen
        raise ListenError(f"cannot listen on {socket_name(sock)}: {reason_of(error)}") from error


def socket_name(sock: socket.socket) -> str:
    """Return the name of a bound TCP socket in logs, such as `tcp:[fe80::1%eth0]:8080`."""
    host, port, *rest = sock.getsockname()
    return tcp_name(host, port, zone_name(rest[1] if rest else 0))


def zone_name(scope: int) -> str:
    """Return the name of the network interface with this number, the number if it has no name, or "" for 0."""
    try:
        return socket.if_indextoname(scope) if scope else ""
    except OSError:
        return str(scope)


def cannot_listen(
    family: socket.AddressFamily, host: str, port: int, error: OSError, interface: str = ""
) -> ListenError:
    """Return the error for an address that cannot be bound. `interface` is the host name that resolved to it, or ""."""
    note = ""
    if error.errno == errno.EADDRNOTAVAIL and interface not in ("", host):
        note = f"; {interface!r} resolves to it, and each address of a host name must be local"
    return ListenError(f"cannot listen on {address_name(host, port)}: {reason_of(error)}{note}")


def close_all(sockets: list[socket.socket]) -> None:
    """Close sockets."""
    for sock in sockets:
        sock.close()


def lower_first(text: str | None) -> str:
    """Return a reason with a lower-case first letter, for use within a sentence."""
    return text[:1].lower() + text[1:] if text else "unknown error"


def reason_of(error: OSError) -> str:
    """Return the system's text for an error, for use within a sentence."""
    return lower_first(error.strerror or str(error))  # errors that Python raises itself have no errno
