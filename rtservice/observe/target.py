"""Parse the target and the Host header of an HTTP request: path, query and host."""

from __future__ import annotations

import re
from collections.abc import Container
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple

# RFC 3986, section 3.2: an IP literal in brackets or a registered name, and a port. User information is an error in
# HTTP (RFC 9110, section 4.2.4). Percent-encoding in a name is not accepted: no resolver decodes it.
_AUTHORITY = re.compile(rb"(\[[0-9A-Za-z:.%]*\]|[0-9A-Za-z._-]*)(:[0-9]*)?")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)

# This name among the accepted ones accepts every host.
ANY_HOST = "*"


class BadRequestError(ValueError):
    """The request is malformed. The text names the error."""


class Target(NamedTuple):
    """The path of a request (`*` for the server as a whole), its query, and its host in lower case or None."""

    path: bytes
    query: bytes
    host: str | None


def read_target(method: bytes, target: bytes, version: bytes, hosts: list[bytes]) -> Target:
    """Parse the target and the Host headers of a request (RFC 9112, sections 3.2 and 3.2.1 to 3.2.4).

    The authority of a target in absolute form replaces Host. HTTP/1.0 needs no Host. Raises BadRequestError.
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
            # Without a path the target is `/`; for OPTIONS without a query it is `*`.
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
    """Return whether a host is an IP literal, localhost, or one of `names`, which are in lower case.

    This prevents DNS rebinding: a browser that was directed here by an attacker's name, which now resolves to this
    address, sends that name. An IP literal cannot be rebound, and localhost is never resolved by DNS (RFC 6761, section
    6.3).
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
