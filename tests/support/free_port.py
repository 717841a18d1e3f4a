"""A free TCP port."""

import socket


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of this address that was free a moment ago."""
    with socket.create_server((host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
