"""Blocking clients of the echo service."""

import socket
from typing import Any

from tests.support.deadline import DEADLINE

GREETING = b"Hello from the server!"


def connect(address: Any) -> socket.socket:
    """A blocking client of a TCP port of 127.0.0.1, of an IPv6 address, or of the path of a UNIX socket."""
    families = {str: socket.AF_UNIX, int: socket.AF_INET, tuple: socket.AF_INET6}
    client = socket.socket(families[type(address)])
    client.settimeout(DEADLINE)
    try:
        client.connect(("127.0.0.1", address) if isinstance(address, int) else address)
    except OSError:
        client.close()
        raise
    return client


def is_greeted(client: socket.socket) -> bool:
    return client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING


def greeted(address: Any) -> socket.socket:
    client = connect(address)
    assert is_greeted(client)
    return client


def echoes(client: socket.socket, data: bytes = b"hello") -> bool:
    """Whether a message comes back; False at the end of the connection, however it came."""
    try:
        client.sendall(data)
        return client.recv(len(data), socket.MSG_WAITALL) == data
    except ConnectionError:
        return False
