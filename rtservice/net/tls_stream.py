"""The TLS stream of a connection with the standard library's `ssl`."""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

from twisted.internet import interfaces, main

from rtservice.net.bounded_stream import BoundedStream
from rtservice.net.connection import BUFFER_SIZE, JOIN_LIMIT, Connection, LocalClose, would_block
from rtservice.net.phases import OPEN
from rtservice.net.tls_bounds import (
    FIRST_READ,
    FULL_READ,
    MAX_BYTES_WITHOUT_DATA,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from rtservice.net.tls_memory import RECORD_SIZE, SEAL_SIZE, MemoryTLS


class TLSStream(BoundedStream):
    """Stage that encrypts the connection's output and decrypts its input.

    For the protocol, the peer's close_notify is what FIN is on a plain connection (RFC 8446, section 6.1). FIN without
    close_notify is an error, since the data may be truncated.
    """

    __slots__ = ("_tls",)

    def __init__(self, connection: Connection, tls: MemoryTLS, *, reading: bool) -> None:
        super().__init__(connection)
        self._tls = tls
        self.reading = reading

    def begin(self) -> None:
        """Continue after the handshake: connect the protocol, send its output, and process input that has arrived."""
        connection, tls = self.connection, self._tls
        # Input that came with the client's last message. Read before anything else: when OpenSSL creates a
        # close_notify, it drops this input.
        tls.rest = tls.incoming.read()
        connection.be_in_tls(tls)
        connection.enter(OPEN, self)
        if self.reading:
            connection.reactor.addReader(self)
        if connection.protocol is None:
            connection.connect_protocol()
        listener = interfaces.IHandshakeListener(connection.protocol, None)
        if listener is not None:
            try:
                listener.handshakeCompleted()
            except BaseException:
                connection._protocol_failed("handshakeCompleted")
                return
        if connection._stage is not self:  # the protocol has ended the connection, or it lingers
            return
        if connection.disconnecting:  # loseConnection was called in the handshake, which had to continue reading
            connection.reactor.removeReader(self)
        if connection.producer_paused and not connection._out:  # paused before the handshake
            connection._corked = False
            connection._all_sent()
            if connection.disconnected:
                return
        connection._flush()
        if tls.rest and not connection.disconnected:
            self._take_rest_now()

    # --- reading ---

    def doRead(self) -> Any:
        """Read once for each event, and pass a bounded number of records to OpenSSL."""
        connection, tls = self.connection, self._tls
        try:
            data = connection._recv(tls.read_size)
        except OSError as problem:
            return connection._not_read(problem)
        if not data:
            connection.error = ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "FIN without close_notify")
            return main.CONNECTION_LOST
        if tls.aligned and (len(data) < FIRST_READ or (data[3] << 8 | data[4]) + 5 == len(data)):
            tls.feed(data)
            try:
                plain = tls.decrypt(RECORD_SIZE)
            except ssl.SSLError as problem:
                plain = tls.receive_none(data, problem)
            else:
                if plain and not tls.incoming.pending:
                    # The usual message: `_received` inlined, without the cases of other records.
                    if tls.without_data:
                        tls.without_data = 0
                    connection.bytes_in += len(plain)
                    connection._corked = True
                    try:
                        connection.protocol.dataReceived(plain)
                    except BaseException:
                        connection._protocol_failed("dataReceived")
                        return None
                    if connection._out or connection._once_sent or tls.outgoing.pending:
                        self.flush()
                    else:
                        connection._corked = False
                    return None
                plain = tls.receive_more(data, plain)
        else:
            if len(data) == tls.read_size:
                tls.read_size = FULL_READ
            plain = tls.receive(data)
        return self._received(connection, tls, plain)

    def _received(self, connection: Connection, tls: MemoryTLS, plain: bytes) -> Any:
        """Pass plaintext to the protocol, then handle the other results of the read. Returns what doRead returns."""
        if plain:
            connection.bytes_in += len(plain)
            connection._corked = True
            try:
                connection.protocol.dataReceived(plain)
            except BaseException:
                connection._protocol_failed("dataReceived")
                return None
            if connection._out or connection._once_sent or tls.outgoing.pending:
                self.flush()
            else:
                connection._corked = False
        elif tls.outgoing.pending:
            self.flush()
        if tls.rest or tls.finished or tls.problem is not None or tls.without_data > MAX_BYTES_WITHOUT_DATA:
            return self._not_only_received(connection, tls)
        return None

    def _not_only_received(self, connection: Connection, tls: MemoryTLS) -> Any:
        if connection._stage is not self or connection._aborting:  # it has ended or lingers
            return None
        if tls.problem is not None:
            connection.error = tls.problem
            return main.CONNECTION_LOST
        if tls.without_data > MAX_BYTES_WITHOUT_DATA:
            connection.error = LocalClose(TOO_MUCH_WITHOUT_DATA)
            return main.CONNECTION_LOST
        if tls.finished:
            # As with FIN, a paused protocol gets readConnectionLost when it resumes, and only once.
            if not self.reading or connection.peer_finished:
                return None
            connection.peer_finished = True
            return None if connection.disconnecting else main.CONNECTION_DONE
        if tls.rest:
            self.leave_rest()
        return None

    def has_rest(self) -> bool:
        tls = self._tls
        return bool(tls.rest) or (tls.finished and not self.connection.peer_finished)

    def take_rest(self) -> Any:
        tls = self._tls
        rest, tls.rest = tls.rest, b""
        return self._received(self.connection, tls, tls.receive(rest) if rest else b"")

    # --- writing ---

    def drop_output(self) -> None:
        self._tls.sealed, self._tls.sealed_plain = b"", 0  # encrypted output is part of the unsent output

    def _lost(self, problem: OSError) -> None:
        connection, tls = self.connection, self._tls
        if tls.problem is not None:  # OpenSSL encrypts nothing after an error; its alert is still to be sent
            problem = tls.problem
            if not tls.sealed:
                with contextlib.suppress(OSError):
                    connection._send(tls.take())
        connection._lost(problem)

    def flush(self) -> None:
        connection, tls = self.connection, self._tls
        out = connection._out
        if len(out) == 1 and not tls.sealed and len(out[0]) <= RECORD_SIZE:
            try:
                size = tls.encrypt(out[0])
                data = tls.take()
                sent = connection._send(data)
            except OSError as problem:
                if not would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            out.clear()
            if sent == len(data):
                connection.bytes_out += size
                connection._unsent = 0
                connection._corked = False
                if connection._once_sent:
                    connection._all_sent()
                return
            tls.sealed = data
            tls.sealed_plain = size
            self._count_sent(sent)
        self._flush_more(connection, tls)

    def _flush_more(self, connection: Connection, tls: MemoryTLS) -> None:
        """Send output, including messages of TLS itself, until the kernel's buffer is full or JOIN_LIMIT is reached."""
        idle = not tls.sealed and not connection._out and not connection.producer_paused
        most = JOIN_LIMIT
        while most > 0 or not connection._out:
            try:
                if not tls.sealed:
                    self._seal(connection, tls)
                    if not tls.sealed:
                        connection._corked = False
                        if self.held:
                            self.release()
                        if connection._once_sent:
                            if idle:  # otherwise a pull producer would be resumed again before it has written
                                connection._finish()
                            else:
                                connection._all_sent()
                        return
                sent = connection._send(tls.sealed)
            except OSError as problem:
                if not would_block(problem):
                    self._lost(problem)
                    return
                sent = 0
            most -= sent
            if not self._count_sent(sent):
                break
        connection._corked = True
        if not connection._waiting:
            connection._wait_until_writable()
        if connection._unsent > BUFFER_SIZE:
            connection._pause_producer()
        answers = tls.outgoing.pending
        if answers > MAX_UNSENT_ANSWERS:
            self.hold()
        elif self.held and not answers:
            self.release()

    def _seal(self, connection: Connection, tls: MemoryTLS) -> None:
        """Encrypt up to SEAL_SIZE bytes of the output. `sealed` must be empty."""
        out = connection._out
        if not out:
            answers = tls.take()
            if not tls.notified:  # nothing is sent after close_notify (RFC 8446, section 6.1)
                tls.sealed = answers
            return
        piece = out[0]
        count, size = 1, len(piece)
        while count < len(out) and size + len(out[count]) <= SEAL_SIZE:
            size += len(out[count])
            count += 1
        if count > 1:
            piece = b"".join(out[:count])
            del out[:count]
        elif size > SEAL_SIZE:
            piece, out[0] = memoryview(piece)[:SEAL_SIZE], memoryview(piece)[SEAL_SIZE:]
        else:
            del out[0]
        tls.seal(piece)

    def _count_sent(self, sent: int) -> bool:
        """Count bytes of `sealed` that the kernel accepted, and return whether that was all."""
        plain = self._tls.count_sent(sent)
        self.connection.bytes_out += plain
        self.connection._unsent -= plain
        return not self._tls.sealed

    def progress(self) -> tuple[int, int]:
        return self.connection.bytes_out, len(self._tls.sealed)

    def finish_output(self) -> bool:
        """Send close_notify without waiting for the peer's, which RFC 8446, section 6.1, does not require.

        Returns False if the kernel's buffer is full; then this is called again.
        """
        connection, tls = self.connection, self._tls
        if not tls.notified:
            tls.notify()
            connection._writable = connection._sending = False  # OpenSSL encrypts nothing after it
            tls.sealed = tls.take()
            try:
                sent = connection._send(tls.sealed)
            except OSError as problem:
                if not would_block(problem):  # the peer is gone
                    tls.sealed = b""
                    return True
                sent = 0
            if not self._count_sent(sent):
                connection._once_sent = True
                connection._wait_until_writable()
                return False
        return True
