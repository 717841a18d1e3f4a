"""Blocking clients of the echo service."""

import socket
from typing import Any

from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING


def is_greeted(client: socket.socket) -> bool:
    return client.recv(len(GREETING), socket.MSG_WAITALL) == GREETING


def greeted(address: Any) -> socket.socket:
    client = connect(address)
    assert is_greeted(client)
    return client


def echoes(client: socket.socket, data: bytes = b"hello") -> bool:
    """Return whether a message is echoed; False if the connection ends or is reset."""
    try:
        client.sendall(data)
        return client.recv(len(data), socket.MSG_WAITALL) == data
    except ConnectionError:
        return False


def is_closed(client: socket.socket) -> bool:
    """Wait until the service closes the connection; return whether it did without sending anything."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def connect(address: Any) -> socket.socket:
    """Return a blocking client of an IP address and port, of a port of 127.0.0.1, or of the path of a UNIX socket."""
    if isinstance(address, int):
        address = ("127.0.0.1", address)
    ip = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    client = socket.socket(socket.AF_UNIX if isinstance(address, str) else ip)
    client.settimeout(DEADLINE)
    try:
        client.connect(address)
    except OSError:
        client.close()
        raise
    return client
