"""TLS by Twisted's own layer on top of a Connection, with pyOpenSSL: for protocols that ask for its objects."""

from __future__ import annotations

import ssl
from typing import Any

from OpenSSL import SSL
from twisted.internet._newtls import _BypassTLS
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, INegotiated, ISSLTransport
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.net.stream import Connection, Ended, joined

_LOST = Failure(CONNECTION_LOST)


def add_layer(connection: Connection, context_factory: Any, *, client: bool) -> None:
    """Put Twisted's TLS between the connection and its protocol, as `twisted.internet.tcp` does for startTLS."""
    producer, streaming = connection.producer, connection.streaming_producer
    if producer is not None:
        connection.unregisterProducer()
    connection.__class__ = LayeredHandshake
    connection.begin(context_factory, client=client)  # type: ignore[attr-defined]  # a LayeredHandshake's
    if producer is not None:
        connection.registerProducer(producer, streaming)


class _Layer(TLSMemoryBIOProtocol):
    """Twisted's layer, but for three things that it leaves to chance or to the peer.

    It is not the one that a factory of Twisted's makes, which keeps writes for later, and drops them when the peer's
    close_notify is there before: whoever asks and says so at once would get no answer.
    """

    transport: Any

    def __init__(self, connection: Connection, context_factory: Any, client: bool) -> None:
        # As in Twisted's own startTLS: without a factory to wrap, since it is given the protocol.
        factory = TLSMemoryBIOFactory(context_factory, client, None)  # type: ignore[arg-type]  # None is for this use
        super().__init__(factory, connection.protocol, _connectWrapped=False)
        self._connection = connection

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()
        if self._handshakeDone:
            self._connection.shaken()  # type: ignore[attr-defined]  # a LayeredHandshake's

    def _flushSendBIO(self) -> None:
        # All of it: a long chain of certificates is more than what Twisted takes at once.
        while self._tlsConnection is not None:
            try:
                data = self._tlsConnection.bio_read(1 << 16)
            except SSL.WantReadError:
                return
            self.transport.write(data)

    def _shutdownTLS(self) -> None:
        super()._shutdownTLS()
        self.transport.loseConnection()  # RFC 8446, section 6.1: there is no need to wait for the peer's close_notify

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._reason is not None and isinstance(self._reason.value, SSL.Error):
            self._connection.failed(self._reason.value)  # type: ignore[attr-defined]  # a LayeredConnection's
        if self.wrappedProtocol is None:  # none was built
            self.wrappedProtocol = Protocol()
        super().connectionLost(reason)


class _Below(Connection):
    """What the layer calls on its transport."""

    __slots__ = ()

    def loseConnection(self) -> None:
        self._stop_producer()  # there is nobody any more who would take what it produces
        Connection.loseConnection(self)


@implementer(INegotiated, ISSLTransport)
class LayeredConnection(Connection):
    """What a protocol calls on its transport goes through the layer, which is the transport's protocol now.

    Bytes are counted as they pass below TLS.
    """

    __slots__ = ()

    def write(self, data: bytes) -> None:
        if self.connected:
            self.protocol.write(data)

    def writeSequence(self, data: Any) -> None:
        self.write(joined(data))

    def loseConnection(self) -> None:
        if self.connected and not self.disconnecting:
            self.protocol.loseConnection()

    def end(self, why: str) -> None:
        super().end(why)
        # What the layer waits for: that its producer is no more, and then the peer's close_notify.
        self.unregisterProducer()
        self.resumeProducing()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.connected:
            self.protocol.registerProducer(producer, streaming)
        else:
            producer.stopProducing()

    def unregisterProducer(self) -> None:
        if self.connected:
            self.protocol.unregisterProducer()

    # What follows is None once the connection is lost.

    def getHandle(self) -> Any:
        return self.protocol and self.protocol.getHandle()

    def getPeerCertificate(self) -> Any:
        return self.protocol and self.protocol.getPeerCertificate()

    @property
    def negotiatedProtocol(self) -> bytes | None:
        chosen: bytes | None = self.protocol and self.protocol.negotiatedProtocol
        return chosen

    @property
    def tls_version(self) -> str | None:
        handle = self.getHandle()
        version: str | None = handle and handle.get_protocol_version_name()
        return version

    @property
    def tls_cipher(self) -> str | None:
        handle = self.getHandle()
        name: str | None = handle and handle.get_cipher_name()
        return name

    def startTLS(self, contextFactory: Any, normal: bool = True) -> None:
        """TLS runs already, and not within itself; raises RuntimeError."""
        raise RuntimeError("this connection is in TLS already")

    def failed(self, problem: SSL.Error) -> None:
        """TLS has failed."""
        # For the record, in the words of `ssl`: see end_reason of host/connections.
        error = ssl.SSLError()
        words = problem.args and problem.args[0]
        error.reason = words[0][-1].upper().replace(" ", "_") if words else type(problem).__name__
        self.error = self.error or error

    def _give_up(self, reason: Failure) -> None:
        # In a later event: the layer, which may have called what has failed, goes on with what this would take from it.
        self.reactor.callLater(0, self.connectionLost, reason)
        self.protocol.abortConnection()  # and this has it give nothing more to the protocol

    def _was_told(self) -> bool:
        """Whether the peer has said close_notify."""
        return bool(self.getHandle().get_shutdown() & SSL.RECEIVED_SHUTDOWN)

    def readConnectionLost(self, reason: Failure) -> None:
        if self.peer_finished and not self.protocol.disconnecting and not self._was_told():
            self.error = self.error or ssl.SSLEOFError()
        super().readConnectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        layer = self.protocol
        if layer is not None and not layer.disconnecting and self._was_told():  # or it was an answer
            self.peer_finished = True
        super().connectionLost(reason)


class LayeredHandshake(LayeredConnection):
    """A connection until the handshake of a layer is done.

    Where the connection begins with it, its protocol is built then, whose transport is the layer: a
    `twisted.protocols.tls.TLSMemoryBIOProtocol`, as it is on Twisted's own TLS listeners.
    """

    phase = "tls"

    __slots__ = ()

    def start(self) -> None:
        self.reactor.addReader(self)
        self.begin(self.port.tls, client=False)
        self._flush()

    def begin(self, context_factory: Any, *, client: bool) -> None:
        """Begin the handshake."""
        self._deadline = self.reactor.callLater(self.port.handshake_timeout, self._timed_out)
        layer = self.protocol = _Layer(self, context_factory, client)
        layer.makeConnection(_BypassTLS(_Below, self))

    def shaken(self) -> None:
        """The handshake is done. The layer may have more to say in this event."""
        self._no_deadline()
        self.__class__ = LayeredConnection  # type: ignore[assignment]  # same slots
        layer = self.protocol
        if layer.wrappedProtocol is not None:
            return
        protocol = self._build_protocol()
        if protocol is None:
            return
        layer.wrappedProtocol = protocol
        method = "connectionMade"
        try:
            protocol.makeConnection(layer)
            listener = IHandshakeListener(protocol, None)
            if listener is not None:
                method = "handshakeCompleted"
                listener.handshakeCompleted()
        except BaseException:
            self._protocol_failed(method)

    def _close(self) -> None:
        self._no_deadline()  # it lingers, with a deadline of its own
        super()._close()

    def _timed_out(self) -> None:
        self._deadline = None
        self.error = Ended("TLS handshake timed out")
        self.connectionLost(_LOST)

    def connectionLost(self, reason: Failure) -> None:
        # The layer closes it as if all were well.
        super().connectionLost(_LOST if reason.check(ConnectionDone) else reason)
