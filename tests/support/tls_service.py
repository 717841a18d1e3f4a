"""A TLS port with a recording factory."""

import socket
from typing import Any

from rtservice.net.port import Port
from rtservice.net.tls import Context
from tests.support.recording import Recording
from tests.support.registered import is_registered


class Served:
    """A listening port, and the connections that it opened and closed."""

    def __init__(self, factory: Recording, tls: Context, on: Any, timeout: float) -> None:
        self.factory = factory
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.socket.setblocking(False)
        self.address = self.socket.getsockname()
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.port = Port(
            on,
            self.socket,
            factory,
            name="ssl:test",
            tls=tls,
            handshake_timeout=timeout,
            opened=self.opened.append,
            closed=lambda connection, reason: self.closed.append((connection, reason.value)),
        )
        self.port.startListening()

    def stop(self) -> None:
        self.port.stopListening()
        self.socket.close()
        gone = [connection for connection, _ in self.closed]
        for connection in self.opened:
            if connection not in gone:
                connection.abortConnection()


def reactor_is_free_of(connection) -> bool:
    return not is_registered(connection) and connection.fileno() == -1
