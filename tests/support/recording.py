"""A factory and protocols that record what happens to them, and do what the test says."""

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
    """Do nothing, whatever is given."""


def echo(protocol: Any, data: bytes) -> None:
    """Write the data back."""
    protocol.transport.write(data)


def close(protocol: Any) -> None:
    """Close the connection."""
    protocol.transport.loseConnection()


class Recorder(Protocol):
    """Calls the hooks of its factory, a `Recording`, and records there what happens."""

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
            # Later, since the connection itself ends after its protocol.
            reactor.callLater(0, deferred.callback, reason.value)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    """A Recorder that is told of each half of the end."""

    def readConnectionLost(self) -> None:
        self.factory.on_fin(self)

    def writeConnectionLost(self) -> None:
        self.factory.write_lost += 1
        self.factory.write_closed.set()


@implementer(IHandshakeListener)
class HandshakeListening(Recorder):
    """A Recorder that is told of the end of the TLS handshake."""

    def handshakeCompleted(self) -> None:
        self.factory.on_handshake(self)


class Recording(Factory):
    """Records its protocols (`made`), the bytes they received, and each end: its reason, and what its transport was.

    The hooks are called with the protocol, `on_data` with the data too. By default it echoes, and closes after the
    peer's FIN.
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
        self.transports: list[type] = []  # of each at its end
        self.secure: list[bool] = []  # whether each was in TLS at its end
        self.waiting: list[Deferred] = []
        self.write_lost = 0
        self.write_closed = threading.Event()

    def end(self) -> Deferred:
        """Fires with the reason when a connection ends, or at once when one has."""
        deferred: Deferred = Deferred()
        if self.lost:
            deferred.callback(self.lost[-1])
        else:
            self.waiting.append(deferred)
        return deferred.addTimeout(DEADLINE, reactor)
