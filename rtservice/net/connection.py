"""`Connection`: the transport of one accepted connection. `Stage`: base class of the parts below it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from twisted.internet import error, interfaces, main
from twisted.internet.interfaces import IHalfCloseableProtocol, ILoggingContext
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementedBy, implementer
from zope.interface.declarations import Provides

from rtservice.events import CONNECTION_FAILED, FACTORY_FAILED, PRODUCER_FAILED, PROTOCOL_FAILED
from rtservice.net.address import Address, address_of, peer_name
from rtservice.net.phases import CLOSING, OPEN, Phase, next_phase
from rtservice.net.proxy import Header
from rtservice.net.tls_facts import TLS_PENDING, TLSFacts

# A protocol's producer is paused while more than this many bytes are unsent. Twisted uses the same value. Also the size
# of one read.
BUFFER_SIZE = 64 * 1024

# Pieces up to this many bytes in total are joined before they are sent: about what the kernel accepts at once when the
# peer reads fast. Joining more would copy bytes that the kernel then does not accept.
JOIN_LIMIT = 256 * 1024

# Created once, as in Twisted's reactors: a new Failure for each connection costs more than its greeting.
DONE = Failure(main.CONNECTION_DONE)
LOST = Failure(main.CONNECTION_LOST)

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, 0 seconds

_log = Logger()


class LocalClose(Exception):  # noqa: N818  # a reason, and no error
    """The reason why this side closed a connection: one of a few fixed texts, without bytes of the peer."""


class Acceptor(Protocol):
    """The part of `rtservice.net.port.Port` that its connections use."""

    name: str
    factory: Any
    tls: Any
    handshake_timeout: float
    write_soon: Callable[[Any], None] | None
    exchange: Callable[[Any, Any], None] | None

    def after_proxy(self, connection: Connection) -> None:
        """Begin the phase after the PROXY header."""

    def start_tls(self, connection: Connection, context: Any, *, server_side: bool) -> None:
        """Begin a TLS handshake."""

    def linger(self, connection: Connection) -> None:
        """Keep a connection that closes until its last output is delivered."""

    @property
    def connection_identified(self) -> Callable[[Connection], None]: ...

    @property
    def connection_closed(self) -> Callable[[Connection, Failure], None]: ...


def log_prefix(thing: object) -> str:
    """Return the name of a protocol or factory for logs: its logPrefix (ILoggingContext) or the name of its class."""
    if ILoggingContext.providedBy(thing):
        with contextlib.suppress(Exception):  # the __init__ of the object may have failed
            return str(thing.logPrefix())
    return type(thing).__name__


def would_block(problem: OSError) -> bool:
    """Return whether send() failed only because the kernel's buffer is full."""
    return isinstance(problem, BlockingIOError) or problem.errno == errno.ENOBUFS


@implementer(
    interfaces.IReadWriteDescriptor,
    interfaces.IHalfCloseableDescriptor,
    interfaces.ILoggingContext,
)
class Stage:
    """Layer between a connection and its socket during one phase.

    - handshakes.py: the stages before a protocol, which are the PROXY header and the TLS handshake.
    - tls_stream.py and pyopenssl_stream.py: the streams of an open TLS connection. A plain connection has no stage: it
      reads and sends itself, which costs least.
    - lingering.py: the stage of a connection that closes.

    A stage is registered with the reactor in place of the connection. It ends with the connection, or when another
    stage replaces it. Both are parts of one implementation, so a stage uses private attributes of its connection.
    """

    __slots__ = ("connection", "fileno")

    # True: the stage sends the output. False: the connection sends it to the socket unchanged.
    sends = True

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.fileno: Callable[[], int] = connection.fileno

    # --- called by the reactor ---

    def doRead(self) -> Any:
        """Handle input. Returns None, or the exception that ends the connection."""
        raise NotImplementedError

    def doWrite(self) -> Any:
        """Send unsent output: the socket is writable, or very likely is."""
        connection = self.connection
        if connection._stage is not self:  # doRead has begun another stage in the same event
            return connection.doWrite()
        self.flush()
        connection._stop_waiting_if_sent()
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        """Handle the end of input."""
        self.connection.readConnectionLost(reason)

    def writeConnectionLost(self, reason: Failure) -> None:
        self.connection.writeConnectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        self.connection.connectionLost(reason)

    def logPrefix(self) -> str:
        return self.connection.logPrefix()

    # --- called by the connection ---

    def flush(self) -> None:
        """Send as much output as the kernel accepts. Called only if `sends` is true."""

    def pause(self) -> None:
        """Pause reading, for the protocol's pauseProducing."""
        self.connection.reactor.removeReader(self)

    def resume(self) -> None:
        """Resume reading, for the protocol's resumeProducing."""
        if self.connection._may_read:
            self.connection.reactor.addReader(self)

    def write(self, data: bytes) -> None:
        """Write data that the connection does not buffer itself."""

    def may_close(self) -> bool:
        """Called by loseConnection. Returns True if the connection closes after its output, False if the stage does."""
        return True

    def may_register(self, producer: Any, streaming: bool) -> bool:
        """Called by registerProducer. Returns True if the connection registers it, False if the stage has done so."""
        return True

    def may_unregister(self) -> bool:
        """Called by unregisterProducer. Returns True if the connection unregisters it, False if the stage has."""
        return True

    def closing(self) -> None:
        """Called by `close`, after the connection has begun to close."""

    def finish_output(self) -> bool:
        """Send the last bytes before FIN. Returns False if the kernel's buffer is full; then it is called again."""
        return True

    def drop_output(self) -> None:
        """Discard unsent output."""

    def give_up(self, reason: Failure) -> None:
        """End the connection after an error of its protocol."""
        self.connection.connectionLost(reason)

    def stop(self) -> None:
        """Cancel the timers of the stage: the connection ends, or another stage follows."""

    def ended(self, reason: Failure) -> Failure:
        """Called at the end of the connection, after `stop`. Returns the reason to pass to its protocol."""
        return reason


@implementer(
    interfaces.ITLSTransport,
    interfaces.ISystemHandle,
    interfaces.IConsumer,
    interfaces.IPushProducer,
    interfaces.IReadWriteDescriptor,
    interfaces.IHalfCloseableDescriptor,
    interfaces.ILoggingContext,
)
class Connection:
    """The transport of one accepted connection, TCP or UNIX, with Twisted's contract.

    One object exists from accept() to the end. Its protocol is built after the handshakes. `phase` is the current
    phase, or after the end, the last one before CLOSING. The Stage below the connection implements the phase.

    Differences from Twisted's transports: writes made while an event of this connection is handled are joined, and sent
    with one system call right after it. The reactor watches for writability only if the kernel accepted less. After the
    peer's FIN, all written output is sent before the connection is closed, even if the protocol does not implement
    half-close.

    In TLS the connection provides ISSLTransport and INegotiated, with their attributes, `tls_version` and `tls_cipher`;
    otherwise it has none of these. In TLS, `unsent` and the byte counters count plaintext, except with pyOpenSSL.

    `bytes_in` and `bytes_out` count the bytes received from and passed to the kernel. `opened` is a `time.monotonic`.
    `proxied` is the PROXY header, if the listener expects one. After the end, `error` is the OSError, ProxyError or
    LocalClose that ended the connection, or None.

    `seen` and `still_since` serve the idle timeout: the bytes counted at the last check, and the time of the last
    change.
    """

    __slots__ = (
        "__provides__",
        "__weakref__",
        "_aborting",
        "_corked",
        "_once_sent",
        "_out",
        "_peer",
        "_recv",
        "_send",
        "_sending",
        "_stage",
        "_tls",
        "_unsent",
        "_waiting",
        "_writable",
        "_write_closing",
        "bytes_in",
        "bytes_out",
        "connected",
        "disconnected",
        "disconnecting",
        "error",
        "fileno",
        "number",
        "opened",
        "peer_finished",
        "phase",
        "port",
        "producer",
        "producer_paused",
        "protocol",
        "proxied",
        "reactor",
        "seen",
        "socket",
        "still_since",
        "streaming_producer",
    )

    def __init__(
        self, reactor: Any, sock: socket.socket, port: Acceptor, peer: Address, number: int, phase: Phase = OPEN
    ) -> None:
        self.__provides__: Any = _PROVIDED  # a look-up takes 0.14 µs here, and 0.6 µs through the class
        self.reactor = reactor
        self.port = port
        self.number = number
        self.phase = phase
        self._peer = peer
        self.socket = sock
        # Bound once: saves three attribute look-ups for each message.
        self.fileno = sock.fileno
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[bytes | memoryview], int] = sock.send
        self._out: list[bytes | memoryview] = []  # unsent output; the first piece may be partly sent
        self._unsent = 0
        self._corked = True  # a flush follows, so a write need not schedule one
        self._waiting = False  # registered for EPOLLOUT
        self._once_sent = False  # an action is pending until all output is sent
        self._writable = True  # writes are appended to `_out`
        self._sending = True  # neither FIN nor close_notify is sent
        self._write_closing = False
        self._aborting = False
        self._stage: Stage | None = None
        self._tls: TLSFacts | None = None  # None: not in TLS
        self.connected = True
        self.disconnected = False
        self.disconnecting = False
        self.peer_finished = False
        self.producer: Any = None
        self.producer_paused = False
        self.streaming_producer = False
        self.protocol: Any = None
        self.proxied: Header | None = None
        self.bytes_in = 0
        self.bytes_out = 0
        self.seen = -1
        self.still_since = 0.0
        self.opened = monotonic()
        self.error: Exception | None = None

    # --- phases and stages ---

    def enter(self, phase: Phase, stage: Stage | None) -> None:
        """Enter a phase, or stay in it, with this stage below. Raises RuntimeError if the transition is invalid.

        The previous stage is stopped. If the connection waits for writability, the new stage is registered for that. A
        stage that reads must add itself to the reactor's readers; rtservice's reactor transfers this registration from
        the previous stage.
        """
        if phase is not self.phase:
            self.phase = next_phase(self.phase, phase)
        before = self._stage
        if stage is before:
            return
        if before is not None:
            before.stop()
        self._stage = stage
        if before is None and self.protocol is None:  # just accepted: nothing is registered
            return
        old, new = before or self, stage or self
        exchange = self.port.exchange
        if exchange is not None:
            exchange(old, new)
        else:
            self.reactor.removeReader(old)
            if self._waiting:
                self.reactor.removeWriter(old)
                self.reactor.addWriter(new)

    def be_in_tls(self, facts: TLSFacts) -> None:
        """Provide the interfaces of a TLS transport, with these facts."""
        self.__provides__ = _PROVIDED_IN_TLS
        self._tls = facts

    def connect_protocol(self) -> None:
        """Build the protocol and connect it. Output written in connectionMade is sent at once."""
        protocol = self._build_protocol()
        if protocol is None:
            return
        self.protocol = protocol
        self.reactor.addReader(self._stage or self)
        self._corked = True
        try:
            protocol.makeConnection(self)
        except BaseException:
            self._protocol_failed("connectionMade")
        else:
            self._flush()

    def _build_protocol(self) -> Any:
        """Return a protocol built by the factory. If the factory returns none or fails, end the connection."""
        factory = self.port.factory
        try:
            protocol = factory.buildProtocol(self._peer)
        except BaseException:
            self._factory_failed(factory)
            return None
        if protocol is None:
            self._give_up(DONE)
        return protocol

    def _factory_failed(self, factory: Any) -> None:
        """Log an exception of buildProtocol, and end the connection.

        Not in `_build_protocol`: its frame is in the traceback, and a variable there that refers to the Failure would
        be a reference cycle.
        """
        reason = Failure()
        FACTORY_FAILED.failure(_log, reason, factory=log_prefix(factory), method="buildProtocol")
        self._give_up(reason)

    # --- reading ---

    def doRead(self) -> Any:
        """Read once for each event, so that every connection has its turn.

        Returns None, or the exception that ends the connection, as Twisted's reactors expect.
        """
        try:
            data = self._recv(BUFFER_SIZE)
        except OSError as problem:
            return self._not_read(problem)
        if not data:
            self.peer_finished = True
            return main.CONNECTION_DONE
        self.bytes_in += len(data)
        self._corked = True
        try:
            self.protocol.dataReceived(data)
        except BaseException:
            self._protocol_failed("dataReceived")
            return None
        if self._out or self._once_sent:
            self._flush()
        else:
            self._corked = False
        return None

    def _not_read(self, problem: Exception) -> Any:
        """Return the result of doRead after recv() failed."""
        if isinstance(problem, BlockingIOError):
            return None
        # The traceback refers to a frame that refers to this connection: a reference cycle.
        self.error = problem.with_traceback(None)
        return main.CONNECTION_LOST

    def readConnectionLost(self, reason: Failure) -> None:
        """Handle the peer's FIN. Called by the reactor."""
        if self.disconnected:
            return
        if not self.peer_finished:
            # Twisted treats a socket error that is reported before any input as a clean end.
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self.error = OSError(code, os.strerror(code))
                self.connectionLost(LOST)
                return
        self._corked = True
        protocol = IHalfCloseableProtocol(self.protocol, None)
        if protocol is not None:
            try:
                protocol.readConnectionLost()
            except BaseException:
                self._protocol_failed("readConnectionLost")
                return
        else:
            # Twisted would drop unsent output. Here it is sent first, but the producer is stopped.
            self._stop_producer()
            self.disconnecting = self._once_sent = True
        self._flush()

    # --- writing ---

    def write(self, data: bytes) -> None:
        if type(data) is not bytes:
            data = _as_bytes(data)
        if not data or not self._writable:
            if data and self._stage is not None:
                self._stage.write(data)
            return
        self._out.append(data)
        self._unsent += len(data)
        if not self._corked:  # `_flush_soon`, inlined for a fan-out to many connections
            self._corked = True
            if not self._waiting:
                write_soon = self.port.write_soon
                if write_soon is not None:
                    write_soon(self)
                else:
                    self._wait_until_writable()
        # A transport registered as its own producer is paused after the flush, when the kernel accepted less.
        if self._unsent > BUFFER_SIZE and self.producer is not self:
            self._pause_producer()

    def writeSequence(self, data: Any) -> None:
        self.write(joined(data))

    def _write_to_socket(self, data: bytes) -> None:
        """Write bytes that the TLS layer has encrypted. Plaintext goes from `write` to the stage."""
        if data and self._sending:
            self._out.append(data)
            self._unsent += len(data)
            self._flush_soon()
            if self._unsent > BUFFER_SIZE and self.producer is not self:
                self._pause_producer()

    def _flush_soon(self) -> None:
        """Schedule a flush, unless one is due."""
        if not self._corked:
            self._corked = True
            if not self._waiting:
                write_soon = self.port.write_soon
                if write_soon is not None:
                    write_soon(self)
                else:
                    self._wait_until_writable()

    def _wait_until_writable(self) -> None:
        self._corked = self._waiting = True
        self.reactor.addWriter(self._stage or self)

    def _flush(self) -> None:
        """Send unsent output with one system call. When all is sent, run the pending action."""
        if self._stage is not None and self._stage.sends:
            self._stage.flush()
            return
        out = self._out
        if out:
            unsent = self._unsent
            piece = out[0]
            if len(piece) != unsent:
                piece = self._first_pieces()
            try:
                sent = self._send(piece)
            except OSError as problem:
                if not would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            if sent != unsent:
                self._sent_some(piece, sent)
                return
            self.bytes_out += sent
            self._unsent = 0
            out.clear()
            self._corked = False
            if self._once_sent:
                self._all_sent()
        else:
            self._corked = False
            if self._once_sent:
                self._finish()

    def _first_pieces(self) -> bytes | memoryview:
        """Join the first pieces, up to JOIN_LIMIT bytes, and return them."""
        out = self._out
        count, size = 1, len(out[0])
        while count < len(out) and size + len(out[count]) <= JOIN_LIMIT:
            size += len(out[count])
            count += 1
        if count > 1:
            out[:count] = [b"".join(out[:count])]
        return out[0]

    def _lost(self, problem: OSError) -> None:
        """End the connection after a failed send()."""
        self.error = problem.with_traceback(None)
        self.connectionLost(LOST)

    def _sent_some(self, piece: bytes | memoryview, sent: int) -> None:
        """Keep the part of the first piece that the kernel did not accept, and wait for writability."""
        self.bytes_out += sent
        self._unsent -= sent
        if sent == len(piece):
            del self._out[0]
        elif sent:
            self._out[0] = memoryview(piece)[sent:]
        if not self._waiting:
            self._wait_until_writable()
        if self._unsent > BUFFER_SIZE:
            self._pause_producer()

    def _pause_producer(self) -> None:
        if self.producer is not None and self.streaming_producer and not self.producer_paused:
            self.producer_paused = self._once_sent = True
            self.producer.pauseProducing()

    def _all_sent(self) -> None:
        """Resume the producer if it is paused or a pull producer; otherwise run the pending action."""
        if self.producer is self and self.disconnecting:
            self.producer = None  # reading has stopped, so it produces nothing more
        if self.producer is not None and (self.producer_paused or not self.streaming_producer):
            self.producer_paused = False
            self._once_sent = self.disconnecting or self._write_closing or not self.streaming_producer
            self.producer.resumeProducing()
        else:
            self._finish()

    def _finish(self) -> None:
        if self.producer is not None and not self.streaming_producer:
            return  # a pull producer unregisters when it has finished
        self._once_sent = False
        if self.disconnecting:
            self._close()
        elif self._write_closing and self._shut_down_writing():
            self._writable = self._sending = self._write_closing = False
            protocol = IHalfCloseableProtocol(self.protocol, None)
            if protocol is not None:
                try:
                    protocol.writeConnectionLost()
                except BaseException:
                    self._protocol_failed("writeConnectionLost")

    def doWrite(self) -> Any:
        """Send unsent output: the socket is writable, or very likely is. Called by the reactor."""
        if self._stage is not None:  # it began after this call was requested, or in the same event
            return self._stage.doWrite()
        if not self.disconnected:
            out = self._out
            if len(out) == 1 and not self._once_sent and not self._waiting:
                # `_flush` of one piece, inlined for a fan-out to many connections.
                try:
                    sent = self._send(out[0])
                except OSError as problem:
                    if not would_block(problem):
                        self._lost(problem)
                        return None
                    sent = 0
                if sent == self._unsent:
                    self.bytes_out += sent
                    self._unsent = 0
                    out.clear()
                    self._corked = False
                else:
                    self._sent_some(out[0], sent)
                return None
            self._flush()
            if self._waiting and not self._corked and not self.disconnected:
                self._stop_waiting()
        return None

    def _stop_waiting_if_sent(self) -> None:
        if not self._corked and not self.disconnected:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self.reactor.removeWriter(self._stage or self)

    def _close(self) -> None:
        """Close the socket, or linger if closing now could destroy the last output."""
        if self._stage is not None and not self._stage.finish_output():
            return
        if self.peer_finished:
            self.connectionLost(DONE)
            return
        in_flight = self._in_flight()  # before FIN, which counts as a byte
        # FIN is sent before the check for unread input: a peer that has FIN has all output, and a reset for input
        # after that does no harm.
        with contextlib.suppress(OSError):  # the peer is gone
            self.socket.shutdown(socket.SHUT_WR)
        if self._at_risk(in_flight):
            self.port.linger(self)
        else:
            self.connectionLost(DONE)

    def _at_risk(self, in_flight: int) -> bool:
        """Return whether closing now could send a reset that destroys the last output.

        The kernel sends a reset if input is unread or arrives after close() (RFC 9293, section 3.10.4; RFC 1122,
        section 4.2.2.13), and discards unacknowledged output.
        """
        try:
            if self.socket.recv(1, socket.MSG_PEEK):
                return True
        except BlockingIOError:
            return in_flight > 0
        except OSError:  # the peer is gone
            pass
        return False

    def _in_flight(self) -> int:
        """Return the number of sent bytes that the peer has not acknowledged: SIOCOUTQ of tcp(7) and unix(7)."""
        queued = bytearray(4)
        try:
            fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, queued)
        except OSError:  # not Linux
            return 0
        return int.from_bytes(queued, sys.byteorder)

    def _shut_down_writing(self) -> bool:
        """Send FIN. Returns False if the stage must send more first; then this is called again."""
        if self._stage is not None and not self._stage.finish_output():
            return False
        with contextlib.suppress(OSError):  # the peer is gone; the next read reports it
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def writeConnectionLost(self, reason: Failure) -> None:
        """End the connection. Required by IHalfCloseableDescriptor; the write side is never lost alone."""
        self.connectionLost(reason)

    # --- the end ---

    # `below`, here and in the methods for producers, is for a TLS layer whose transport is the connection: the call
    # does not go through the stage.

    def loseConnection(self, *, below: bool = False) -> None:
        """Close once all written output is sent and the producer, if any, has unregistered."""
        if self.connected and not self.disconnecting:
            stage = self._stage
            if stage is None:
                self.reactor.removeReader(self)
            elif below or stage.may_close():
                self.reactor.removeReader(stage)
            else:
                return
            self.disconnecting = self._once_sent = True
            if not self._corked:
                self._flush_soon()

    def loseWriteConnection(self) -> None:
        """Send FIN once all written output is sent. Reading continues."""
        if self._sending and not self._write_closing:
            self._write_closing = self._once_sent = True
            self._flush_soon()

    def abortConnection(self) -> None:
        """Close at once with a reset, and drop unsent output. The protocol's connectionLost is called later."""
        if self.disconnected or self._aborting:
            return
        self._aborting = self.disconnecting = True
        self._writable = self._sending = self._once_sent = False
        self._out.clear()
        self._unsent = 0
        stage = self._stage
        if stage is not None:
            stage.drop_output()
        self.reactor.removeReader(stage or self)
        self.reactor.removeWriter(stage or self)
        self.reactor.callLater(0, self.connectionLost, Failure(error.ConnectionAborted()))

    def close(self, reason: str) -> None:
        """Close once all written output is sent. `reason`, one of a few fixed texts, is logged.

        Unlike loseConnection, this does not wait for a producer: it is stopped.
        """
        if self.disconnected:
            return
        self.error = LocalClose(reason)
        self._stop_producer()
        if self.disconnecting:  # loseConnection may have waited for the producer
            self._flush_soon()
        else:
            self.loseConnection()
        if self._stage is not None:
            self._stage.closing()

    def abort(self, reason: str) -> None:
        """Close at once with a reset, as abortConnection does. `reason`, one of a few fixed texts, is logged."""
        if self.disconnected:
            return
        self.error = LocalClose(reason)
        self.abortConnection()

    def refuse(self) -> None:
        """Close a connection at accept(), or once a PROXY header names the peer. The port's `closed` is not called."""
        self.disconnected = True
        self.connected = self._writable = self._sending = False
        stage = self._stage
        self.reactor.removeReader(stage or self)
        self._stage = None
        if stage is not None:
            stage.stop()
        self.socket.close()

    @property
    def unsent(self) -> int:
        """Number of written bytes that are not yet passed to the kernel."""
        return self._unsent

    def _protocol_failed(self, method: str) -> None:
        """Log an exception that a protocol raised, and end its connection. Other connections continue."""
        reason = Failure()
        self._log_protocol_failure(self.protocol, method, reason)
        self._give_up(reason)

    def _log_protocol_failure(self, protocol: Any, method: str, reason: Failure) -> None:
        PROTOCOL_FAILED.failure(
            _log,
            reason,
            protocol=log_prefix(protocol),
            method=method,
            peer=peer_name(self._peer),
            listener=self.port.name,
        )

    def _failed(self) -> None:
        """Log an exception, usually of a producer, and end the connection, as the reactor does for doRead."""
        reason = Failure()
        CONNECTION_FAILED.failure(_log, reason, peer=peer_name(self._peer), listener=self.port.name)
        self.connectionLost(reason)

    def _give_up(self, reason: Failure) -> None:
        """End the connection after an error of its factory or protocol."""
        if self._stage is None:
            self.connectionLost(reason)
        else:
            self._stage.give_up(reason)

    def connectionLost(self, reason: Failure) -> None:
        """End the connection. All ends pass through here, including those that the reactor causes."""
        if self.disconnected:
            return
        self.disconnected = True
        self.connected = self._writable = self._sending = self._once_sent = False
        descriptor: Any = self
        stage = self._stage
        if stage is not None:
            stage.stop()
            reason = stage.ended(reason)
            descriptor = stage
        if self.producer is not None:
            self._stop_producer()
        self.reactor.removeReader(descriptor)
        if self._waiting:
            self.reactor.removeWriter(descriptor)
        if stage is not None:
            self._stage = None  # breaks a reference cycle
        self._out.clear()
        try:
            if isinstance(reason.value, error.ConnectionAborted):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.socket.close()
        except OSError:  # reset by the peer meanwhile
            pass
        # Breaks the reference cycle of connection and protocol. The protocol keeps its transport.
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            try:
                protocol.connectionLost(reason)
            except BaseException:
                self._log_protocol_failure(protocol, "connectionLost", Failure())
        self.port.connection_closed(self, reason)

    # --- producers and consumers ---

    def _stop_producer(self) -> None:
        producer, self.producer = self.producer, None
        if producer is not None and producer is not self:
            try:
                producer.stopProducing()
            except BaseException:
                PRODUCER_FAILED.failure(_log, peer=peer_name(self._peer), listener=self.port.name)

    def registerProducer(self, producer: Any, streaming: bool, *, below: bool = False) -> None:
        if self._stage is not None and not below and not self._stage.may_register(producer, streaming):
            return
        if self.producer is not None:
            raise RuntimeError(f"cannot register producer {producer!r}: {self.producer!r} was never unregistered")
        if self.disconnected:
            producer.stopProducing()
            return
        self.producer = producer
        self.streaming_producer = bool(streaming)
        self.producer_paused = False
        if not streaming:
            self._once_sent = True
            producer.resumeProducing()

    def unregisterProducer(self, *, below: bool = False) -> None:
        if self._stage is not None and not below and not self._stage.may_unregister():
            return
        self.producer = None
        if self._once_sent:
            self._flush_soon()

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    def pauseProducing(self) -> None:
        if self._stage is None:
            self.reactor.removeReader(self)
        else:
            self._stage.pause()

    def resumeProducing(self) -> None:
        if self._stage is not None:
            self._stage.resume()
        elif self._may_read:
            self.reactor.addReader(self)

    @property
    def _may_read(self) -> bool:
        return self.connected and not self.disconnecting and not self.peer_finished

    def stopProducing(self) -> None:
        self.loseConnection()

    # Public methods of Twisted's descriptors that protocols use.
    stopReading = pauseProducing
    startReading = resumeProducing

    # --- TLS ---

    def startTLS(self, contextFactory: Any, normal: bool = True) -> None:
        """Begin TLS on this connection. Output written before is sent in plaintext.

        `contextFactory` is an `ssl.SSLContext`, or a context factory of Twisted's TLS (with pyOpenSSL). With `normal`,
        this side is the server of the handshake. Raises ValueError for a context of the other side, ImportError for a
        context factory without pyOpenSSL, and RuntimeError if TLS has begun before or the connection is closing.
        """
        if self._tls is not None:
            raise RuntimeError("this connection is in TLS already")
        if self.phase is CLOSING:
            raise RuntimeError("this connection is closing")
        self.port.start_tls(self, contextFactory, server_side=normal)

    @property
    def _facts(self) -> TLSFacts:
        if self._tls is None:
            raise AttributeError("this connection is not in TLS")
        return self._tls

    # The following attributes exist only in TLS. They are None until the handshake is done. With `ssl` they are still
    # available in connectionLost.

    @property
    def getPeerCertificate(self) -> Callable[[], Any]:
        """The peer's certificate: the dict of `ssl.SSLObject.getpeercert`, or pyOpenSSL's X509; None without one.

        With `ssl`, a certificate with a name that is not UTF-8 has only an empty `subject`.

        `getHandle()` returns the SSLObject, which has more (the certificate as DER, the chain).
        """
        facts = self._facts
        return lambda: facts.peer_certificate

    @property
    def negotiatedProtocol(self) -> bytes | None:
        """The protocol that ALPN chose (RFC 7301), or None."""
        return self._facts.negotiated_protocol

    @property
    def tls_version(self) -> str | None:
        """`TLSv1.3` or `TLSv1.2`."""
        return self._facts.version

    @property
    def tls_cipher(self) -> str | None:
        """OpenSSL's name of the negotiated cipher suite, such as `TLS_AES_256_GCM_SHA384`."""
        return self._facts.cipher

    # --- addresses, handle and socket options ---

    def getPeer(self) -> Any:
        return self._peer

    def getHost(self) -> Any:
        if self.proxied is not None and self.proxied.destination is not None:
            return self.proxied.destination
        return address_of(self.socket.getsockname())

    def getHandle(self) -> Any:
        """Return the socket, or once TLS is established, the `ssl.SSLObject` or pyOpenSSL's Connection."""
        facts = self._tls
        return self.socket if facts is None or facts is TLS_PENDING else facts.handle

    def getTcpNoDelay(self) -> bool:
        if self.socket.family == socket.AF_UNIX:
            return False
        return bool(self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    def setTcpNoDelay(self, enabled: bool) -> None:
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, enabled)

    def getTcpKeepAlive(self) -> bool:
        return bool(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: bool) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, enabled)

    @property
    def log_fields(self) -> dict[str, object]:
        """Fields of a log record about this connection (`rtservice.interfaces.ConnectionLogger`)."""
        return {"connection": self.number, "peer": peer_name(self._peer), "listener": self.port.name}

    def logPrefix(self) -> str:
        host = getattr(self._peer, "host", "unix")
        return f"{log_prefix(self.protocol)},{self.number},{host}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} #{self.number} of {self._peer} on {self.port.name}>"


# The interfaces that a connection provides: an attribute of each object, since TLS changes them.
_PROVIDED = implementedBy(Connection)
_PROVIDED_IN_TLS = Provides(Connection, interfaces.ISSLTransport, interfaces.INegotiated)


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, bytes | bytearray | memoryview):  # a copy: the caller may change a buffer before it is sent
        return bytes(data)
    raise TypeError("Data must be bytes")  # Twisted's text


def joined(pieces: Any) -> bytes:
    """Join pieces of data. Raises TypeError as Twisted does, if one is not bytes."""
    try:
        return b"".join(pieces)
    except TypeError:
        raise TypeError("Data must be bytes") from None
