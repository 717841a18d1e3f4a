"""TLS of one connection in memory, with the standard library's `ssl`: no socket, no reactor.

OpenSSL reads records until it has application data to return, so one call processes everything that it can read. From a
socket it could read all that the kernel has buffered, and a peer that sends records without data would block the
process. Here OpenSSL reads from an `ssl.MemoryBIO`, which gets a bounded number of bytes and records for each event. It
writes to another one, so that a peer that does not read blocks neither reads nor writes.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from typing import Any

from rtservice.net.tls_bounds import FIRST_READ, MAX_RECORD, MAX_RECORDS

# The most plaintext in one record (RFC 8446, section 5.1).
RECORD_SIZE = 1 << 14

# Bytes of plaintext to encrypt for one send(). More would save system calls, but a MemoryBIO keeps its largest size
# until the connection ends.
SEAL_SIZE = 2 * RECORD_SIZE

_HEADER = 5
_APPLICATION_DATA = 23


class RecordBoundaries:
    """Finds the boundaries of records in a byte stream by their headers (RFC 8446, section 5.1).

    The stream starts at the beginning of a record.
    """

    __slots__ = ("_ahead", "_header")

    def __init__(self) -> None:
        self._ahead = 0  # bytes of the current record that are not received yet
        self._header = b""  # the received part of an incomplete header

    @property
    def at_boundary(self) -> bool:
        """Whether the last record is complete."""
        return not self._ahead and not self._header

    def take(self, data: bytes, cost: int) -> list[int]:
        """Advance by `data`, and return the end offsets of the pieces in which to pass it to OpenSSL.

        A piece has complete records and up to MAX_RECORD bytes; the first one may begin within a record, and the last
        one may end within one. The pieces end before the end of `data` once their records have reached `cost` (1 or
        more): a record with application data costs 1, others more.
        """
        size = len(data)
        at = self._ahead
        begin, ends = 0, []
        while at < size:
            if cost <= 0:
                self._ahead = 0
                ends.append(at)
                return ends
            missing = _HEADER - len(self._header)
            header = self._header + data[at : at + missing]
            if len(header) < _HEADER:
                self._header = header
                at = size
                break
            self._header = b""
            length = header[3] << 8 | header[4]
            # In TLS 1.3 all records look like application data, and OpenSSL continues after at most one message of a
            # record.
            cost -= 1 if header[0] == _APPLICATION_DATA else 1 + length // 128
            end = at + missing + length
            if end - begin > MAX_RECORD and at > begin:
                ends.append(at)
                begin = at
            at = end
        self._ahead = at - size
        ends.append(size)
        return ends


class MemoryTLS:
    """The TLS of one connection: encrypted bytes to plaintext, and the reverse.

    The constructor raises ssl.SSLError and ValueError as `ssl.SSLContext.wrap_bio` does.

    `feed`, `decrypt`, `encrypt` and `take` are methods of the two BIOs and of OpenSSL's object, for the usual message:
    one record, or up to FIRST_READ bytes, while `aligned`; up to RECORD_SIZE of plaintext while `sealed` is empty.
    `receive` and `seal` handle all cases.
    """

    __slots__ = (
        "aligned",
        "decrypt",
        "encrypt",
        "feed",
        "finished",
        "incoming",
        "notified",
        "object",
        "outgoing",
        "problem",
        "read_size",
        "records",
        "rest",
        "sealed",
        "sealed_plain",
        "take",
        "without_data",
    )

    def __init__(self, context: ssl.SSLContext, *, server_side: bool) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self.object = context.wrap_bio(self.incoming, self.outgoing, server_side=server_side)
        # Bound once. The methods of SSLObject would add a Python frame for each message.
        inner = self.object._sslobj  # type: ignore[attr-defined]  # private, not typed
        self.feed: Callable[[bytes | memoryview], int] = self.incoming.write
        self.decrypt: Callable[[int], bytes] = inner.read
        self.encrypt: Callable[[bytes | memoryview], int] = inner.write
        self.take: Callable[[], bytes] = self.outgoing.read
        self.read_size = FIRST_READ  # bytes to read in one event
        self.records = RecordBoundaries()
        self.aligned = True  # the last record passed to OpenSSL was complete
        self.without_data = 0  # bytes since the last application data
        self.rest = b""  # received, to process in a later turn
        self.finished = False  # the peer has sent close_notify
        self.problem: ssl.SSLError | None = None  # the error that ended it, after the data before
        self.sealed: bytes | memoryview = b""  # encrypted output that the kernel has not accepted yet
        self.sealed_plain = 0  # bytes of plaintext in `sealed` that are not counted as sent
        self.notified = False  # close_notify is sent

    def receive(self, data: bytes) -> bytes:
        """Decrypt received bytes, and return the plaintext. Bytes for a later turn are kept in `rest`.

        After this, `finished` and `problem` tell whether the stream ends with this plaintext.
        """
        pieces: list[bytes] = []
        ends = self.records.take(data, MAX_RECORDS)
        self.aligned = self.records.at_boundary
        view = memoryview(data)
        begin = 0
        for end in ends:
            self.feed(view[begin:end])
            begin = end
            if not self._decrypt_all(pieces):
                break
        self.rest = data[end:]
        return self._result(end, pieces)

    def receive_more(self, data: bytes, first: bytes) -> bytes:
        """Continue as `receive` does, after `feed(data)` and a `decrypt` that returned `first`."""
        self._note(data)
        if not first:
            self.finished = True
            return first
        pieces = [first]
        self._decrypt_all(pieces)
        return self._result(len(data), pieces)

    def receive_none(self, data: bytes, problem: ssl.SSLError) -> bytes:
        """Continue as `receive` does, after `feed(data)` and a `decrypt` that raised `problem`."""
        self._note(data)
        self._stopped(problem)
        return self._result(len(data), [])

    def _note(self, data: bytes) -> None:
        """Advance the record boundaries by data that was passed to OpenSSL whole."""
        self.records.take(data, len(data))
        self.aligned = self.records.at_boundary

    def _result(self, size: int, pieces: list[bytes]) -> bytes:
        if not pieces:
            self.without_data += size
            return b""
        self.without_data = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decrypt_all(self, pieces: list[bytes]) -> bool:
        """Decrypt everything that was fed. Return False if the stream ended."""
        try:
            while self.incoming.pending:
                piece = self.decrypt(RECORD_SIZE)
                if not piece:
                    self.finished = True
                    return False
                pieces.append(piece)
        except ssl.SSLError as problem:
            return self._stopped(problem)
        return True

    def _stopped(self, problem: ssl.SSLError) -> bool:
        """Keep the reason why decrypting stopped. Return False if the stream ended."""
        if isinstance(problem, ssl.SSLWantReadError):
            return True
        if isinstance(problem, ssl.SSLZeroReturnError):  # close_notify, after this side has sent its own
            self.finished = True
        else:
            # The traceback refers to frames, which would keep the stream until a garbage collection.
            self.problem = problem.with_traceback(None)
        return False

    def seal(self, piece: bytes | memoryview) -> None:
        """Encrypt up to SEAL_SIZE bytes into `sealed`, which must be empty."""
        at, size = 0, len(piece)
        if size <= RECORD_SIZE:
            at = self.encrypt(piece)
        view = memoryview(piece)
        while at < size:
            at += self.encrypt(view[at : at + RECORD_SIZE])
        self.sealed_plain += size
        self.sealed = self.take()

    def notify(self) -> None:
        """Create close_notify, once. It must be the last message sent (RFC 8446, section 6.1)."""
        if not self.notified:
            self.notified = True
            # SSLWantReadError: the peer's close_notify is not received yet; others: TLS has failed before.
            with contextlib.suppress(ssl.SSLError):
                self.object.unwrap()

    def count_sent(self, sent: int) -> int:
        """Remove the first `sent` bytes from `sealed`, and return how many bytes of plaintext they count as."""
        done = sent == len(self.sealed)
        plain = self.sealed_plain if done else min(sent, self.sealed_plain)
        self.sealed_plain -= plain
        self.sealed = b"" if done else memoryview(self.sealed)[sent:]
        return plain

    # --- TLSFacts ---

    @property
    def handle(self) -> ssl.SSLObject:
        """The SSLObject."""
        return self.object

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's certificate: the dict of `ssl.SSLObject.getpeercert`; None without one.

        It has only an empty `subject` if a name is not UTF-8, which `ssl` cannot decode: a guessed name would be worse
        than none.
        """
        try:
            return self.object.getpeercert() or None
        except UnicodeDecodeError:
            return {"subject": ()}

    @property
    def negotiated_protocol(self) -> bytes | None:
        """The protocol that ALPN chose (RFC 7301), or None."""
        chosen = self.object.selected_alpn_protocol()
        return None if chosen is None else chosen.encode("ascii")

    @property
    def version(self) -> str | None:
        """`TLSv1.3` or `TLSv1.2`."""
        return self.object.version()

    @property
    def cipher(self) -> str | None:
        """OpenSSL's name of the negotiated cipher suite."""
        cipher = self.object.cipher()
        return None if cipher is None else cipher[0]
