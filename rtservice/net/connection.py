"""`Connection`: the transport of one accepted connection."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import ssl
import struct
import sys
import termios
from collections.abc import Callable
from time import monotonic
from typing import Any, ClassVar, Protocol

from twisted.internet import error, interfaces, main
from twisted.internet.interfaces import IHalfCloseableProtocol, ILoggingContext
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.net.address import Address, address_of, peer_name
from rtservice.net.client_hello import Refusal
from rtservice.net.expensive import may_be_expensive, shake_in_thread
from rtservice.net.proxy import BEGINNING, Header, ProxyError, parse
from rtservice.net.tls import alpn_gate, check_resumed
from rtservice.net.tls_bounds import (
    ANSWER_TIMEOUT,
    ANSWERS_NOT_READ,
    FIRST_READ,
    FULL_READ,
    HANDSHAKE_TOO_LARGE,
    MAX_BYTES_WITHOUT_DATA,
    MAX_HANDSHAKE_BYTES,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from rtservice.net.tls_stream import RECORD_SIZE, SEAL_SIZE, TLSStream

# A protocol's producer is paused while more than this many bytes are unsent. Twisted's number, and the size of a read.
BUFFER_SIZE = 64 * 1024

# Pieces up to this many bytes are joined before they are sent: about what a kernel takes at once from a fast reader.
# More would copy bytes that the kernel then refuses.
JOIN_LIMIT = 256 * 1024

# How much is looked at for a PROXY header at a time: a header without TLVs, and the first data of most protocols.
_PROXY_PEEK = 1024

# A closed connection whose output is still under way is kept for as long as something moves within each of these many
# seconds, and for this many of them at the most.
_LINGER_STEP, _LINGER_STEPS = 1.0, 30

# Made once, as Twisted's reactors do: a Failure of one's own for each connection costs more than its greeting.
_DONE = Failure(main.CONNECTION_DONE)
_LOST = Failure(main.CONNECTION_LOST)

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, 0 seconds

_log = Logger()


class Ended(Exception):  # noqa: N818  # a reason, and no error
    """Why we ended a connection ourselves. The text is one of a fixed few, and none of the peer's bytes."""


class Acceptor(Protocol):
    """What a connection needs of the `rtservice.net.port.Port` that accepted it."""

    name: str
    factory: Any
    tls: Any
    handshake_timeout: float
    first_phase: type[Connection]
    write_soon: Callable[[Any], None] | None

    @property
    def connection_identified(self) -> Callable[[Connection], None]: ...

    @property
    def connection_closed(self) -> Callable[[Connection, Failure], None]: ...


def log_prefix(thing: object) -> str:
    """What the log shows for a protocol or factory, by Twisted's rule."""
    if ILoggingContext.providedBy(thing):
        with contextlib.suppress(Exception):  # it may be asked for what failed to become itself
            return str(thing.logPrefix())
    return type(thing).__name__


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

    What differs from Twisted's own: writes made while an event of this connection is handled are joined and sent with
    one system call right after it, and the reactor is asked to watch for writability only when the kernel took less.
    A peer that finished sending gets all that was written before its connection is closed, also when its protocol
    knows nothing of half-close.

    `bytes_in` and `bytes_out` count what was read from and given to the kernel; `opened` is a `time.monotonic`.
    `proxied` is the PROXY header that came before everything else, if the listener expects one.
    After the end, `error` is what ended it, if something did: an OSError, a ProxyError or Ended.

    `seen` and `still_since` are for whoever looks for idle connections: bytes moved, and since when they have not.
    """

    # Where it stands in its life: `proxy`, `tls`, `open` or `closing`. Each is a class, so that no event has to ask.
    phase: ClassVar[str] = "open"

    __slots__ = (
        "__weakref__",
        "_aborting",
        "_corked",
        "_deadline",
        "_offset",
        "_once_sent",
        "_out",
        "_peer",
        "_phase_state",
        "_recv",
        "_send",
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

    def __init__(self, reactor: Any, sock: socket.socket, port: Acceptor, peer: Address, number: int) -> None:
        self.reactor = reactor
        self.port = port
        self.number = number
        self._peer = peer
        self.socket = sock
        # Bound once: three look-ups less for each message.
        self.fileno = sock.fileno
        self._recv: Callable[[int], bytes] = sock.recv
        self._send: Callable[[bytes | memoryview], int] = sock.send
        self._out: list[bytes] = []  # what is unsent
        self._offset = 0  # how much of the first piece is sent
        self._unsent = 0
        self._corked = True  # a flush will follow without anybody asking for it
        self._waiting = False  # registered for EPOLLOUT
        self._once_sent = False  # something is to be done when all is sent
        self._writable = True
        self._write_closing = False
        self._aborting = False
        self._phase_state: Any = None  # what a phase other than `open` has to remember
        self._deadline: Any = None  # the delayed call that ends such a phase
        self._tls: Any = None  # the TLSStream, once the handshake is done
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

    def start(self) -> None:
        """Begin to serve. Called once, when the connection is registered wherever it is to be known."""
        self._connect_protocol()

    def _connect_protocol(self) -> None:
        """Build the protocol and connect it. What it writes in connectionMade is sent at once."""
        protocol = self._build_protocol()
        if protocol is None:
            return
        self.protocol = protocol
        self.reactor.addReader(self)
        self._corked = True
        try:
            protocol.makeConnection(self)
        except BaseException:
            self._protocol_failed("connectionMade")
        else:
            self._flush()

    def _build_protocol(self) -> Any:
        """A protocol of the factory's; without one, None, and the connection is given up."""
        factory = self.port.factory
        try:
            protocol = factory.buildProtocol(self._peer)
        except BaseException:
            reason = Failure()
            _log.failure("{factory} failed in buildProtocol", reason, factory=log_prefix(factory))
            self._give_up(reason)
            return None
        if protocol is None:
            self._give_up(_DONE)
        return protocol

    # --- reading ---

    def doRead(self) -> Any:
        """One read for each event, however much there is: so every connection has its turn.

        Returns the exception that ended the connection, if one did, as Twisted's reactors take it.
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

    def _not_read(self, problem: OSError) -> Any:
        if isinstance(problem, BlockingIOError):
            return None
        # With its traceback it would refer to a frame that refers to this connection.
        self.error = problem.with_traceback(None)
        return main.CONNECTION_LOST

    def readConnectionLost(self, reason: Failure) -> None:
        """The peer has finished sending. Called by the reactor."""
        if self.disconnected:
            return
        if not self.peer_finished:
            # Twisted takes an error that the kernel reports before there is anything to read for a clean end.
            code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self.error = OSError(code, os.strerror(code))
                self.connectionLost(_LOST)
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
            # Twisted would drop what is unsent; here it is sent first, but nothing more is produced.
            self._stop_producer()
            self.disconnecting = self._once_sent = True
        self._flush()

    # --- writing ---

    def write(self, data: bytes) -> None:
        if type(data) is not bytes:
            data = _as_bytes(data)
        if not data or not self._writable:
            return
        self._out.append(data)
        self._unsent += len(data)
        if not self._corked:
            self._flush_soon()
        # A transport that is its own producer is looked after when the flush shows what the kernel refused.
        if self._unsent > BUFFER_SIZE and self.producer is not self:
            self._pause_producer()

    def writeSequence(self, data: Any) -> None:
        self.write(joined(data))

    def _flush_soon(self) -> None:
        """Have a flush follow, unless one does already."""
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
        self.reactor.addWriter(self)

    def _flush(self) -> None:
        """Send what is unsent with one system call, and do what was waiting for that."""
        out = self._out
        if out:
            piece = out[0] if len(out) == 1 and not self._offset else self._first_pieces()
            try:
                sent = self._send(piece)
            except OSError as problem:
                if not self._would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            if sent != self._unsent:
                self._sent_some(piece, sent)
                return
            self.bytes_out += sent
            self._unsent = self._offset = 0
            out.clear()
            self._corked = False
            if self._once_sent:
                self._all_sent()
        else:
            self._corked = False
            if self._once_sent:
                self._finish()

    def _first_pieces(self) -> bytes | memoryview:
        """As many of the first pieces as are worth sending together, joined, without what is sent of them."""
        out = self._out
        if self._offset:
            first: bytes | memoryview = memoryview(out[0])[self._offset :]
        else:
            first = out[0]
        count, size = 1, len(first)
        while count < len(out) and size + len(out[count]) <= JOIN_LIMIT:
            size += len(out[count])
            count += 1
        if count == 1:
            return first
        joined = b"".join((first, *out[1:count]))
        self._offset = 0
        out[:count] = [joined]
        return joined

    def _would_block(self, problem: OSError) -> bool:
        """Whether the kernel has only no room now."""
        return isinstance(problem, BlockingIOError) or problem.errno == errno.ENOBUFS

    def _lost(self, problem: OSError) -> None:
        """Nothing can be sent any more."""
        self.error = problem.with_traceback(None)
        self.connectionLost(_LOST)

    def _sent_some(self, piece: bytes | memoryview, sent: int) -> None:
        """The kernel took `sent` bytes of the piece, and there is more."""
        self.bytes_out += sent
        self._unsent -= sent
        if sent == len(piece):
            del self._out[0]
            self._offset = 0
        else:
            self._offset += sent
        if not self._waiting:
            self._wait_until_writable()
        if self._unsent > BUFFER_SIZE:
            self._pause_producer()

    def _pause_producer(self) -> None:
        if self.producer is not None and self.streaming_producer and not self.producer_paused:
            self.producer_paused = self._once_sent = True
            self.producer.pauseProducing()

    def _all_sent(self) -> None:
        """Ask the producer for more, if it waits for that; otherwise do what was waiting until everything was sent."""
        if self.producer is self and self.disconnecting:
            self.producer = None  # it reads no more, so there is nothing more to come
        if self.producer is not None and (self.producer_paused or not self.streaming_producer):
            self.producer_paused = False
            self._once_sent = self.disconnecting or self._write_closing or not self.streaming_producer
            self.producer.resumeProducing()
        else:
            self._finish()

    def _finish(self) -> None:
        if self.producer is not None and not self.streaming_producer:
            return  # it says when it has finished: by unregistering
        self._once_sent = False
        if self.disconnecting:
            self._close()
        elif self._write_closing and self._shut_down_writing():
            self._writable = self._write_closing = False
            protocol = IHalfCloseableProtocol(self.protocol, None)
            if protocol is not None:
                try:
                    protocol.writeConnectionLost()
                except BaseException:
                    self._protocol_failed("writeConnectionLost")

    def doWrite(self) -> Any:
        """The kernel takes bytes again, or will most likely. Called by the reactor."""
        if not self.disconnected:
            self._flush()
            if not self._corked and not self.disconnected:
                self._stop_waiting()
        return None

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting = False
            self.reactor.removeWriter(self)

    def _close(self) -> None:
        """Close, or see to it that our last output arrives first."""
        if self.peer_finished:
            self.connectionLost(_DONE)
            return
        under_way = self._in_flight()  # without FIN, which counts as a byte
        # FIN goes before the look at what the peer has sent: who has that is not hurt by a reset for what comes later.
        with contextlib.suppress(OSError):  # the peer is gone
            self.socket.shutdown(socket.SHUT_WR)
        if not self._at_risk(under_way):
            self.connectionLost(_DONE)
        else:
            self._phase_state = self.__class__
            self.__class__ = Lingering
            self.linger()  # type: ignore[attr-defined]  # a Lingering's

    def _at_risk(self, under_way: int) -> bool:
        """Whether closing now could be answered with a reset that overtakes our last output.

        The kernel resets when input is unread, or comes after the end (RFC 9293, section 3.10.4; RFC 1122, section
        4.2.2.13), and drops what the peer has not acknowledged.
        """
        try:
            if self.socket.recv(1, socket.MSG_PEEK):
                return True
        except BlockingIOError:
            return under_way > 0
        except OSError:  # gone already
            pass
        return False

    def _in_flight(self) -> int:
        """Bytes that the kernel has taken and the peer not acknowledged: SIOCOUTQ of tcp(7) and unix(7)."""
        queued = bytearray(4)
        try:
            fcntl.ioctl(self.fileno(), termios.TIOCOUTQ, queued)
        except OSError:  # not Linux
            return 0
        return int.from_bytes(queued, sys.byteorder)

    def _shut_down_writing(self) -> bool:
        """Send FIN; False when that has to wait, and will be asked for again."""
        with contextlib.suppress(OSError):  # the peer is gone, which reading will tell
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def writeConnectionLost(self, reason: Failure) -> None:
        """IHalfCloseableDescriptor's; our own write side is never lost without the connection."""
        self.connectionLost(reason)

    # --- the end ---

    def loseConnection(self) -> None:
        """Close once everything written is sent, and the producer, if there is one, has unregistered."""
        if self.connected and not self.disconnecting:
            self.reactor.removeReader(self)
            self.disconnecting = self._once_sent = True
            self._flush_soon()

    def loseWriteConnection(self) -> None:
        """Send FIN once everything written is sent; reading goes on."""
        if self._writable and not self._write_closing:
            self._write_closing = self._once_sent = True
            self._flush_soon()

    def abortConnection(self) -> None:
        """Close at once with a reset; what is unsent is dropped. The protocol hears of it in a later event."""
        if self.disconnected or self._aborting:
            return
        self._aborting = self.disconnecting = True
        self._writable = self._once_sent = False
        self._out.clear()
        self._unsent = self._offset = 0
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)
        self.reactor.callLater(0, self.connectionLost, Failure(error.ConnectionAborted()))

    def end(self, why: str) -> None:
        """Close once what is written is sent, with this reason of ours (one of a fixed few) for the record.

        Unlike with loseConnection, a producer has no say in when that is.
        """
        if self.disconnected:
            return
        self.error = Ended(why)
        self._stop_producer()
        if self.disconnecting:  # which may have waited for that
            self._flush_soon()
        else:
            self.loseConnection()

    def cut(self, why: str) -> None:
        """Close at once with a reset, as abortConnection does, with this reason of ours for the record."""
        if self.disconnected:
            return
        self.error = Ended(why)
        self.abortConnection()

    def refuse(self) -> None:
        """Close a connection that was accepted a moment ago and is not served. Nobody is told."""
        self.disconnected = True
        self.connected = self._writable = False
        self._no_deadline()  # of its PROXY header
        self.reactor.removeReader(self)
        self.socket.close()

    @property
    def unsent(self) -> int:
        """Bytes written and not yet given to the kernel."""
        return self._unsent

    def _protocol_failed(self, method: str) -> None:
        """A protocol that raises loses its own connection, and nobody else notices."""
        reason = Failure()
        _log.failure("{protocol} failed in {method}", reason, protocol=log_prefix(self.protocol), method=method)
        self._give_up(reason)

    def _failed(self) -> None:
        """End it for what was raised where the reactor would not, as it does for doRead: a producer's, most likely."""
        reason = Failure()
        _log.failure("{connection} failed", reason, connection=self)
        self.connectionLost(reason)

    def _give_up(self, reason: Failure) -> None:
        """End it at once, for what a factory or protocol has done."""
        self.connectionLost(reason)

    def connectionLost(self, reason: Failure) -> None:
        """The one end of every connection. Called by the reactor too."""
        if self.disconnected:
            return
        self.disconnected = True
        self.connected = self._writable = self._once_sent = False
        self._no_deadline()
        self._stop_producer()
        self.reactor.removeReader(self)
        if self._waiting:
            self.reactor.removeWriter(self)
        self._out.clear()
        try:
            if isinstance(reason.value, error.ConnectionAborted):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.socket.close()
        except OSError:  # the connection was reset under our hands
            pass
        # References that would make a cycle of connection and protocol; the protocol keeps its transport.
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            try:
                protocol.connectionLost(reason)
            except BaseException:
                _log.failure("{protocol} failed in connectionLost", protocol=log_prefix(protocol))
        self.port.connection_closed(self, reason)

    def _no_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

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
            self._once_sent = True
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        self.producer = None
        if self._once_sent:
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

    # --- TLS ---

    def startTLS(self, contextFactory: Any, normal: bool = True) -> None:
        """Go on in TLS; what was written before is sent as it is.

        `contextFactory` is an `ssl.SSLContext`, or anything that Twisted's own TLS takes (with pyOpenSSL). `normal`
        means to be the server of the handshake. Raises ValueError for a context that is made for the other side, and
        ImportError for one of Twisted's without pyOpenSSL.
        """
        if isinstance(contextFactory, ssl.SSLContext):
            wrong = ssl.PROTOCOL_TLS_CLIENT if normal else ssl.PROTOCOL_TLS_SERVER
            if contextFactory.protocol == wrong or (contextFactory.check_hostname and not normal):
                raise ValueError(f"this context cannot be the {'server' if normal else 'client'} of a handshake")
            self.__class__ = Handshake
            self.secure(contextFactory, server_side=normal)  # type: ignore[attr-defined]  # a Handshake's
        else:
            from rtservice.net.layered import add_layer

            add_layer(self, contextFactory, client=not normal)

    # --- who and what ---

    def getPeer(self) -> Any:
        return self._peer

    def getHost(self) -> Any:
        if self.proxied is not None and self.proxied.destination is not None:
            return self.proxied.destination
        return address_of(self.socket.getsockname())

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

    @property
    def log_fields(self) -> dict[str, object]:
        """What a log record of this connection's is to have: `rtservice.interfaces.ConnectionLogger`."""
        return {"connection": self.number, "peer": peer_name(self._peer), "listener": self.port.name}

    def logPrefix(self) -> str:
        host = getattr(self._peer, "host", "unix")
        return f"{log_prefix(self.protocol)},{self.number},{host}"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} #{self.number} of {self._peer} on {self.port.name}>"


def _as_bytes(data: Any) -> bytes:
    if isinstance(data, bytes | bytearray | memoryview):  # a copy: a buffer may be changed before it is sent
        return bytes(data)
    raise TypeError("Data must be bytes")  # Twisted's words


def joined(pieces: Any) -> bytes:
    """Pieces of data as one; raises TypeError as Twisted does."""
    try:
        return b"".join(pieces)
    except TypeError:
        raise TypeError("Data must be bytes") from None


@implementer(interfaces.INegotiated, interfaces.ISSLTransport)
class SecureConnection(Connection):
    """A Connection whose bytes pass through TLS, from the standard library's `ssl`: see `rtservice.net.tls_stream`.

    The peer's close_notify is to a protocol what FIN is on a plain connection (RFC 8446, section 6.1); FIN without it
    is a connection lost, since what came before may be cut.

    `unsent` and the byte counters are of plaintext. What is encrypted counts as sent as the kernel takes it.
    """

    __slots__ = ()

    def getHandle(self) -> Any:
        """The `ssl.SSLObject` of this connection; before the handshake is done its socket."""
        return self.socket if self._tls is None else self._tls.object

    def getPeerCertificate(self) -> dict[str, Any] | None:
        """The peer's certificate as `ssl.SSLObject.getpeercert` describes it; None when it showed none.

        What `ssl` can say beyond this (the certificate as DER, the chain) is at `getHandle()`, its SSLObject. This and
        the following are None before the handshake is done, and still there in connectionLost.
        """
        return None if self._tls is None else self._tls.object.getpeercert() or None

    @property
    def negotiatedProtocol(self) -> bytes | None:
        """The protocol that ALPN chose (RFC 7301), or None."""
        chosen = None if self._tls is None else self._tls.object.selected_alpn_protocol()
        return None if chosen is None else chosen.encode("ascii")

    @property
    def tls_version(self) -> str | None:
        """`TLSv1.3` or `TLSv1.2`."""
        return None if self._tls is None else self._tls.object.version()

    @property
    def tls_cipher(self) -> str | None:
        """OpenSSL's name of the cipher suite in use, such as `TLS_AES_256_GCM_SHA384`."""
        return None if self._tls is None else self._tls.object.cipher()[0]

    def startTLS(self, contextFactory: Any, normal: bool = True) -> None:
        """TLS runs already, and not within itself; raises RuntimeError."""
        raise RuntimeError("this connection is in TLS already")

    def secured(self, tls: TLSStream) -> None:
        """Go on after the handshake: with the protocol, what it has written meanwhile, and what the peer has sent."""
        self._tls = tls
        # What came with the client's last message. It is taken first: making a close_notify, OpenSSL would drop it.
        tls.rest = tls.incoming.read()
        if self.protocol is None:
            self._connect_protocol()
        listener = interfaces.IHandshakeListener(self.protocol, None)
        if listener is not None:
            try:
                listener.handshakeCompleted()
            except BaseException:
                self._protocol_failed("handshakeCompleted")
                return
        if self.disconnected:
            return
        if self.disconnecting:  # since before the handshake was done, for which it was read
            self.reactor.removeReader(self)
        if self.producer_paused and not self._out:  # since before the handshake
            self._corked = False
            self._all_sent()
            if self.disconnected:
                return
        self._flush()
        if tls.rest and not self.disconnected:
            self._read_rest()

    # --- reading ---

    def doRead(self) -> Any:
        """One read for each event, of which OpenSSL gets no more than a bounded number of records."""
        tls = self._tls
        try:
            data = self._recv(tls.read_size)
        except OSError as problem:
            return self._not_read(problem)
        if not data:
            self.error = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "FIN without close_notify")
            return main.CONNECTION_LOST
        if tls.aligned and (len(data) < FIRST_READ or (data[3] << 8 | data[4]) + 5 == len(data)):
            tls.feed(data)
            try:
                plain = tls.decrypt(RECORD_SIZE)
            except ssl.SSLError as problem:
                plain = tls.receive_none(data, problem)
            else:
                if plain and not tls.incoming.pending:
                    # The usual message: `_received` without a frame, and without what only other records bring.
                    if tls.without_data:
                        tls.without_data = 0
                    self.bytes_in += len(plain)
                    self._corked = True
                    try:
                        self.protocol.dataReceived(plain)
                    except BaseException:
                        self._protocol_failed("dataReceived")
                        return None
                    if self._out or self._once_sent or tls.outgoing.pending:
                        self._flush()
                    else:
                        self._corked = False
                    return None
                plain = tls.receive_more(data, plain)
        else:
            if len(data) == tls.read_size:
                tls.read_size = FULL_READ
            plain = tls.receive(data)
        return self._received(tls, plain)

    def _received(self, tls: TLSStream, plain: bytes) -> Any:
        """Give plaintext to the protocol, then do what else has come with it. Returns what doRead does."""
        if plain:
            self.bytes_in += len(plain)
            self._corked = True
            try:
                self.protocol.dataReceived(plain)
            except BaseException:
                self._protocol_failed("dataReceived")
                return None
            if self._out or self._once_sent or tls.outgoing.pending:
                self._flush()
            else:
                self._corked = False
        elif tls.outgoing.pending:
            self._flush()
        if tls.rest or tls.finished or tls.problem is not None or tls.without_data > MAX_BYTES_WITHOUT_DATA:
            return self._not_only_received(tls)
        return None

    def _not_only_received(self, tls: TLSStream) -> Any:
        if self.disconnected or self._aborting or self.phase == "closing":  # it is a Lingering, which reads below TLS
            return None
        if tls.problem is not None:
            self.error = tls.problem
            return main.CONNECTION_LOST
        if tls.without_data > MAX_BYTES_WITHOUT_DATA:
            self.error = Ended(TOO_MUCH_WITHOUT_DATA)
            return main.CONNECTION_LOST
        if tls.finished:
            # As with FIN, a protocol that has paused hears of it when it resumes; and it hears of it once.
            if not tls.reading or self.peer_finished:
                return None
            self.peer_finished = True
            return None if self.disconnecting else main.CONNECTION_DONE
        if tls.rest:
            self.reactor.removeReader(self)
            self._read_rest_later(tls)
        return None

    def _read_rest_later(self, tls: TLSStream) -> None:
        """Have `_read_rest` called in the next turn, once."""
        if not tls.scheduled:
            tls.scheduled = True
            self.reactor.callLater(0, self._read_rest)

    def _read_rest(self) -> None:
        """Take what was read in an earlier turn."""
        tls = self._tls
        tls.scheduled = False
        if not tls.reading or tls.held or self.disconnecting or self.disconnected:
            return
        rest, tls.rest = tls.rest, b""
        try:
            why = self._received(tls, tls.receive(rest) if rest else b"")
        except BaseException:
            self._failed()
            return
        if why is None:
            if not tls.rest and tls.reading and not tls.held:
                super().resumeProducing()
        elif why is main.CONNECTION_DONE:
            self.reactor.removeReader(self)
            self.readConnectionLost(_DONE)
        else:
            self.connectionLost(_LOST)

    def pauseProducing(self) -> None:
        if self._tls is not None:
            self._tls.reading = False
        super().pauseProducing()

    def resumeProducing(self) -> None:
        tls = self._tls
        if tls is not None:
            tls.reading = True
            if tls.held:
                return
            if tls.rest or (tls.finished and not self.peer_finished):
                self._read_rest_later(tls)
                return
        super().resumeProducing()

    stopReading = pauseProducing
    startReading = resumeProducing

    # --- writing ---

    def abortConnection(self) -> None:
        # Not super(): the caller may have bound this while a plain connection was Lingering.
        Connection.abortConnection(self)
        tls = self._tls
        if tls is not None:  # what is sealed is a part of what is unsent
            tls.sealed, tls.sealed_plain = b"", 0

    def _lost(self, problem: OSError) -> None:
        tls = self._tls
        if tls.problem is not None:  # after which OpenSSL encrypts nothing; its alert is left
            problem = tls.problem
            if not tls.sealed:
                with contextlib.suppress(OSError):
                    self._send(tls.take())
        super()._lost(problem)

    def _flush(self) -> None:
        tls = self._tls
        out = self._out
        if len(out) == 1 and not self._offset and not tls.sealed and len(out[0]) <= RECORD_SIZE:
            try:
                size = tls.encrypt(out[0])
                data = tls.take()
                sent = self._send(data)
            except OSError as problem:
                if not self._would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            out.clear()
            if sent == len(data):
                self.bytes_out += size
                self._unsent = 0
                self._corked = False
                if self._once_sent:
                    self._all_sent()
                return
            tls.sealed = data
            tls.sealed_plain = size
            self._count_sent(tls, sent)
        self._flush_more(tls)

    def _flush_more(self, tls: TLSStream) -> None:
        """Send what is unsent, TLS's own messages included, until the kernel is full or it is the turn of others."""
        idle = not tls.sealed and not self._out and not self.producer_paused
        most = JOIN_LIMIT
        while most > 0 or not self._out:
            try:
                if not tls.sealed:
                    self._seal(tls)
                    if not tls.sealed:
                        self._corked = False
                        if tls.held:
                            self._release(tls)
                        if self._once_sent:
                            if idle:  # or a pull producer would be asked again before it has written
                                self._finish()
                            else:
                                self._all_sent()
                        return
                sent = self._send(tls.sealed)
            except OSError as problem:
                if not self._would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            most -= sent
            if not self._count_sent(tls, sent):
                break
        self._corked = True
        if not self._waiting:
            self._wait_until_writable()
        if self._unsent > BUFFER_SIZE:
            self._pause_producer()
        answers = tls.outgoing.pending
        if answers > MAX_UNSENT_ANSWERS:
            self._hold(tls)
        elif tls.held and not answers:
            self._release(tls)

    def _seal(self, tls: TLSStream) -> None:
        """Encrypt the first SEAL_SIZE bytes of what is written, or less; `sealed` is empty before."""
        out = self._out
        if not out:
            answers = tls.take()
            if not tls.notified:  # nothing is sent after close_notify (RFC 8446, section 6.1)
                tls.sealed = answers
            return
        first = memoryview(out[0])[self._offset :]
        count, size = 1, len(first)
        while count < len(out) and size + len(out[count]) <= SEAL_SIZE:
            size += len(out[count])
            count += 1
        if count > 1:
            piece: bytes | memoryview = b"".join((first, *out[1:count]))
        else:
            piece = first[:SEAL_SIZE]
            if len(piece) < size:
                count = 0
        self._offset = 0 if count else self._offset + len(piece)
        del out[:count]
        tls.seal(piece)

    def _count_sent(self, tls: TLSStream, sent: int) -> bool:
        """Count what the kernel took of what is sealed, and return whether that was all."""
        done = sent == len(tls.sealed)
        plain = tls.sealed_plain if done else min(sent, tls.sealed_plain)
        tls.sealed_plain -= plain
        tls.sealed = b"" if done else memoryview(tls.sealed)[sent:]
        self.bytes_out += plain
        self._unsent -= plain
        return done

    def _hold(self, tls: TLSStream) -> None:
        """Read nothing more from a peer that does not read what TLS has to tell it."""
        if not tls.held:
            tls.held = True
            self.reactor.removeReader(self)
            self._deadline = self.reactor.callLater(ANSWER_TIMEOUT, self._check_answers, self._progress(tls))

    def _progress(self, tls: TLSStream) -> tuple[int, int]:
        return self.bytes_out, len(tls.sealed)

    def _check_answers(self, before: tuple[int, int]) -> None:
        self._deadline = None
        now = self._progress(self._tls)
        if now == before:
            self.cut(ANSWERS_NOT_READ)
        else:
            self._deadline = self.reactor.callLater(ANSWER_TIMEOUT, self._check_answers, now)

    def _release(self, tls: TLSStream) -> None:
        tls.held = False
        self._no_deadline()
        if tls.reading:
            self.resumeProducing()  # with what was read before

    def _shut_down_writing(self) -> bool:
        """Send close_notify and FIN."""
        if not self._close_notify():
            return False
        with contextlib.suppress(OSError):  # the peer is gone, which reading will tell
            self.socket.shutdown(socket.SHUT_WR)
        return True

    def _close_notify(self) -> bool:
        """Send close_notify; False while the kernel has no room for it, and what comes next has to be tried again."""
        tls = self._tls
        if not tls.notified:
            tls.notify()
            self._writable = False  # OpenSSL encrypts nothing after it
            tls.sealed = tls.take()
            try:
                sent = self._send(tls.sealed)
            except OSError as problem:
                if not self._would_block(problem):  # the peer is gone
                    tls.sealed = b""
                    return True
                sent = 0
            if not self._count_sent(tls, sent):
                self._once_sent = True
                self._wait_until_writable()
                return False
        return True

    def _close(self) -> None:
        """Send close_notify, and do not wait for the peer's: RFC 8446, section 6.1, does not ask for it."""
        if self._close_notify():
            self._no_deadline()
            super()._close()


class Handshake(SecureConnection):
    """A connection until its TLS handshake is done: nothing of a protocol's is sent, and nothing reaches one.

    When it is done, it becomes a SecureConnection.
    """

    phase = "tls"

    __slots__ = ()

    def start(self) -> None:
        assert isinstance(self.port.tls, ssl.SSLContext)
        self.secure(self.port.tls, server_side=True)

    def secure(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Begin the handshake, once what is written already is sent as it is."""
        plain = b"".join(self._out)[self._offset :]
        self._out.clear()
        self._unsent = self._offset = 0
        self._corked = True
        self._deadline = self.reactor.callLater(self.port.handshake_timeout, self._timed_out)
        tls = TLSStream(context, server_side=server_side)
        if server_side:
            tls.gate = alpn_gate(context)
        self._phase_state = plain, tls  # the TLSStream alone, once what was written before is sent
        self._send_plain()

    def _send_plain(self) -> None:
        plain, tls = self._phase_state
        if plain:
            try:
                sent = self._send(plain)
            except OSError as problem:
                if not self._would_block(problem):
                    self.error = problem.with_traceback(None)
                    self.reactor.removeReader(self)
                    self._stop_waiting()
                    self.reactor.callLater(0, self.connectionLost, _LOST)
                    return
                sent = 0
            self.bytes_out += sent
            if sent < len(plain):
                self._phase_state = plain[sent:], tls
                self.reactor.removeReader(self)  # whatever the peer says now has to wait
                self._wait_until_writable()
                return
        self._stop_waiting()
        self._phase_state = tls
        if tls.reading:
            self.reactor.addReader(self)
        if not tls.object.server_side:  # the client has the first word
            self._corked = False
            self._flush_soon()

    def doRead(self) -> Any:
        tls = self._phase_state
        try:
            data = self._recv(FIRST_READ)
        except OSError as problem:
            return self._not_read(problem)
        if not data:
            self.error = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "FIN within the handshake")
            return main.CONNECTION_LOST
        tls.without_data += len(data)
        if tls.without_data > MAX_HANDSHAKE_BYTES:
            self.error = Ended(HANDSHAKE_TOO_LARGE)
            return main.CONNECTION_LOST
        if tls.gate is not None:
            passed = tls.gate.feed(data)
            if passed is None:
                return None
            if isinstance(passed, Refusal):
                return self._refuse_handshake(passed.alert, Ended(passed.reason))
            tls.gate = None
            data = passed
        tls.since_flight += len(data)
        tls.feed(data)
        return self._shake(tls)

    def _refuse_handshake(self, alert: bytes, why: Exception) -> Any:
        """End it with an alert, if the kernel has room for that. Returns what doRead does."""
        self.error = why
        with contextlib.suppress(OSError):
            self._send(alert)
        return main.CONNECTION_LOST

    def _shake(self, tls: TLSStream) -> Any:
        """Go on with the handshake as far as what has come allows. Returns what doRead does."""
        if may_be_expensive(tls.object, tls.since_flight):
            tls.held = True
            self.reactor.removeReader(self)
            shake_in_thread(
                self.reactor,
                tls.object,
                lambda: not self.disconnected,
                lambda problem: self._shaken_in_thread(tls, problem),
            )
            return None
        try:
            tls.object.do_handshake()
        except ssl.SSLError as problem:
            return self._shaken(tls, problem.with_traceback(None))
        return self._shaken(tls, None)

    def _shaken_in_thread(self, tls: TLSStream, problem: ssl.SSLError | None) -> None:
        tls.held = False
        if self.disconnected or self._aborting:
            return
        if tls.reading:
            self.reactor.addReader(self)
        try:
            why = self._shaken(tls, problem)
        except BaseException:
            self._failed()
            return
        if why is not None:
            self.connectionLost(_LOST)

    def _shaken(self, tls: TLSStream, problem: ssl.SSLError | None) -> Any:
        """Do what follows a do_handshake that raised this problem, if any. Returns what doRead does."""
        if isinstance(problem, ssl.SSLWantReadError):
            tls.sealed = tls.take()
            return self._send_flight(tls)
        if problem is not None:
            return self._refuse_handshake(tls.take(), problem)
        why = check_resumed(tls.object)
        if why is not None:
            return self._refuse_handshake(b"", Ended(why))
        self._no_deadline()
        tls.without_data = 0
        self._phase_state = None
        self.__class__ = SecureConnection  # type: ignore[assignment]  # same slots
        self.secured(tls)
        return None

    def _send_flight(self, tls: TLSStream) -> Any:
        """Send our part of the handshake. What the peer sends has to wait for that: it is to read ours first."""
        if tls.sealed:
            tls.since_flight = 0
            try:
                sent = self._send(tls.sealed)
            except OSError as problem:
                if not self._would_block(problem):
                    return self._not_read(problem)
                sent = 0
            if not self._count_sent(tls, sent):
                self.reactor.removeReader(self)
                self._wait_until_writable()
                return None
        if self._waiting:
            self._stop_waiting()
            if tls.reading:
                self.reactor.addReader(self)
        return None

    def doWrite(self) -> Any:
        if self.disconnected:
            return None
        if type(self._phase_state) is tuple:
            self._send_plain()
            return None
        tls = self._phase_state
        if tls.sealed:
            return self._send_flight(tls)
        if tls.held:  # a thread works on it, and nothing else may
            self._stop_waiting()
            return None
        return self._shake(tls)

    def _flush(self) -> None:
        self._corked = True  # until the handshake is done, which flushes

    def pauseProducing(self) -> None:
        self._set_reading(False)
        super().pauseProducing()

    def resumeProducing(self) -> None:
        self._set_reading(True)
        tls = self._phase_state
        # Otherwise what is written before has to be sent first.
        if type(tls) is TLSStream and not tls.sealed and not tls.held:
            super().resumeProducing()

    def _set_reading(self, reading: bool) -> None:
        state = self._phase_state
        if state is not None:  # a context may be refused
            (state[1] if type(state) is tuple else state).reading = reading

    stopReading = pauseProducing
    startReading = resumeProducing

    def loseConnection(self) -> None:
        """Close once the handshake is done and everything written is sent; or at the handshake's deadline."""
        if self.connected:
            self.disconnecting = self._once_sent = True

    def readConnectionLost(self, reason: Failure) -> None:
        self.connectionLost(_LOST)

    def _timed_out(self) -> None:
        self._deadline = None
        self.error = Ended("TLS handshake timed out")
        self.connectionLost(_LOST)


class ProxyHeader(Connection):
    """A connection until its PROXY header is complete: nothing is sent, and no protocol is built.

    Then it becomes what it would have been without one, and its peer is the one that the header names.
    """

    phase = "proxy"

    __slots__ = ()

    def start(self) -> None:
        self._phase_state = b""
        self._deadline = self.reactor.callLater(self.port.handshake_timeout, self._timed_out)
        self.reactor.addReader(self)

    def doRead(self) -> Any:
        sock = self.socket
        try:
            ahead = sock.recv(_PROXY_PEEK, socket.MSG_PEEK)
            if not ahead:  # a probe of whether the port is open, most often
                self.peer_finished = True
                return main.CONNECTION_DONE
            begun = self._phase_state
            header = parse(begun + ahead)
            if header is None:
                # All of it is the header's. It is taken, so that the kernel reports only news; what follows the header
                # is left to the next phase.
                self._phase_state = begun + sock.recv(len(ahead))
                return None
            sock.recv(header.length - len(begun))
        except ProxyError as problem:
            problem.beginning = (begun + ahead)[:BEGINNING]
            return self._not_read(problem)
        except OSError as problem:
            return self._not_read(problem)
        self._identified(header)
        return None

    def _not_read(self, problem: Exception) -> Any:
        if isinstance(problem, BlockingIOError):
            return None
        self.error = problem.with_traceback(None)
        return main.CONNECTION_LOST

    def _identified(self, header: Header) -> None:
        self.proxied = header
        if header.source is not None:
            self._peer = header.source
        self.port.connection_identified(self)
        if self.disconnected:
            return
        self._phase_state = None
        self._no_deadline()
        self.__class__ = self.port.first_phase  # type: ignore[assignment]  # same slots
        self.start()

    def loseConnection(self) -> None:
        """Close: there is nothing to flush."""
        self.connectionLost(_DONE)

    def readConnectionLost(self, reason: Failure) -> None:
        self.connectionLost(reason)

    def _timed_out(self) -> None:
        self._deadline = None
        self.error = Ended("PROXY header timed out")
        self.connectionLost(_LOST)


class Lingering(SecureConnection):
    """A connection at its end: FIN is sent, and what the peer still sends is read and dropped, until it has finished.

    It ends when nothing moves any more, or after half a minute. The protocol hears of the end after that.
    """

    phase = "closing"

    __slots__ = ()

    def linger(self) -> None:
        self._writable = False
        # What the connection was; how often it may still wait; what had moved.
        self._phase_state = self._phase_state, _LINGER_STEPS, None
        self._check()
        self.reactor.addReader(self)

    def _flush(self) -> None:
        self._corked = False  # nothing is sent any more

    def pauseProducing(self) -> None:
        """Read on: with input unread at the end, the kernel would drop the last output."""

    stopReading = pauseProducing

    def doRead(self) -> Any:
        try:
            data = self._recv(BUFFER_SIZE)  # below TLS
        except BlockingIOError:
            return None
        except OSError as problem:
            self.error = self.error or problem.with_traceback(None)
            return main.CONNECTION_LOST
        self.bytes_in += len(data)
        return None if data else main.CONNECTION_DONE

    def _check(self) -> None:
        self._deadline = None
        was, steps, before = self._phase_state
        now = self.bytes_in, self._in_flight()
        if now == before or not steps:
            self.connectionLost(_DONE)
        else:
            self._phase_state = was, steps - 1, now
            self._deadline = self.reactor.callLater(_LINGER_STEP, self._check)

    def readConnectionLost(self, reason: Failure) -> None:
        self.connectionLost(_DONE)

    def connectionLost(self, reason: Failure) -> None:
        # The protocol sees its transport as it was.
        self.__class__ = self._phase_state[0]
        self.connectionLost(reason)
