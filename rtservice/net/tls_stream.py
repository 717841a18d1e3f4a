"""The stream below a connection in TLS, with the standard library's `ssl`."""

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
    """Encrypts what its connection has written, and decrypts for the protocol what the peer has sent.

    The peer's close_notify is to a protocol what FIN is on a plain connection (RFC 8446, section 6.1). FIN without it
    is a connection lost, since what came before may be cut.
    """

    __slots__ = ("_tls",)

    def __init__(self, connection: Connection, tls: MemoryTLS, *, reading: bool) -> None:
        super().__init__(connection)
        self._tls = tls
        self.reading = reading

    def begin(self) -> None:
        """Go on after the handshake: with the protocol, what it has written meanwhile, and what the peer has sent."""
        connection, tls = self.connection, self._tls
        # What came with the client's last message. It is taken first: making a close_notify, OpenSSL would drop it.
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
        if connection.disconnected:
            return
        if connection.disconnecting:  # since before the handshake was done, for which it was read
            connection.reactor.removeReader(self)
        if connection.producer_paused and not connection._out:  # since before the handshake
            connection._corked = False
            connection._all_sent()
            if connection.disconnected:
                return
        connection._flush()
        if tls.rest and not connection.disconnected:
            self._take_rest_now()

    # --- reading ---

    def doRead(self) -> Any:
        """Read once for each event; OpenSSL gets no more than a bounded number of records of that."""
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
                    # The usual message: `_received` without a frame, and without what only other records bring.
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
        """Give plaintext to the protocol, then do what else has come with it. Returns what doRead does."""
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
        if connection._stage is not self or connection._aborting:  # it has ended, or lingers, which reads below TLS
            return None
        if tls.problem is not None:
            connection.error = tls.problem
            return main.CONNECTION_LOST
        if tls.without_data > MAX_BYTES_WITHOUT_DATA:
            connection.error = LocalClose(TOO_MUCH_WITHOUT_DATA)
            return main.CONNECTION_LOST
        if tls.finished:
            # As with FIN, a protocol that has paused is told when it resumes; and it is told once.
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
        self._tls.sealed, self._tls.sealed_plain = b"", 0  # what is sealed is a part of what is unsent

    def _lost(self, problem: OSError) -> None:
        connection, tls = self.connection, self._tls
        if tls.problem is not None:  # after which OpenSSL encrypts nothing; its alert is left
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
        """Send what is unsent, TLS's own messages included, until the kernel is full or it is the turn of others."""
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
                            if idle:  # or a pull producer would be asked again before it has written
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
        """Encrypt the first SEAL_SIZE bytes of what is written, or less; `sealed` is empty before."""
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
        """Count what the kernel took of what is sealed, and return whether that was all."""
        plain = self._tls.count_sent(sent)
        self.connection.bytes_out += plain
        self.connection._unsent -= plain
        return not self._tls.sealed

    def progress(self) -> tuple[int, int]:
        return self.connection.bytes_out, len(self._tls.sealed)

    def finish_output(self) -> bool:
        """Send close_notify, and do not wait for the peer's: RFC 8446, section 6.1, does not ask for it.

        Returns False if the kernel has no room; then it is called again.
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
