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
    # As in Twisted's own startTLS: without a factory to wrap, since it is given the protocol.
    factory = TLSMemoryBIOFactory(context_factory, client, None)  # type: ignore[arg-type]  # None is for this use
    protocol = factory.protocol(factory, connection.protocol, False)
    connection.protocol = protocol
    connection.__class__ = LayeredConnection
    protocol.makeConnection(_BypassTLS(Connection, connection))
    if producer is not None:
        connection.registerProducer(producer, streaming)


@implementer(INegotiated, ISSLTransport)
class LayeredConnection(Connection):
    """What a protocol calls on its transport goes through the layer, which is the transport's protocol now."""

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

    def _give_up(self, reason: Failure) -> None:
        # In a later event: the layer, which may have called what has failed, goes on with what this would take from it.
        self.reactor.callLater(0, self.connectionLost, reason)
        self.protocol.abortConnection()  # and this has it give nothing more to the protocol

    def connectionLost(self, reason: Failure) -> None:
        layer = self.protocol
        if layer is not None and not layer.disconnecting:  # then its close_notify is an answer
            self.peer_finished |= bool(layer.getHandle().get_shutdown() & SSL.RECEIVED_SHUTDOWN)
        super().connectionLost(reason)


class LayeredHandshake(LayeredConnection):
    """A connection until the handshake of a layer, with which it begins, is done.

    Then its protocol is built, whose transport is the layer: a `twisted.protocols.tls.TLSMemoryBIOProtocol`, as it is
    on Twisted's own TLS listeners.
    """

    phase = "tls"

    __slots__ = ()

    def start(self) -> None:
        self._deadline = self.reactor.callLater(self.port.handshake_timeout, self._timed_out)
        # As in add_layer; the protocol is there once the handshake is done.
        factory = TLSMemoryBIOFactory(self.port.tls, False, None)  # type: ignore[arg-type]
        # Not the factory's choice, which keeps writes for later, and drops them when the peer's close_notify is there
        # before: whoever asks and says so at once would get no answer.
        self.protocol = TLSMemoryBIOProtocol(factory, _Unshaken(self))
        self.reactor.addReader(self)
        self.protocol.makeConnection(_BypassTLS(Connection, self))
        self._flush()

    def shaken(self) -> None:
        """The handshake is done. The layer may have more to say in this event."""
        self._no_deadline()
        self.__class__ = LayeredConnection  # type: ignore[assignment]  # same slots
        layer = self.protocol
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

    def failed(self, reason: Failure) -> None:
        """It has ended before that."""
        if isinstance(reason.value, SSL.Error) and self.error is None:
            # For the record, in the words of `ssl`: see end_reason of host/connections.
            problem = ssl.SSLError()
            words = reason.value.args and reason.value.args[0]
            problem.reason = words[0][-1].upper().replace(" ", "_") if words else "HANDSHAKE_FAILURE"
            self.error = problem

    def _no_deadline(self) -> None:
        self._deadline.cancel()
        self._deadline = None

    def _close(self) -> None:
        self._no_deadline()  # it lingers, with a deadline of its own
        super()._close()

    def _timed_out(self) -> None:
        self._deadline = None
        self.error = Ended("TLS handshake timed out")
        self.connectionLost(_LOST)

    def readConnectionLost(self, reason: Failure) -> None:
        if self.peer_finished:
            self.error = self.error or ssl.SSLEOFError()
        super().readConnectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        # The layer closes it as if all were well.
        super().connectionLost(_LOST if reason.check(ConnectionDone) else reason)


@implementer(IHandshakeListener)
class _Unshaken(Protocol):
    """What a layer has in the place of its protocol until the handshake is done."""

    def __init__(self, connection: LayeredHandshake) -> None:
        self._connection = connection

    def handshakeCompleted(self) -> None:
        self._connection.shaken()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if isinstance(self._connection, LayeredHandshake):  # and not one for which no protocol was built
            self._connection.failed(reason)
