"""TLS by Twisted's own layer on top of a Connection: for context factories made for pyOpenSSL."""

from __future__ import annotations

from typing import Any

from twisted.internet._newtls import _BypassTLS
from twisted.internet.interfaces import INegotiated, ISSLTransport
from twisted.protocols.tls import TLSMemoryBIOFactory
from zope.interface import implementer

from rtservice.net.stream import Connection, joined


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
