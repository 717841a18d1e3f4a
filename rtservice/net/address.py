"""Addresses of connections: Twisted's address objects and their names in logs."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress

from rtservice.escaping import escaped

Address = IPv4Address | IPv6Address | UNIXAddress


def peer_name(address: Any) -> str:
    """Return the peer's name for logs: `192.0.2.1:4711`, `[2001:db8::1]:4711`, `unix`, or `unix:` and its path."""
    if hasattr(address, "host"):
        return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
    name = getattr(address, "name", None)
    if not name:
        return "unix"
    return escaped(f"unix:{name.decode('utf-8', 'backslashreplace') if isinstance(name, bytes) else name}")


def address_of(address: Any) -> Address:
    """Return Twisted's address object for an address that accept() or getsockname() returned."""
    if isinstance(address, tuple):
        if len(address) == 2:
            return IPv4Address("TCP", *address)
        if address[3]:  # link-local: ambiguous without its network interface
            host = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
            return IPv6Address("TCP", host, *address[1:])
        return IPv6Address("TCP", *address)
    return UNIXAddress(address or None)
