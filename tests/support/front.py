"""A listening socket that a proxy inherits."""

import socket

from tests.support.deadline import DEADLINE


class Front:
    """A listening socket that a proxy inherits, which avoids races for a port and clients that connect too early."""

    def __init__(self, host: str) -> None:
        self.socket = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.fd = self.socket.fileno()
        self.address = self.socket.getsockname()[:2]

    def connect(self, source: str | None = None) -> socket.socket:
        """Connect a client from this address."""
        return socket.create_connection(self.address, DEADLINE, source_address=(source, 0) if source else None)
