"""The register of open connections: counts them, and writes one log record about each at its end."""

from __future__ import annotations

import errno
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Any

from twisted.internet import error
from twisted.internet.interfaces import IAddress, IHalfCloseableProtocol, IProtocol
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from zope.interface import alsoProvides


def escaped(text: str) -> str:
    r"""Text that may hold a peer's bytes, with whatever a terminal or a log reader could act on as `\xHH`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def peer_name(address: Any) -> str:
    """A peer's address for logs: `192.0.2.1:4711`, `[2001:db8::1]:4711`, `unix`, or the path of a bound UNIX client."""
    if hasattr(address, "host"):
        return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
    name = getattr(address, "name", None)
    if not name:
        return "unix"
    return escaped(f"unix:{name.decode('utf-8', 'backslashreplace') if isinstance(name, bytes) else name}")


def end_reason(reason: Failure, *, peer_finished: bool, problem: OSError | None) -> str:
    """Why a connection ended, from a small fixed vocabulary.

    `peer_finished` says whether the peer had sent FIN, `problem` is what the kernel said last, if it said anything.
    """
    if isinstance(problem, ssl.SSLEOFError):
        return "peer finished without close_notify"
    if isinstance(problem, ssl.SSLError):
        # OpenSSL's word for it, which is none of the peer's bytes: HTTP_REQUEST, NO_SHARED_CIPHER, BAD_RECORD_MAC ...
        return f"TLS failed ({problem.reason or type(problem).__name__})"
    if problem is not None:
        if problem.errno in (errno.ECONNRESET, errno.EPIPE):
            return "reset by peer"
        return "timed out" if problem.errno == errno.ETIMEDOUT else "lost"
    if isinstance(reason.value, error.ConnectionAborted):
        return "aborted"
    if isinstance(reason.value, error.ConnectionDone):
        return "peer finished" if peer_finished else "closed"
    return "lost" if isinstance(reason.value, error.ConnectionLost) else "failed"


class Connections:
    """Every open connection of this process, whoever accepted it."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self.open: set[Any] = set()

    def opened(self, connection: Any) -> None:
        self.open.add(connection)

    def closed(self, connection: Any, reason: Failure) -> None:
        """Forget a connection of ours (a `net.stream.Connection`), and write its record."""
        self.open.discard(connection)
        self._record(
            connection.getPeer(),
            connection.port.name,
            connection.opened,
            connection.bytes_in,
            connection.bytes_out,
            end_reason(reason, peer_finished=connection.peer_finished, problem=connection.error),
        )

    def _record(self, peer: Any, listener: str, opened: float, bytes_in: int, bytes_out: int, reason: str) -> None:
        name = peer_name(peer)
        seconds = monotonic() - opened
        # The text is made here: formatting six fields was half of what Twisted's log took for a record. The fields are
        # there for whoever reads events instead of lines.
        self._log.info(
            "{record}",
            record=f"{name} on {listener}: {seconds:.3f} s, {bytes_in} bytes in, {bytes_out} bytes out, {reason}",
            peer=name,
            listener=listener,
            seconds=seconds,
            bytes_in=bytes_in,
            bytes_out=bytes_out,
            reason=reason,
        )

    def wrap(self, factory: Any, listener: str) -> CountingFactory:
        """A factory whose connections are in this register, for listeners whose transport is not ours."""
        return CountingFactory(factory, listener, self.open, self._record)


class _Counting(ProtocolWrapper):
    """Counts what passes between a transport of Twisted's and a protocol.

    It sees what is handed to the transport, not what the kernel took: of a connection that is reset, `bytes_out` is the
    most that can have been sent.
    """

    factory: Any
    transport: Any
    wrappedProtocol: Any

    def __init__(self, factory: CountingFactory, protocol: IProtocol) -> None:
        super().__init__(factory, protocol)  # type: ignore[arg-type]  # Twisted ties the two classes
        self.opened = monotonic()
        self.bytes_in = self.bytes_out = 0
        self.peer_finished = False

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
        self.peer_finished = True
        self.wrappedProtocol.readConnectionLost()

    def writeConnectionLost(self) -> None:
        self.wrappedProtocol.writeConnectionLost()

    def connectionLost(self, reason: Any = connectionDone) -> None:
        # A transport of Twisted's does not say who began: whoever did not is the peer.
        finished = self.peer_finished or not self.disconnecting
        self.factory.record(
            self.getPeer(),
            self.factory.listener,
            self.opened,
            self.bytes_in,
            self.bytes_out,
            end_reason(reason, peer_finished=finished, problem=None),
        )
        super().connectionLost(reason)


class CountingFactory(WrappingFactory):
    """Wraps each protocol of a factory in one that counts."""

    noisy = False

    def __init__(self, factory: Any, listener: str, connections: set[Any], record: Callable[..., None]) -> None:
        super().__init__(factory)
        self.listener = listener
        self.record = record
        self._open = connections

    def buildProtocol(self, addr: IAddress | None) -> Any:
        protocol = self.wrappedFactory.buildProtocol(addr)
        # WrappingFactory would wrap None, which leaves the client connected and unanswered.
        return None if protocol is None else _Counting(self, protocol)

    def registerProtocol(self, p: Any) -> None:
        self._open.add(p)

    def unregisterProtocol(self, p: Any) -> None:
        self._open.discard(p)
