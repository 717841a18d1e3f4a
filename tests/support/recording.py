"""A factory and protocols that record events and call hooks of the test."""

import threading
from collections.abc import Callable
from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from tests.support.deadline import DEADLINE


def nothing(*_: Any) -> None:
    """Do nothing; accept any arguments."""


def echo(protocol: Any, data: bytes) -> None:
    """Echo the data."""
    protocol.transport.write(data)


def close(protocol: Any) -> None:
    """Close the connection."""
    protocol.transport.loseConnection()


class Recorder(Protocol):
    """A protocol that calls the hooks of its factory, a `Recording`, and records events there."""

    factory: Any
    transport: Any

    def connectionMade(self) -> None:
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data: bytes) -> None:
        self.factory.received += data
        self.factory.on_data(self, data)

    def connectionLost(self, reason: Any) -> None:
        self.factory.lost.append(reason.value)
        self.factory.transports.append(type(self.transport))
        self.factory.secure.append(ISSLTransport.providedBy(self.transport))
        waiting, self.factory.waiting = self.factory.waiting, []
        for deferred in waiting:
            # In the next turn, because the connection ends after its protocol.
            reactor.callLater(0, deferred.callback, reason.value)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    """A Recorder with half-close notifications."""

    def readConnectionLost(self) -> None:
        self.factory.on_fin(self)

    def writeConnectionLost(self) -> None:
        self.factory.write_lost += 1
        self.factory.write_closed.set()


@implementer(IHandshakeListener)
class HandshakeListening(Recorder):
    """A Recorder with a notification of the completed TLS handshake."""

    def handshakeCompleted(self) -> None:
        self.factory.on_handshake(self)


class Recording(Factory):
    """Records its protocols (`made`), the received bytes, and for each closed connection the reason and transport type.

    The hooks are called with the protocol, `on_data` also with the data. By default it echoes, and closes after the FIN
    of the peer.
    """

    noisy = False

    def __init__(
        self,
        protocol: Callable[[], Any] = Recorder,
        on_connect: Callable[..., Any] = nothing,
        on_data: Callable[..., Any] = echo,
        on_fin: Callable[..., Any] = close,
        on_handshake: Callable[..., Any] = nothing,
    ) -> None:
        self.protocol = protocol
        self.on_connect, self.on_data, self.on_fin, self.on_handshake = on_connect, on_data, on_fin, on_handshake
        self.made: list[Any] = []
        self.received = bytearray()
        self.lost: list[Exception] = []
        self.transports: list[type] = []  # the types at connectionLost
        self.secure: list[bool] = []  # whether each used TLS at connectionLost
        self.waiting: list[Deferred] = []
        self.write_lost = 0
        self.write_closed = threading.Event()

    def end(self) -> Deferred:
        """Return a Deferred that fires with the reason when a connection is lost, or at once if one was."""
        deferred: Deferred = Deferred()
        if self.lost:
            deferred.callback(self.lost[-1])
        else:
            self.waiting.append(deferred)
        return deferred.addTimeout(DEADLINE, reactor)
