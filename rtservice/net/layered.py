"""TLS by Twisted's own layer on top of a Connection, with pyOpenSSL: for protocols that ask for its objects.

Twisted's layer gives OpenSSL everything that it receives and keeps everything that OpenSSL wants to send. Here both are
bounded, with the bounds of `rtservice.net.tls_bounds`, as in `rtservice.net.tls_stream`.
"""

from __future__ import annotations

import ssl
from typing import Any

from OpenSSL import SSL
from twisted.internet._newtls import _BypassTLS
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener, INegotiated, ISSLTransport
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.net.connection import Connection, Ended, joined
from rtservice.net.tls_bounds import (
    ANSWER_TIMEOUT,
    ANSWERS_NOT_READ,
    FIRST_READ,
    FULL_READ,
    HANDSHAKE_TOO_LARGE,
    MAX_BYTES_WITHOUT_DATA,
    MAX_HANDSHAKE_BYTES,
    MAX_RECORDS,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from rtservice.net.tls_stream import RECORD_SIZE, Records

_LOST = Failure(CONNECTION_LOST)


def add_layer(connection: Connection, context_factory: Any, *, client: bool) -> None:
    """Put Twisted's TLS between the connection and its protocol, as `twisted.internet.tcp` does for startTLS."""
    layer = _Layer(connection, context_factory, client)  # may raise: before anything is changed
    producer, streaming = connection.producer, connection.streaming_producer
    if producer is not None:
        connection.unregisterProducer()
    connection.__class__ = LayeredHandshake
    connection.begin(layer)  # type: ignore[attr-defined]  # a LayeredHandshake's
    if producer is not None:
        connection.registerProducer(producer, streaming)


def _without_traceback(problem: Any) -> Failure:
    """Return a Failure that refers to no frames: theirs refer to the connection, which could not be freed at once."""
    return Failure(problem.with_traceback(None))


class Marks:
    """Which parts of a stream of output are of one kind, to know how much of that kind is unsent."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] = []  # where each part ends in the stream, and its size

    def __bool__(self) -> bool:
        return bool(self._marks)

    def add(self, size: int, end: int) -> None:
        """Mark the `size` bytes before position `end`."""
        if self._marks and self._marks[-1][0] == end - size:
            size += self._marks.pop()[1]
        self._marks.append((end, size))

    def after(self, position: int) -> int:
        """Return how many marked bytes come after a position, and forget those before it."""
        self._marks = [(end, min(size, end - position)) for end, size in self._marks if end > position]
        return sum(size for _, size in self._marks)


class _Layer(TLSMemoryBIOProtocol):
    """Twisted's layer without its dependence on the peer's close_notify, and with what is needed to bound it.

    A factory of Twisted's makes a layer that delays writes and drops them when the peer's close_notify arrives before:
    a client that sends a request together with close_notify gets no answer. This class is not that one.
    """

    transport: Any
    _tlsConnection: Any = None  # until the context factory has made it; it may raise

    def __init__(self, connection: Connection, context_factory: Any, client: bool) -> None:
        # As in Twisted's own startTLS: without a factory to wrap, since it is given the protocol.
        factory = TLSMemoryBIOFactory(context_factory, client, None)  # type: ignore[arg-type]  # None is for this use
        super().__init__(factory, connection.protocol, _connectWrapped=False)
        self._connection = connection
        self._appSendBuffer: list[bytes] = []
        self._writing = False  # what OpenSSL sends now is the protocol's
        self.answers = Marks()  # what OpenSSL has sent otherwise since the handshake
        self.records = Records()
        self.without_data = 0  # bytes received since the last application data; in the handshake, all
        self.max_handshake_bytes: int = getattr(context_factory, "max_handshake_bytes", MAX_HANDSHAKE_BYTES)
        self.rest = b""  # received, but for a later turn
        self.rest_scheduled = False
        self.reading = True  # the protocol has not paused it
        self.held = False  # nothing is read because `answers` do not leave

    @property
    def broken(self) -> bool:
        """Whether TLS has failed."""
        return self._lostTLSConnection and self._reason is not None

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()
        if self._handshakeDone:
            self._connection.shaken()  # type: ignore[attr-defined]  # a LayeredHandshake's

    def _write(self, bytes: bytes) -> None:
        self._writing = True
        try:
            super()._write(bytes)
        finally:
            self._writing = False

    def _flushSendBIO(self) -> None:
        # All of it: a long chain of certificates is more than what Twisted takes at once.
        size = most = 1 << 16
        while size == most and self._tlsConnection is not None:
            try:
                data = self._tlsConnection.bio_read(most)
            except SSL.WantReadError:
                return
            size = len(data)
            self.transport.write(data)
            if self._handshakeDone and not self._writing:
                self.answers.add(size, self._connection.bytes_out + self._connection.unsent)

    def _flushReceiveBIO(self) -> None:
        # Twisted calls the protocol for each record. A protocol that pauses, closes or aborts is called once here, as
        # it is on a plain connection.
        pieces: list[bytes] = []
        ended = False
        failure = None
        while not ended and not self._lostTLSConnection:
            try:
                pieces.append(self._tlsConnection.recv(RECORD_SIZE))
            except SSL.WantReadError:
                break
            except SSL.ZeroReturnError:
                ended = True
            except SSL.Error as problem:
                ended = True
                failure = _without_traceback(problem)
        self._flushSendBIO()  # before the protocol writes: these are answers
        if pieces:
            self.without_data = 0
            if not self._aborted:
                self.wrappedProtocol.dataReceived(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        if ended and not self._lostTLSConnection:
            if failure is None:
                self._shutdownTLS()
            self._tlsShutdownFinished(failure)

    def _shutdownTLS(self) -> None:
        if self._tlsConnection is not None:
            super()._shutdownTLS()
        self.transport.loseConnection()  # RFC 8446, section 6.1: there is no need to wait for the peer's close_notify

    def _tlsShutdownFinished(self, reason: Failure | None) -> None:
        super()._tlsShutdownFinished(None if reason is None else _without_traceback(reason.value))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self._reason is not None and isinstance(self._reason.value, SSL.Error):
            self._connection.failed(self._reason.value)  # type: ignore[attr-defined]  # a LayeredConnection's
        if self.wrappedProtocol is None:  # none was built
            self.wrappedProtocol = Protocol()
        if self._tlsConnection is not None:
            super().connectionLost(reason)
        else:  # TLS has not begun
            protocol: Any = self.wrappedProtocol
            self.wrappedProtocol = None  # type: ignore[assignment]  # as Twisted does: they refer to each other
            protocol.connectionLost(reason)


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

    # --- reading ---

    def doRead(self) -> Any:
        """One read for each event, of which OpenSSL gets no more than a bounded number of records."""
        try:
            data = self._recv(FULL_READ)
        except OSError as problem:
            return self._not_read(problem)
        if not data:
            self.peer_finished = True
            return CONNECTION_DONE
        self.bytes_in += len(data)
        return self._received(self.protocol, data)

    def _received(self, layer: _Layer, data: bytes) -> Any:
        """Give the layer what the peer has sent, or as much of it as is for this turn. Returns what doRead does."""
        # In fewer bytes are not many more records: the smallest encrypted one has 22.
        end = layer.records.take(data, MAX_RECORDS if len(data) > FIRST_READ else len(data))[-1]
        if end < len(data):
            data, layer.rest = data[:end], data[end:]
        layer.without_data += len(data)
        self._corked = True
        try:
            layer.dataReceived(data)
        except BaseException:
            self._protocol_failed("dataReceived")
            return None
        if self._out or self._once_sent:
            self._flush()
        else:
            self._corked = False
        if layer.answers or layer.rest or layer.broken or layer.without_data > MAX_BYTES_WITHOUT_DATA:
            # Unless it is over: it may be a Lingering.
            return None if self.disconnected or self._aborting or self.phase == "closing" else self._bounded(layer)
        return None

    def _bounded(self, layer: _Layer) -> Any:
        """Keep what the peer may cost within its bounds. Returns what doRead does."""
        if layer.without_data > MAX_BYTES_WITHOUT_DATA:
            self.error = self.error or Ended(TOO_MUCH_WITHOUT_DATA)
            return CONNECTION_LOST
        if layer.answers.after(self.bytes_out) > MAX_UNSENT_ANSWERS or (layer.broken and self._unsent):
            self._hold(layer)
        elif layer.rest:
            self.reactor.removeReader(self)
            self._schedule_rest(layer)
        return None

    def _schedule_rest(self, layer: _Layer) -> None:
        if not layer.rest_scheduled:
            layer.rest_scheduled = True
            self.reactor.callLater(0, self._read_rest, layer)

    def _read_rest(self, layer: _Layer) -> None:
        """Take what was read in an earlier turn."""
        layer.rest_scheduled = False
        if not layer.reading or layer.held or self.disconnecting or self.disconnected:
            return
        rest, layer.rest = layer.rest, b""
        try:
            why = self._received(layer, rest)
        except BaseException:
            self._failed()
            return
        if why is not None:
            self.connectionLost(_LOST)
        elif layer.reading and not layer.held and not layer.rest and not self.disconnecting:
            super().resumeProducing()

    def pauseProducing(self) -> None:
        layer = self.protocol
        if layer is not None:
            layer.reading = False
        super().pauseProducing()

    def resumeProducing(self) -> None:
        layer = self.protocol
        if layer is None:
            return
        layer.reading = True
        if layer.held:
            return
        if layer.rest:
            self._schedule_rest(layer)
        else:
            super().resumeProducing()

    stopReading = pauseProducing
    startReading = resumeProducing

    # --- what TLS itself has to send ---

    def _hold(self, layer: _Layer) -> None:
        """Read nothing more from a peer that does not read what TLS has to tell it."""
        if not layer.held:
            layer.held = True
            self.reactor.removeReader(self)
            if self._deadline is None:  # or the handshake's, which ends this too
                self._deadline = self.reactor.callLater(ANSWER_TIMEOUT, self._check_answers, self.bytes_out)

    def _check_answers(self, before: int) -> None:
        self._deadline = None
        if self.bytes_out == before:
            self.cut(ANSWERS_NOT_READ)
        else:
            self._deadline = self.reactor.callLater(ANSWER_TIMEOUT, self._check_answers, self.bytes_out)

    def doWrite(self) -> Any:
        super().doWrite()
        layer = self.protocol
        # What ends stays held: this has to be bounded, too.
        if layer is not None and layer.held and not self.disconnecting and not layer.answers.after(self.bytes_out):
            self._release(layer)
        return None

    def _release(self, layer: _Layer) -> None:
        layer.held = False
        self._no_deadline()
        if layer.reading:
            self.resumeProducing()

    # --- what a protocol calls ---

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

    def _close(self) -> None:
        self._no_deadline()  # it lingers, with a deadline of its own
        super()._close()

    def _was_told(self) -> bool:
        """Whether the peer has said close_notify."""
        handle = self.getHandle()
        return handle is not None and bool(handle.get_shutdown() & SSL.RECEIVED_SHUTDOWN)

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
        self.begin(_Layer(self, self.port.tls, client=False))
        self._flush()

    def begin(self, layer: _Layer) -> None:
        """Begin the handshake."""
        self._deadline = self.reactor.callLater(self.port.handshake_timeout, self._timed_out)
        self.protocol = layer
        layer.transport = _BypassTLS(_Below, self)  # also when the following raises
        layer.makeConnection(layer.transport)

    def doRead(self) -> Any:
        try:
            data = self._recv(FIRST_READ)
        except OSError as problem:
            return self._not_read(problem)
        if not data:
            self.peer_finished = True
            return CONNECTION_DONE
        self.bytes_in += len(data)
        layer = self.protocol
        if layer.without_data + len(data) > layer.max_handshake_bytes:
            self.error = self.error or Ended(HANDSHAKE_TOO_LARGE)
            return CONNECTION_LOST
        return self._received(layer, data)

    def shaken(self) -> None:
        """The handshake is done. The layer may have more to say in this event."""
        self._no_deadline()
        self.__class__ = LayeredConnection  # type: ignore[assignment]  # same slots
        layer = self.protocol
        layer.without_data = 0
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

    def _timed_out(self) -> None:
        self._deadline = None
        self.error = Ended("TLS handshake timed out")
        self.connectionLost(_LOST)

    def connectionLost(self, reason: Failure) -> None:
        # The layer closes it as if all were well.
        super().connectionLost(_LOST if reason.check(ConnectionDone) else reason)
