"""What an HTTP request is for: the path in its target, and the host that it names."""

from __future__ import annotations

import re
from collections.abc import Container
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

# RFC 3986, section 3.2: an IP literal in brackets or a registered name, and a port. User information is an error in
# HTTP (RFC 9110, section 4.2.4). Percent-encoding in a name is not resolved by anything, and not accepted here.
_AUTHORITY = re.compile(rb"(\[[0-9A-Za-z:.%]*\]|[0-9A-Za-z._-]*)(:[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)

# A host in the place of which any other is accepted.
ANY_HOST = "*"


class BadRequestError(ValueError):
    """The request is malformed; the text says how."""


class Target(NamedTuple):
    """The path and the query of a request (`*` for all of the server), and its host in lower case; None without one."""

    path: bytes
    query: bytes
    host: str | None


def read_target(method: bytes, target: bytes, version: bytes, hosts: list[bytes]) -> Target:
    """Read a request's target and its Host headers by RFC 9112, sections 3.2 and 3.2.1 to 3.2.4.

    The authority of a target in absolute form replaces Host. HTTP/1.0 needs none. Raises BadRequestError.
    """
    if len(hosts) > 1:
        raise BadRequestError("there is more than one Host header")
    if not hosts and version != b"HTTP/1.0":
        raise BadRequestError("the Host header is missing")
    host = _host(hosts[0]) if hosts else None
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute:
        host = _host(absolute[1])
        if not host:
            raise BadRequestError("the target has no host")
        target = absolute[2]
        if not target.startswith(b"/"):
            # Without a path it is for the root; with OPTIONS and no query either, for all of the server.
            target = b"*" if method == b"OPTIONS" and not target else b"/" + target
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        raise BadRequestError("the target is neither a path nor an http: URI")
    path, _, query = target.partition(b"?")
    return Target(path, query, host)


def _host(authority: bytes) -> str:
    match = _AUTHORITY.fullmatch(authority.strip())
    if match is None:
        raise BadRequestError("the host is malformed")
    return match[1].decode("ascii").lower()


def is_served(host: str, names: Container[str]) -> bool:
    """Whether a host is an IP literal, localhost, or one of `names`, which are in lower case.

    A browser that was sent to an attacker's name, which resolves to our address by now, names that name (DNS
    rebinding). An IP literal cannot be rebound, and localhost is never looked up in DNS (RFC 6761, section 6.3).
    """
    name = host.removesuffix(".")
    return name == "localhost" or name in names or ANY_HOST in names or _is_address(host)


def _is_address(host: str) -> bool:
    try:
        if host.startswith("["):
            IPv6Address(host[1:-1])
        else:
            IPv4Address(host)
    except ValueError:
        return False
    return True
