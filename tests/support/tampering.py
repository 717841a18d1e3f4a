"""A TCP proxy that can change or withhold what a server sends."""

from __future__ import annotations

from typing import Any

from twisted.internet import reactor
from twisted.internet.endpoints import HostnameEndpoint
from twisted.internet.protocol import Factory, Protocol


class _Outgoing(Protocol):
    def __init__(self, incoming: _Incoming) -> None:
        self.incoming = incoming

    def connectionMade(self) -> None:
        self.incoming.outgoing = self
        self.transport.write(bytes(self.incoming.early))

    def dataReceived(self, data: bytes) -> None:
        proxy = self.incoming.proxy
        if not proxy.silent:
            self.incoming.transport.write(data.replace(*proxy.replace) if proxy.replace else data)

    def connectionLost(self, reason: Any) -> None:
        if not self.incoming.proxy.silent:
            self.incoming.transport.loseConnection()


class _Incoming(Protocol):
    outgoing: Any = None

    def __init__(self, proxy: TamperingProxy) -> None:
        self.proxy = proxy
        self.early = bytearray()

    def connectionMade(self) -> None:
        self.proxy.connections += 1
        self.proxy.open.append(self)
        HostnameEndpoint(reactor, "127.0.0.1", self.proxy.port).connect(
            Factory.forProtocol(lambda: _Outgoing(self))
        ).addErrback(lambda _: self.transport.loseConnection())

    def dataReceived(self, data: bytes) -> None:
        if self.proxy.silent:
            return
        if self.outgoing is None:
            self.early += data
        else:
            self.outgoing.transport.write(data)

    def connectionLost(self, reason: Any) -> None:
        self.proxy.open.remove(self)
        if self.outgoing is not None:
            if self.proxy.silent:
                self.proxy.half_open.append(self.outgoing)
            else:
                self.outgoing.transport.loseConnection()


class TamperingProxy:
    """Forwards connections to a port of 127.0.0.1.

    `silent` withholds everything, also the end of a connection, as a network that drops all packets does. `replace` is
    a pair of texts of the same length: the first one, in what the server sends, is replaced by the second.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.silent = False
        self.replace: tuple[bytes, bytes] | None = None
        self.connections = 0
        self.open: list[Any] = []
        self.half_open: list[Any] = []
        factory = Factory.forProtocol(lambda: _Incoming(self))
        factory.noisy = False
        self.listening = reactor.listenTCP(0, factory, interface="127.0.0.1")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.listening.getHost().port}"

    def cut(self) -> None:
        """Abort all connections."""
        for connection in list(self.open):
            connection.transport.abortConnection()

    def close(self) -> Any:
        """Stop listening, and abort all connections."""
        self.silent = False
        self.cut()
        for connection in self.half_open:
            connection.transport.abortConnection()
        return self.listening.stopListening()
