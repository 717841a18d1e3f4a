"""Connections on transports of Twisted's endpoints: the registry counts and limits them, too."""

from __future__ import annotations

from time import monotonic
from typing import Any

from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol, IProtocol
from twisted.internet.protocol import Protocol, connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides

from rtservice.events import FACTORY_FAILED
from rtservice.net.address import peer_name
from rtservice.net.connection import LocalClose
from rtservice.net.phases import OPEN
from rtservice.process.registry import Registry


class ForeignConnection(ProtocolWrapper):
    """Wraps a protocol, counts its bytes, and has the attributes of `net.connection.Connection` that the registry uses.

    It counts what is written to the transport, not what the kernel accepts: for a connection that is reset,
    `bytes_out` is an upper bound.
    """

    factory: ForeignFactory
    transport: Any
    wrappedProtocol: Any
    phase = OPEN
    unsent = 0  # Twisted's transports do not report it

    def __init__(self, factory: ForeignFactory, protocol: IProtocol) -> None:
        super().__init__(factory, protocol)  # type: ignore[arg-type]  # Twisted ties the two classes
        self.port = factory  # for its name
        self.opened = monotonic()
        self.bytes_in = self.bytes_out = 0
        self.seen, self.still_since = -1, 0.0
        self._read_closed = False
        self.error: Exception | None = None

    @property
    def protocol(self) -> Any:
        return self.wrappedProtocol

    @property
    def peer_finished(self) -> bool:
        """Whether the peer closed first. Twisted's transports do not report it; it is true unless this side closes."""
        return self._read_closed or not self.disconnecting

    @property
    def log_fields(self) -> dict[str, object]:
        return {"peer": peer_name(self.getPeer()), "listener": self.port.name}

    def makeConnection(self, transport: Any) -> None:
        super().makeConnection(transport)
        if IHalfCloseableProtocol.providedBy(self.wrappedProtocol):
            alsoProvides(self, IHalfCloseableProtocol)

    def write(self, data: bytes) -> None:
        self.bytes_out += len(data)
        self.transport.write(data)

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def dataReceived(self, data: bytes) -> None:
        self.bytes_in += len(data)
        self.wrappedProtocol.dataReceived(data)

    def readConnectionLost(self) -> None:
        self._read_closed = True
        self.wrappedProtocol.readConnectionLost()

    def writeConnectionLost(self) -> None:
        self.wrappedProtocol.writeConnectionLost()

    def close(self, reason: str) -> None:
        """Flush and close. The log record has this reason."""
        self.error = LocalClose(reason)
        self.loseConnection()

    def abort(self, reason: str) -> None:
        """Close at once. The log record has this reason."""
        self.error = LocalClose(reason)
        self.abortConnection()

    def abortConnection(self) -> None:
        """Close at once, if the transport can; else flush and close."""
        self.disconnecting = 1
        _abort(self.transport)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        try:
            super().connectionLost(reason)
        finally:  # the last connection stops the factory
            self.factory.registry.closed(self, reason)


def _abort(transport: Any) -> None:
    getattr(transport, "abortConnection", transport.loseConnection)()


class _RefusedProtocol(Protocol):
    """Closes its connection at once."""

    def makeConnection(self, transport: Any) -> None:
        _abort(transport)


class ForeignFactory(WrappingFactory):
    """Wraps each protocol of `factory` in a ForeignConnection. `name` is the listener's, as logs show it."""

    noisy = False

    def __init__(self, factory: Any, name: str, registry: Registry, log: Logger) -> None:
        super().__init__(factory)
        self.name = name
        self.registry = registry
        self._log = log

    def buildProtocol(self, addr: IAddress | None) -> Any:
        if not self.registry.admits(addr, self.name):
            return _RefusedProtocol()
        try:
            protocol = self.wrappedFactory.buildProtocol(addr)
        except Exception:
            FACTORY_FAILED.failure(self._log, factory=type(self.wrappedFactory).__name__, method="buildProtocol")
            return _RefusedProtocol()
        # With None, some transports would leave the client connected without a protocol.
        return _RefusedProtocol() if protocol is None else ForeignConnection(self, protocol)

    def registerProtocol(self, p: Any) -> None:
        self.registry.add(p)

    def unregisterProtocol(self, p: Any) -> None:
        """Do nothing: the connection is removed from the registry with the reason of its end."""
