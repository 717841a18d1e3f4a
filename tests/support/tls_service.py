"""A factory that records what its protocols see, served over TLS."""

import socket
import threading
from typing import Any

from twisted.internet import reactor
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock
from zope.interface import implementer

from rtservice.net.port import Port
from rtservice.net.tls import Context
from tests.support.registered import is_registered


class Recorder(Protocol):
    """Does what its factory's hooks say; the factory knows who came and went."""

    def connectionMade(self):
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data):
        self.factory.received += data
        self.factory.on_data(self, data)

    def connectionLost(self, reason):
        self.factory.lost.append(reason.value)
        self.factory.transports.append(ISSLTransport.providedBy(self.transport))


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    def readConnectionLost(self):
        self.factory.on_fin(self)

    def writeConnectionLost(self):
        self.factory.write_closed.set()


@implementer(IHandshakeListener)
class Listening(Recorder):
    def handshakeCompleted(self):
        self.factory.on_handshake(self)


def nothing(*_: Any) -> None:
    pass


def echo(protocol, data):
    protocol.transport.write(data)


class Recording(Factory):
    noisy = False

    def __init__(self, protocol=Recorder, on_connect=nothing, on_data=echo, on_fin=nothing, on_handshake=nothing):
        self.protocol = protocol
        self.on_connect, self.on_data, self.on_fin, self.on_handshake = on_connect, on_data, on_fin, on_handshake
        self.made: list[Any] = []
        self.lost: list[Any] = []
        self.transports: list[bool] = []  # whether each was in TLS at its end
        self.received = bytearray()
        self.write_closed = threading.Event()


class Timed:
    """The reactor, with the timers of a Clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.callLater = self.clock.callLater

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class Served:
    """A port in service, and every connection that it opened and closed."""

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
