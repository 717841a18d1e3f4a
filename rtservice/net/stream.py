"""Stream connections: `Port` adopts a listening socket and accepts; `Connection` is the transport of one peer."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any

from twisted.internet import error, interfaces, main
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IHalfCloseableProtocol, ILoggingContext
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

Address = IPv4Address | IPv6Address | UNIXAddress

# A protocol's producer is paused while more than this many bytes are unsent. Twisted's number, and the size of a read.
BUFFER_SIZE = 64 * 1024

# Pieces up to this many bytes are joined before they are sent: about what a kernel takes at once from a fast reader.
# More would copy bytes that the kernel then refuses.
JOIN_LIMIT = 256 * 1024

# Connections accepted per event. Enough to empty a burst quickly; few enough that open connections are served between.
ACCEPTS_PER_EVENT = 64

# Why accept() can fail for one connection while the listener is fine (accept(2): "treat them like EAGAIN by
# retrying"; EPERM is a firewall's refusal).
_ACCEPT_SKIPS = frozenset(
    (
        errno.ECONNABORTED,
        errno.EPERM,
        errno.EPROTO,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EOPNOTSUPP,
        errno.ETIMEDOUT,
        getattr(errno, "ENONET", errno.EHOSTDOWN),
    )
)

# Why accept() can fail for want of something that this process or the host has run out of.
_ACCEPT_SHORTAGES = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

# How long the listener rests after such a shortage, in seconds: its socket stays readable, and would spin.
_SHORTAGE_PAUSE = 0.5

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, 0 seconds

_log = Logger()


def _log_prefix(thing: object) -> str:
    """What the log shows for a protocol or factory, by Twisted's rule."""
    if ILoggingContext.providedBy(thing):
        return str(thing.logPrefix())
    return type(thing).__name__


@implementer(
    interfaces.ITCPTransport,
    interfaces.ISystemHandle,
    interfaces.IConsumer,
    interfaces.IPushProducer,
    interfaces.IReadWriteDescriptor,
    interfaces.IHalfCloseableDescriptor,
    interfaces.ILoggingContext,
)
class Connection:
    """The transport of one accepted connection, TCP or UNIX, with Twisted's contract.

    What differs from Twisted's own: writes made while an event of this connection is handled are joined and sent with
    one system call right after it, and the reactor is asked to watch for writability only when the kernel took less.
    A peer that finished sending gets all that was written before its connection is closed, also when its protocol
    knows nothing of half-close.

    `bytes_in` and `bytes_out` count what was read from and given to the kernel; `opened` is a `time.monotonic`.
    After the end, `error` is the OSError that ended it, if one did.
    """

    __slots__ = (
        "__weakref__",
        "_aborting",
        "_corked",
        "_offset",
        "_out",
        "_peer",
        "_recv",
        "_send",
        "_unsent",
        "_write_closed",
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
        "port",
        "producer",
        "producer_paused",
        "protocol",
        "reactor",
        "socket",
        "streaming_producer",
    )

    def __init__(self, reactor: Any, sock: socket.socket, port: Port, peer: Address, number: int) -> None:
        self.reactor = reactor
        self.socket = sock
        self.port = port
        self.number = number
        self._peer = peer
        # Bound once: three look-ups less for each message.
        self.fileno = sock.fileno
        self._recv = sock.recv
        self._send = sock.send
        self._out: list[bytes | memoryview] = []  # what is unsent
        self._offset = 0  # how much of the first piece is sent
        self._unsent = 0
        self._corked = False  # a flush will follow without anybody asking for it
        self._aborting = False
        self._write_closing = False
        self._write_closed = False
        self.connected = True
        self.disconnected = False
        self.disconnecting = False
        self.peer_finished = False
        self.producer: Any = None
        self.producer_paused = False
        self.streaming_producer = False
        self.protocol: Any = None
        self.bytes_in = 0
        self.bytes_out = 0
        self.opened = monotonic()
        self.error: OSError | None = None

    def open(self, protocol: Any) -> None:
        """Connect the protocol; from now on it is served. What it writes in connectionMade is sent at once."""
        self.protocol = protocol
        self.reactor.addReader(self)
        self._corked = True
        try:
            protocol.makeConnection(self)
        except BaseException:
            self._protocol_failed("connectionMade")
        else:
            self._end_of_event()

    # --- reading ---

    def doRead(self) -> Any:
        """One read for each event, however much there is: so every connection has its turn.

        Returns the exception that ended the connection, if one did, as Twisted's reactors take it.
        """
        try:
            data = self._recv(BUFFER_SIZE)
        except BlockingIOError:
            return None
        except OSError as problem:
            self.error = problem
            return main.CONNECTION_LOST
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
        if self._out or self.disconnecting or self._write_closing:
            self._end_of_event()
        else:
            self._corked = False
        return None

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer has finished sending. Called by the reactor."""
        if self.disconnected:
            return
        protocol = IHalfCloseableProtocol(self.protocol, None)
        if protocol is not None:
            self._corked = True
            try:
                protocol.readConnectionLost()
            except BaseException:
                self._protocol_failed("readConnectionLost")
                return
        else:
            # Twisted would drop what is unsent; here it is sent first, but nothing more is produced.
            self._stop_producer()
            self.disconnecting = True
        self._end_of_event()

    # --- writing ---

    def write(self, data: bytes) -> None:
        if not isinstance(data, bytes):
            data = _as_bytes(data)
        if not data or self._write_closed or not self.connected:
            return
        self._out.append(data)
        self._unsent += len(data)
        if not self._corked:
            self._corked = True
            self.reactor.addWriter(self)
        # A transport that is its own producer is looked after when the flush shows what the kernel refused.
        if self._unsent > BUFFER_SIZE and self.producer is not None and self.producer is not self:
            self._pause_producer()

    def writeSequence(self, data: Any) -> None:
        self.write(b"".join(data))

    def _pause_producer(self) -> None:
        if self.streaming_producer and not self.producer_paused:
            self.producer_paused = True
            self.producer.pauseProducing()

    def _end_of_event(self) -> None:
        """Send what the event left to send, and close if it asked for that."""
        why = self._flush()
        if why is not None:
            self.connectionLost(Failure(why))
        elif self._unsent:
            self._corked = True
            self.reactor.addWriter(self)

    def _flush(self) -> Exception | None:
        """One send. Returns why the connection is over, if it is."""
        if self.disconnected or self._aborting:
            return None
        self._corked = False
        out = self._out
        if out:
            if len(out) > 1:
                self._join()
            piece = out[0]
            if self._offset:
                piece = memoryview(piece)[self._offset :]
            try:
                sent = self._send(piece)
            except BlockingIOError:
                sent = 0
            except OSError as problem:
                if problem.errno == errno.ENOBUFS:
                    sent = 0
                else:
                    self.error = problem
                    return main.CONNECTION_LOST
            self.bytes_out += sent
            self._unsent -= sent
            if sent == len(piece):
                del out[0]
                self._offset = 0
            else:
                self._offset += sent
            if out:
                if self._unsent > BUFFER_SIZE and self.producer is not None:
                    self._pause_producer()
                return None
        # All is sent.
        if self.producer is not None and (self.producer_paused or not self.streaming_producer):
            # What the producer writes now goes out with the next event.
            self.producer_paused = False
            self.producer.resumeProducing()
            return None
        if self.disconnecting:
            return main.CONNECTION_DONE
        if self._write_closing and not self._write_closed:
            self._close_write()
        return None

    def _join(self) -> None:
        """Make one piece of as many of the first pieces as are worth sending together."""
        out = self._out
        if self._unsent <= JOIN_LIMIT:
            count = len(out)
        else:
            count, size = 1, len(out[0]) - self._offset
            while count < len(out) and size + len(out[count]) <= JOIN_LIMIT:
                size += len(out[count])
                count += 1
            if count == 1:
                return
        if self._offset:
            out[0] = memoryview(out[0])[self._offset :]
            self._offset = 0
        out[:count] = [b"".join(out[:count])]

    def doWrite(self) -> Any:
        """The kernel takes bytes again. Called by the reactor."""
        if self.disconnected or self._aborting:
            return None
        why = self._flush()
        if why is None and not self.disconnected:
            if self._unsent:
                self._corked = True
            elif not self._corked:
                self.reactor.removeWriter(self)
        return why

    def _close_write(self) -> None:
        self._write_closed = True
        with contextlib.suppress(OSError):  # the peer is gone, which reading will tell
            self.socket.shutdown(socket.SHUT_WR)
        protocol = IHalfCloseableProtocol(self.protocol, None)
        if protocol is not None:
            try:
                protocol.writeConnectionLost()
            except BaseException:
                self._protocol_failed("writeConnectionLost")

    def writeConnectionLost(self, reason: Failure) -> None:
        """IHalfCloseableDescriptor's; our own write side is never lost without the connection."""
        self.connectionLost(reason)

    # --- the end ---

    def loseConnection(self) -> None:
        """Close once everything written is sent, and the producer, if there is one, has unregistered."""
        if self.connected and not self.disconnecting:
            self.reactor.removeReader(self)
            self.disconnecting = True
            self._flush_soon()

    def loseWriteConnection(self) -> None:
        """Send FIN once everything written is sent; reading goes on."""
        if self.connected and not self._write_closing:
            self._write_closing = True
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._corked:
            self._corked = True
            self.reactor.addWriter(self)

    def abortConnection(self) -> None:
        """Close at once with a reset; what is unsent is dropped. The protocol hears of it in a later event."""
        if self.disconnected or self._aborting:
            return
        self._aborting = True
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self.reactor.callLater(0, self.connectionLost, Failure(error.ConnectionAborted()))

    def _protocol_failed(self, method: str) -> None:
        """A protocol that raises loses its own connection, and nobody else notices."""
        reason = Failure()
        _log.failure("{protocol} failed in {method}", reason, protocol=_log_prefix(self.protocol), method=method)
        self.connectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        """The one end of every connection. Called by the reactor too."""
        if self.disconnected:
            return
        self.disconnected = True
        self.connected = False
        self._stop_producer()
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self._out.clear()
        try:
            if reason.check(error.ConnectionAborted):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.socket.close()
        except OSError:  # the connection was reset under our hands
            pass
        # References that would make a cycle of connection and protocol; the protocol keeps its transport.
        protocol, self.protocol = self.protocol, None
        try:
            protocol.connectionLost(reason)
        except BaseException:
            _log.failure("{protocol} failed in connectionLost", protocol=_log_prefix(protocol))
        self.port.connection_closed(self, reason)

    # --- producers and consumers ---

    def _stop_producer(self) -> None:
        producer, self.producer = self.producer, None
        if producer is not None and producer is not self:
            try:
                producer.stopProducing()
            except BaseException:
                _log.failure("a producer failed in stopProducing")

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        if self.producer is not None:
            raise RuntimeError(f"cannot register producer {producer!r}: {self.producer!r} was never unregistered")
        if self.disconnected:
            producer.stopProducing()
            return
        self.producer = producer
        self.streaming_producer = bool(streaming)
        self.producer_paused = False
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        if self.connected and self.disconnecting:
            self._flush_soon()

    def stopConsuming(self) -> None:
        self.unregisterProducer()
        self.loseConnection()

    def pauseProducing(self) -> None:
        self.reactor.removeReader(self)

    def resumeProducing(self) -> None:
        if self.connected and not self.disconnecting and not self.peer_finished:
            self.reactor.addReader(self)

    def stopProducing(self) -> None:
        self.loseConnection()

    # Twisted's descriptors have these as public methods, and protocols use them.
    stopReading = pauseProducing
    startReading = resumeProducing

    # --- who and what ---

    def getPeer(self) -> Any:
        return self._peer

    def getHost(self) -> Any:
        return self.port.address_of(self.socket.getsockname())

    def getHandle(self) -> socket.socket:
        return self.socket

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

    def logPrefix(self) -> str:
        host = getattr(self._peer, "host", "unix")
        return f"{_log_prefix(self.protocol)},{self.number},{host}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} #{self.number} of {self._peer} on {self.port.name}>"


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, bytearray | memoryview):  # a copy: the caller may change its buffer before it is sent
        return bytes(data)
    raise TypeError(f"data must be bytes, not {type(data).__name__}")


@implementer(interfaces.IListeningPort, interfaces.IReadDescriptor, interfaces.ILoggingContext)
class Port:
    """Accepts connections from a bound, listening, non-blocking socket that somebody else made and closes.

    `name` is what logs call it. `opened` is called with each Connection before its protocol is, `closed` with each
    one and the Failure that ended it, after its protocol was.
    """

    def __init__(
        self,
        reactor: Any,
        sock: socket.socket,
        factory: Any,
        *,
        name: str,
        opened: Callable[[Connection], None] = lambda connection: None,
        closed: Callable[[Connection, Failure], None] = lambda connection, reason: None,
    ) -> None:
        self.reactor = reactor
        self.socket = sock
        self.factory = factory
        self.name = name
        self.connection_opened = opened
        self.connection_closed = closed
        self.fileno = sock.fileno
        self.listening = False
        self._number = 0
        self._resting: Any = None  # the delayed call that ends a pause
        self._shortage = 0  # the errno of a shortage that is already logged

    def startListening(self) -> None:
        """Start to accept; the factory is started."""
        if self.socket.family != socket.AF_UNIX:
            _tune_tcp(self.socket)
        self.factory.doStart()
        self.listening = True
        self.reactor.addReader(self)

    def stopListening(self) -> Deferred[None]:
        """Stop to accept; the factory is stopped. The socket stays open: it is its maker's to close."""
        if self.listening:
            self.listening = False
            self.reactor.removeReader(self)
            if self._resting is not None:
                self._resting.cancel()
                self._resting = None
            self.factory.doStop()
        return succeed(None)

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor, at its own end or when the socket is broken."""
        self.stopListening()

    def doRead(self) -> None:
        accept = self.socket.accept
        for _ in range(ACCEPTS_PER_EVENT):
            try:
                sock, address = accept()
            except BlockingIOError:
                return
            except OSError as problem:
                if problem.errno in _ACCEPT_SKIPS:
                    continue
                if problem.errno in _ACCEPT_SHORTAGES:
                    self._rest(problem)
                    return
                raise
            self._shortage = 0
            self._accepted(sock, address)
            if not self.listening:  # a protocol stopped us
                return

    def _accepted(self, sock: socket.socket, address: Any) -> None:
        sock.setblocking(False)
        peer = self.address_of(address)
        try:
            protocol = self.factory.buildProtocol(peer)
        except BaseException:
            _log.failure("{factory} failed in buildProtocol", factory=_log_prefix(self.factory))
            sock.close()
            return
        if protocol is None:
            sock.close()
            return
        self._number += 1
        connection = Connection(self.reactor, sock, self, peer, self._number)
        self.connection_opened(connection)
        connection.open(protocol)

    def _rest(self, problem: OSError) -> None:
        """Leave the queue to the kernel for a while; open connections go on."""
        if problem.errno != self._shortage:
            self._shortage = problem.errno or 0
            _log.error("{listener} accepts nobody for now: {problem}", listener=self.name, problem=problem.strerror)
        self.reactor.removeReader(self)
        self._resting = self.reactor.callLater(_SHORTAGE_PAUSE, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self.reactor.addReader(self)

    def address_of(self, address: Any) -> Address:
        """What accept() or getsockname() gives, as Twisted's address."""
        if isinstance(address, tuple):
            if len(address) == 2:
                return IPv4Address("TCP", *address)
            if address[3]:  # link-local: only with its interface does the address say where it is
                host = socket.getnameinfo(address, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]
                return IPv6Address("TCP", host, *address[1:])
            return IPv6Address("TCP", *address)
        return UNIXAddress(address or None)

    def getHost(self) -> Address:
        return self.address_of(self.socket.getsockname())

    def logPrefix(self) -> str:
        return _log_prefix(self.factory)

    def __repr__(self) -> str:
        return f"<Port {self.name} of {_log_prefix(self.factory)}>"


def _tune_tcp(sock: socket.socket) -> None:
    """Set what accepted connections inherit on Linux, so that none of it costs a system call for each."""
    # Writes of one event are joined already; Nagle would only hold back the answer until the last one is acknowledged.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer that vanished without FIN is found after 2 + 4 x 0.5 minutes instead of never; a probe every two minutes is
    # also below the idle limits of common NATs and load balancers.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
