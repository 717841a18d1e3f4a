"""The handshakes before a protocol: PROXY header and TLS handshake.

A handshake is the Stage below a connection that is not open yet. It has a deadline. After a PROXY header, the port
begins the next phase (`rtservice.net.port`). After a TLS handshake, the TLSStream of the connection follows. The phases
of a connection are in `rtservice.net.phases`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import Any

from twisted.internet import main
from twisted.python.failure import Failure

from rtservice.net.client_hello import ALPNGate, HandshakeRejection
from rtservice.net.connection import DONE, LOST, Connection, LocalClose, Stage, would_block
from rtservice.net.expensive import may_be_expensive, shake_in_thread
from rtservice.net.phases import PROXY, TLS
from rtservice.net.proxy import BEGINNING, Header, ProxyError, parse
from rtservice.net.tls import alpn_gate, check_resumed
from rtservice.net.tls_bounds import FIRST_READ, HANDSHAKE_TOO_LARGE, MAX_HANDSHAKE_BYTES
from rtservice.net.tls_facts import TLS_PENDING
from rtservice.net.tls_memory import MemoryTLS
from rtservice.net.tls_stream import TLSStream

# Bytes to peek at for a PROXY header at a time: a header without TLVs, and the first data of most protocols.
_PROXY_PEEK = 1024


class Handshake(Stage):
    """A stage that must end within the port's `handshake_timeout`."""

    __slots__ = ("_deadline",)

    timeout_reason: str  # the reason that is logged

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        timeout = connection.port.handshake_timeout
        self._deadline: Any = connection.reactor.callLater(timeout, self._time_out)

    def _time_out(self) -> None:
        self._deadline = None
        self.connection.error = LocalClose(self.timeout_reason)
        self.connection.connectionLost(LOST)

    def stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class ProxyHandshake(Handshake):
    """Reads the PROXY header and no byte after it. The source address in the header becomes the connection's peer."""

    __slots__ = ("_begun",)

    timeout_reason = "PROXY header timed out"

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._begun = b""  # the part of the header that was received

    def begin(self) -> None:
        """Wait for the header."""
        self.connection.enter(PROXY, self)
        self.connection.reactor.addReader(self)

    def doRead(self) -> Any:
        connection, begun = self.connection, self._begun
        sock = connection.socket
        try:
            ahead = sock.recv(_PROXY_PEEK, socket.MSG_PEEK)
            if not ahead:  # usually a health check that only connects
                connection.peer_finished = True
                return main.CONNECTION_DONE
            header = parse(begun + ahead)
            if header is None:
                # All peeked bytes belong to the header. Consuming them makes the kernel report only new bytes. Bytes
                # after the header stay in the socket for the next stage.
                self._begun = begun + sock.recv(len(ahead))
                return None
            sock.recv(header.length - len(begun))
        except ProxyError as problem:
            problem.beginning = (begun + ahead)[:BEGINNING]
            return connection._not_read(problem)
        except OSError as problem:
            return connection._not_read(problem)
        self._identified(connection, header)
        return None

    def _identified(self, connection: Connection, header: Header) -> None:
        connection.proxied = header
        if header.source is not None:
            connection._peer = header.source
        connection.port.connection_identified(connection)
        if not connection.disconnected:  # it was not refused
            connection.port.after_proxy(connection)

    def may_close(self) -> bool:
        self.connection.connectionLost(DONE)  # there is nothing to flush
        return False

    def readConnectionLost(self, reason: Failure) -> None:
        self.connection.connectionLost(reason)


class TLSHandshake(Handshake):
    """The TLS handshake of a connection with the standard library's `ssl`, after accept() or startTLS.

    Output written before is sent first, in plaintext. Output written during the handshake is kept for the TLSStream.
    """

    __slots__ = ("_before", "_gate", "_reading", "_since_flight", "_tls", "_working")

    timeout_reason = "TLS handshake timed out"

    def __init__(self, connection: Connection, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._tls = MemoryTLS(context, server_side=server_side)  # may raise: before anything is changed
        super().__init__(connection)
        self._gate: ALPNGate | None = alpn_gate(context) if server_side else None  # checks the client's first bytes
        # Bytes received since this side's last messages; negative until the first are sent.
        self._since_flight = -MAX_HANDSHAKE_BYTES
        self._before = b""  # unsent output from before TLS
        self._reading = True  # the protocol has not paused reading
        self._working = False  # a thread runs the handshake; nothing else may use it

    def begin(self) -> None:
        """Begin the handshake once earlier output is sent in plaintext."""
        connection = self.connection
        self._before = b"".join(connection._out)
        connection._out.clear()
        connection._unsent = 0
        connection._corked = True
        connection.be_in_tls(TLS_PENDING)
        connection.enter(TLS, self)
        self._send_before()

    def _send_before(self) -> None:
        connection, before = self.connection, self._before
        if before:
            try:
                sent = connection._send(before)
            except OSError as problem:
                if not would_block(problem):
                    connection.error = problem.with_traceback(None)
                    connection.reactor.removeReader(self)
                    connection._stop_waiting()
                    connection.reactor.callLater(0, connection.connectionLost, LOST)
                    return
                sent = 0
            connection.bytes_out += sent
            self._before = before[sent:]
            if self._before:
                connection.reactor.removeReader(self)  # input has to wait
                connection._wait_until_writable()
                return
        connection._stop_waiting()
        if self._reading:
            connection.reactor.addReader(self)
        if not self._tls.object.server_side:  # a client speaks first
            connection._corked = False
            connection._flush_soon()

    def doRead(self) -> Any:
        connection, tls = self.connection, self._tls
        try:
            data = connection._recv(FIRST_READ)
        except OSError as problem:
            return connection._not_read(problem)
        if not data:
            connection.error = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "FIN within the handshake")
            return main.CONNECTION_LOST
        tls.without_data += len(data)
        if tls.without_data > MAX_HANDSHAKE_BYTES:
            connection.error = LocalClose(HANDSHAKE_TOO_LARGE)
            return main.CONNECTION_LOST
        if self._gate is not None:
            passed = self._gate.feed(data)
            if passed is None:
                return None
            if isinstance(passed, HandshakeRejection):
                return self._refuse(passed.alert, LocalClose(passed.reason))
            self._gate = None
            data = passed
        self._since_flight += len(data)
        tls.feed(data)
        return self._shake()

    def _refuse(self, alert: bytes, why: Exception) -> Any:
        """End the handshake with an alert, if the kernel accepts it. Returns what doRead returns."""
        self.connection.error = why
        with contextlib.suppress(OSError):
            self.connection._send(alert)
        return main.CONNECTION_LOST

    def _shake(self) -> Any:
        """Continue the handshake with the bytes received so far. Returns what doRead returns."""
        connection, tls = self.connection, self._tls
        if may_be_expensive(tls.object, self._since_flight):
            self._working = True
            connection.reactor.removeReader(self)
            shake_in_thread(connection.reactor, tls.object, lambda: not connection.disconnected, self._shaken_in_thread)
            return None
        try:
            tls.object.do_handshake()
        except ssl.SSLError as problem:
            return self._shaken(problem.with_traceback(None))
        return self._shaken(None)

    def _shaken_in_thread(self, problem: ssl.SSLError | None) -> None:
        self._working = False
        connection = self.connection
        if connection.disconnected or connection._aborting:
            return
        if self._reading:
            connection.reactor.addReader(self)
        try:
            why = self._shaken(problem)
        except BaseException:
            connection._failed()
            return
        if why is not None:
            connection.connectionLost(LOST)

    def _shaken(self, problem: ssl.SSLError | None) -> Any:
        """Handle the outcome of do_handshake: its exception, or None. Returns what doRead returns."""
        tls = self._tls
        if isinstance(problem, ssl.SSLWantReadError):
            tls.sealed = tls.take()
            return self._send_flight()
        if problem is not None:
            return self._refuse(tls.take(), problem)
        why = check_resumed(tls.object)
        if why is not None:
            return self._refuse(b"", LocalClose(why))
        tls.without_data = 0
        TLSStream(self.connection, tls, reading=self._reading).begin()
        return None

    def _send_flight(self) -> Any:
        """Send this side's next messages. Reading pauses until they are sent, since the peer needs them to continue."""
        connection, tls = self.connection, self._tls
        if tls.sealed:
            self._since_flight = 0
            try:
                sent = connection._send(tls.sealed)
            except OSError as problem:
                if not would_block(problem):
                    return connection._not_read(problem)
                sent = 0
            tls.count_sent(sent)
            if tls.sealed:
                connection.reactor.removeReader(self)
                connection._wait_until_writable()
                return None
        if connection._waiting:
            connection._stop_waiting()
            if self._reading:
                connection.reactor.addReader(self)
        return None

    def doWrite(self) -> Any:
        connection = self.connection
        if connection._stage is not self:
            return connection.doWrite()
        if self._before:
            self._send_before()
            return None
        if self._tls.sealed:
            return self._send_flight()
        if self._working:
            connection._stop_waiting()
            return None
        return self._shake()

    def flush(self) -> None:
        self.connection._corked = True  # the end of the handshake flushes

    def pause(self) -> None:
        self._reading = False
        super().pause()

    def resume(self) -> None:
        self._reading = True
        # Otherwise earlier output has to be sent first, or a thread has to finish.
        if not self._before and not self._tls.sealed and not self._working:
            super().resume()

    def may_close(self) -> bool:
        """Close once the handshake is done and all output is sent, or at the handshake's deadline."""
        self.connection.disconnecting = self.connection._once_sent = True
        return False

    def readConnectionLost(self, reason: Failure) -> None:
        self.connection.connectionLost(LOST)
