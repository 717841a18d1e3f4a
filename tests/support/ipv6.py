"""A mark for tests that need IPv6."""

import socket

import pytest


def has_ipv6() -> bool:
    """Return whether a socket can be bound to the loopback address of IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")
