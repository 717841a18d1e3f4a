"""The TLS stream of a connection with Twisted's TLS and pyOpenSSL, for protocols that need pyOpenSSL's objects.

Twisted's TLS is a protocol, the *layer*, between a transport and the wrapped protocol. It passes all input to OpenSSL
and buffers all output of OpenSSL. Here both are bounded, as in `rtservice.net.tls_stream`.
"""

from __future__ import annotations

import ssl
from typing import Any

from OpenSSL import SSL
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.main import CONNECTION_DONE, CONNECTION_LOST
from twisted.internet.protocol import Protocol, connectionDone
from twisted.protocols.tls import TLSMemoryBIOFactory, TLSMemoryBIOProtocol
from twisted.python.failure import Failure

from rtservice.net.bounded_stream import BoundedStream
from rtservice.net.connection import LOST, Connection, LocalClose, joined
from rtservice.net.phases import OPEN, TLS
from rtservice.net.tls_bounds import (
    FIRST_READ,
    FULL_READ,
    HANDSHAKE_TOO_LARGE,
    MAX_BYTES_WITHOUT_DATA,
    MAX_HANDSHAKE_BYTES,
    MAX_RECORDS,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from rtservice.net.tls_facts import TLS_GONE
from rtservice.net.tls_memory import RECORD_SIZE, RecordBoundaries


def _without_traceback(problem: Any) -> Failure:
    """Return a Failure without frames: these refer to the connection, and keep it until a garbage collection."""
    return Failure(problem.with_traceback(None))


class Marks:
    """Marked parts of an output stream, to count how many marked bytes are unsent."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[tuple[int, int]] = []  # end position and size of each part

    def __bool__(self) -> bool:
        return bool(self._marks)

    def add(self, size: int, end: int) -> None:
        """Mark the `size` bytes before position `end`."""
        if self._marks and self._marks[-1][0] == end - size:
            size += self._marks.pop()[1]
        self._marks.append((end, size))

    def after(self, position: int) -> int:
        """Return the number of marked bytes after a position, and drop the marks before it."""
        self._marks = [(end, min(size, end - position)) for end, size in self._marks if end > position]
        return sum(size for _, size in self._marks)


class Layer(TLSMemoryBIOProtocol):
    """Twisted's TLS layer, independent of the peer's close_notify, and with the counters that bound its work.

    The layer of Twisted's own factory (BufferingTLSTransport) delays writes, and drops them if the peer's close_notify
    arrives first: a client that sends a request together with close_notify gets no answer. The base class here does not
    delay writes.
    """

    transport: Any
    _tlsConnection: Any = None  # until the context factory has created it, which may raise

    def __init__(self, stream: PyOpenSSLStream, context_factory: Any, *, client: bool) -> None:
        # As in Twisted's startTLS: no wrapped factory, since the protocol exists.
        factory = TLSMemoryBIOFactory(context_factory, client, None)  # type: ignore[arg-type]  # None is for this use
        super().__init__(factory, stream.connection.protocol, _connectWrapped=False)
        self._stream: Any = stream
        self._appSendBuffer: list[bytes] = []
        self._writing = False  # OpenSSL's output is now the protocol's data
        self.answers = Marks()  # other output of OpenSSL since the handshake
        self.without_data = 0  # bytes received since the last application data; in the handshake, all

    # --- TLSFacts ---

    @property
    def handle(self) -> SSL.Connection | None:
        """The pyOpenSSL connection; None before TLS has begun."""
        return self._tlsConnection  # type: ignore[no-any-return]  # Twisted's

    @property
    def peer_certificate(self) -> Any:
        return self.getPeerCertificate()

    @property
    def negotiated_protocol(self) -> bytes | None:
        return self.negotiatedProtocol

    @property
    def version(self) -> str | None:
        return self._tlsConnection and self._tlsConnection.get_protocol_version_name()  # type: ignore[no-any-return]  # untyped

    @property
    def cipher(self) -> str | None:
        return self._tlsConnection and self._tlsConnection.get_cipher_name()  # type: ignore[no-any-return]  # untyped

    # --- differences from Twisted's layer ---

    @property
    def broken(self) -> bool:
        """Whether TLS has failed."""
        return self._lostTLSConnection and self._reason is not None

    def _checkHandshakeStatus(self) -> None:
        super()._checkHandshakeStatus()
        if self._handshakeDone:
            self._stream.shaken()

    def _write(self, bytes: bytes) -> None:
        self._writing = True
        try:
            super()._write(bytes)
        finally:
            self._writing = False

    def _flushSendBIO(self) -> None:
        # Until the BIO is empty: a long certificate chain is more than Twisted reads at once.
        size = most = 1 << 16
        while size == most and self._tlsConnection is not None:
            try:
                data = self._tlsConnection.bio_read(most)
            except SSL.WantReadError:
                return
            size = len(data)
            self.transport.write(data)
            if self._handshakeDone and not self._writing:
                self.answers.add(size, self._stream.connection.bytes_out + self._stream.connection.unsent)

    def _flushReceiveBIO(self) -> None:
        # Twisted calls dataReceived for each record, even after the protocol has paused, closed or aborted. Here it is
        # called once, as on a plain connection.
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
            self._stream.failed(self._reason.value)
        if self.wrappedProtocol is None:  # the handshake was not done
            self.wrappedProtocol = Protocol()
        try:
            if self._tlsConnection is not None:
                super().connectionLost(reason)
            else:  # TLS has not begun
                self.wrappedProtocol.connectionLost(reason)
        finally:  # break reference cycles; Twisted does not break all, and none if the protocol raises
            self._tlsConnection = self._producer = self._stream = None
            self.wrappedProtocol = None  # type: ignore[assignment]  # as Twisted does


class _Below:
    """The transport of the layer: writes go to the socket, and closing closes the connection.

    A protocol that has called startTLS keeps the connection as its transport, whose methods call the layer. All other
    attributes are those of the connection.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def write(self, data: bytes) -> None:
        self._connection._write_to_socket(data)

    def writeSequence(self, pieces: Any) -> None:
        self.write(joined(pieces))

    def loseConnection(self) -> None:
        connection = self._connection
        connection._stop_producer()  # its output would be discarded
        connection.loseConnection(below=True)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        self._connection.registerProducer(producer, streaming, below=True)

    def unregisterProducer(self) -> None:
        self._connection.unregisterProducer(below=True)


class PyOpenSSLStream(BoundedStream):
    """Stage that does the handshake and then reads for a layer, which is the protocol of the connection.

    Calls of the protocol on the connection go through the layer. Byte counters count encrypted bytes.

    If the connection begins with TLS, its protocol is built after the handshake, and its transport is the layer: a
    `twisted.protocols.tls.TLSMemoryBIOProtocol`, as on Twisted's TLS listeners.
    """

    __slots__ = ("_max_handshake_bytes", "_records", "_rest", "layer")

    sends = False  # the layer encrypts; the connection sends

    def __init__(self, connection: Connection, context_factory: Any, *, server_side: bool) -> None:
        super().__init__(connection)
        self.layer = Layer(self, context_factory, client=not server_side)  # may raise: before anything is changed
        self._max_handshake_bytes: int = getattr(context_factory, "max_handshake_bytes", MAX_HANDSHAKE_BYTES)
        self._records = RecordBoundaries()
        self._rest = b""  # received, to process in a later turn

    def begin(self) -> None:
        """Begin the handshake."""
        connection, layer = self.connection, self.layer
        producer, streaming = connection.producer, connection.streaming_producer
        if producer is not None:
            connection.unregisterProducer()
        begins = connection.protocol is None
        # If the reactor cannot exchange descriptors, a connection that was reading continues to read.
        reads = begins or (connection.port.exchange is None and connection in connection.reactor.getReaders())
        connection.be_in_tls(layer)
        connection.enter(TLS, self)
        connection._writable = False  # writes go to `write` of this stage
        self._deadline = connection.reactor.callLater(connection.port.handshake_timeout, self._time_out)
        connection.protocol = layer
        layer.transport = _Below(connection)  # set even if the following raises
        if reads:
            connection.reactor.addReader(self)
        layer.makeConnection(layer.transport)
        if begins:
            connection._flush()
        if producer is not None:
            connection.registerProducer(producer, streaming)

    def shaken(self) -> None:
        """Continue after the handshake, in the same event. Called by the layer."""
        self.stop()
        connection, layer = self.connection, self.layer
        connection.enter(OPEN, self)
        layer.without_data = 0
        if layer.wrappedProtocol is not None:
            return
        protocol = connection._build_protocol()
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
            connection._protocol_failed(method)

    def _time_out(self) -> None:
        self._deadline = None
        self.connection.error = LocalClose("TLS handshake timed out")
        self.connection.connectionLost(LOST)

    # --- reading ---

    def doRead(self) -> Any:
        """Read once for each event, and pass a bounded number of records to OpenSSL."""
        connection = self.connection
        shaking = connection.phase is TLS
        try:
            data = connection._recv(FIRST_READ if shaking else FULL_READ)
        except OSError as problem:
            return connection._not_read(problem)
        if not data:
            connection.peer_finished = True
            return CONNECTION_DONE
        connection.bytes_in += len(data)
        if shaking and self.layer.without_data + len(data) > self._max_handshake_bytes:
            connection.error = connection.error or LocalClose(HANDSHAKE_TOO_LARGE)
            return CONNECTION_LOST
        return self._received(data)

    def _received(self, data: bytes) -> Any:
        """Pass input to the layer, up to the bound for one event. Returns what doRead returns."""
        connection, layer = self.connection, self.layer
        # FIRST_READ bytes cannot contain many more records: the smallest encrypted one has 22 bytes.
        end = self._records.take(data, MAX_RECORDS if len(data) > FIRST_READ else len(data))[-1]
        if end < len(data):
            data, self._rest = data[:end], data[end:]
        layer.without_data += len(data)
        connection._corked = True
        try:
            layer.dataReceived(data)
        except BaseException:
            connection._protocol_failed("dataReceived")
            return None
        if connection._out or connection._once_sent:
            connection._flush()
        else:
            connection._corked = False
        if layer.answers or self._rest or layer.broken or layer.without_data > MAX_BYTES_WITHOUT_DATA:
            # Not if the connection has ended or lingers.
            return self._bounded() if connection._stage is self and not connection._aborting else None
        return None

    def _bounded(self) -> Any:
        """Apply the bounds on the cost of the peer. Returns what doRead returns."""
        connection, layer = self.connection, self.layer
        if layer.without_data > MAX_BYTES_WITHOUT_DATA:
            connection.error = connection.error or LocalClose(TOO_MUCH_WITHOUT_DATA)
            return CONNECTION_LOST
        if layer.answers.after(connection.bytes_out) > MAX_UNSENT_ANSWERS or (layer.broken and connection._unsent):
            self.hold()
        elif self._rest:
            self.leave_rest()
        return None

    def has_rest(self) -> bool:
        return bool(self._rest)

    def take_rest(self) -> Any:
        rest, self._rest = self._rest, b""
        return self._received(rest)

    def progress(self) -> int:
        return self.connection.bytes_out

    def doWrite(self) -> Any:
        connection = self.connection
        if connection._stage is not self:
            return connection.doWrite()
        connection._flush()
        connection._stop_waiting_if_sent()
        # A connection that closes stays held: its work is bounded too.
        if self.held and not connection.disconnecting and not self.layer.answers.after(connection.bytes_out):
            self.release()
        return None

    # --- called by the connection ---

    def write(self, data: bytes) -> None:
        if self.connection.connected:
            self.layer.write(data)

    def may_close(self) -> bool:
        self.layer.loseConnection()
        return False

    def closing(self) -> None:
        # The layer waits for its producer to unregister, and then for the peer's close_notify.
        self.layer.unregisterProducer()
        self.resume()

    def may_register(self, producer: Any, streaming: bool) -> bool:
        if self.connection.connected:
            self.layer.registerProducer(producer, streaming)
        else:
            producer.stopProducing()
        return False

    def may_unregister(self) -> bool:
        if self.connection.connected:
            self.layer.unregisterProducer()
        return False

    # --- the end ---

    def failed(self, problem: SSL.Error) -> None:
        """Keep the reason why TLS has failed, for the log."""
        # As an error of `ssl`, whose reasons logs show: see end_reason of process/endings.
        error = ssl.SSLError()
        words = problem.args and problem.args[0]
        error.reason = words[0][-1].upper().replace(" ", "_") if words else type(problem).__name__
        self.connection.error = self.connection.error or error

    def give_up(self, reason: Failure) -> None:
        # In a later event: the caller may be the layer, which needs its connection until it returns.
        self.connection.reactor.callLater(0, self.connection.connectionLost, reason)
        self.layer.abortConnection()  # the layer passes nothing more to the protocol

    def _has_close_notify(self) -> bool:
        """Return whether the peer has sent close_notify."""
        handle = self.layer.handle
        return handle is not None and bool(handle.get_shutdown() & SSL.RECEIVED_SHUTDOWN)

    def readConnectionLost(self, reason: Failure) -> None:
        connection = self.connection
        if connection.peer_finished and not self.layer.disconnecting and not self._has_close_notify():
            connection.error = connection.error or ssl.SSLEOFError()
        connection.readConnectionLost(reason)

    def ended(self, reason: Failure) -> Failure:
        connection = self.connection
        if not self.layer.disconnecting and self._has_close_notify():  # otherwise it answers ours
            connection.peer_finished = True
        connection._tls = TLS_GONE  # the layer refers to the connection
        if connection.phase is TLS and reason.check(ConnectionDone):
            return LOST  # the layer reports a clean close
        return reason
