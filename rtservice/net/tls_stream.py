"""TLS of one connection in memory, from the standard library's `ssl`: no socket, no reactor.

OpenSSL reads records until it has application data to return, so one call of it processes everything that it can read.
Over a socket that is as much as the kernel holds, and a peer that sends records without data blocks the process. Here
OpenSSL reads from a `ssl.MemoryBIO`, which gets a bounded number of bytes and records for each event, and it writes to
another one, so that a peer that does not read blocks neither reads nor writes.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable

from rtservice.net.tls_bounds import FIRST_READ, MAX_RECORDS

# The most plaintext in one record (RFC 8446, section 5.1).
RECORD_SIZE = 1 << 14

# Bytes of plaintext that are encrypted before they are given to the kernel. Both buffers keep their largest size for as
# long as the connection lives.
SEAL_SIZE = 4 * RECORD_SIZE

_HEADER = 5


class Records:
    """Where the records of a stream of bytes begin, from their headers alone (RFC 8446, section 5.1).

    Starts at the beginning of a record.
    """

    __slots__ = ("_ahead", "_header")

    def __init__(self) -> None:
        self._ahead = 0  # bytes of the current record that have not come yet
        self._header = b""  # the beginning of a header that has not come whole

    @property
    def at_boundary(self) -> bool:
        """Whether all records that began have ended."""
        return not self._ahead and not self._header

    def take(self, data: bytes, most: int) -> int:
        """Go on until `most` more records have begun and ended, and return how many bytes of `data` that took."""
        size = len(data)
        at = self._ahead
        while at < size:
            if not most:
                self._ahead = 0
                return at
            most -= 1
            missing = _HEADER - len(self._header)
            header = self._header + data[at : at + missing]
            if len(header) < _HEADER:
                self._header = header
                at = size
                break
            self._header = b""
            at += missing + (header[3] << 8 | header[4])
        self._ahead = at - size
        return size


class TLSStream:
    """The TLS of one connection: bytes of the peer in, plaintext out, and the reverse.

    Raises ssl.SSLError and ValueError as `ssl.SSLContext.wrap_bio` does.

    `feed`, `decrypt`, `encrypt` and `take` are methods of the two BIOs and of OpenSSL's object, for the usual message:
    up to FIRST_READ bytes while `aligned`, up to RECORD_SIZE of plaintext while nothing is `sealed`. `receive` and
    `seal` are for all cases.
    """

    __slots__ = (
        "aligned",
        "decrypt",
        "encrypt",
        "feed",
        "finished",
        "held",
        "incoming",
        "notified",
        "object",
        "outgoing",
        "problem",
        "reading",
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
        # Bound once; not the object's own methods, which are these in another frame for each message.
        inner = self.object._sslobj  # type: ignore[attr-defined]  # private, not typed
        self.feed: Callable[[bytes], int] = self.incoming.write
        self.decrypt: Callable[[int], bytes] = inner.read
        self.encrypt: Callable[[bytes | memoryview], int] = inner.write
        self.take: Callable[[], bytes] = self.outgoing.read
        self.records = Records()
        self.aligned = True  # all records that were fed have ended
        self.without_data = 0  # bytes since the last application data
        self.rest = b""  # received, but for a later turn
        self.finished = False  # the peer has sent close_notify
        self.problem: ssl.SSLError | None = None  # what ended it, after the data that came before
        self.sealed: bytes | memoryview = b""  # encrypted, not yet taken by the kernel
        self.sealed_plain = 0  # bytes of plaintext in there that are not counted as sent
        self.notified = False  # we have sent close_notify
        self.reading = True  # the protocol has not paused it
        self.held = False  # nothing is read because what TLS has to send does not leave

    def receive(self, data: bytes) -> bytes:
        """Return the plaintext in what the peer has sent; what is for a later turn is in `rest` then.

        After this, `finished` and `problem` say whether the stream ends with this plaintext.
        """
        # In fewer bytes are not many more records: the smallest encrypted one has 22.
        end = self.records.take(data, MAX_RECORDS if len(data) > FIRST_READ else len(data))
        if end < len(data):
            data, self.rest = data[:end], data[end:]
        self.aligned = self.records.at_boundary
        self.feed(data)
        return self._decrypt_all(len(data), [])

    def receive_more(self, data: bytes, first: bytes) -> bytes:
        """As `receive`, after `feed(data)` and a `decrypt` that returned `first`."""
        self.records.take(data, len(data))
        self.aligned = self.records.at_boundary
        if not first:
            self.finished = True
            return first
        return self._decrypt_all(len(data), [first])

    def receive_none(self, data: bytes, problem: ssl.SSLError) -> bytes:
        """As `receive`, after `feed(data)` and a `decrypt` that raised the problem."""
        self.records.take(data, len(data))
        self.aligned = self.records.at_boundary
        self.without_data += len(data)
        self._stopped(problem)
        return b""

    def _decrypt_all(self, size: int, pieces: list[bytes]) -> bytes:
        try:
            while self.incoming.pending or not pieces:
                piece = self.decrypt(RECORD_SIZE)
                if not piece:
                    self.finished = True
                    break
                pieces.append(piece)
        except ssl.SSLError as problem:
            self._stopped(problem)
        if not pieces:
            self.without_data += size
            return b""
        self.without_data = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _stopped(self, problem: ssl.SSLError) -> None:
        if isinstance(problem, ssl.SSLWantReadError):
            return
        if isinstance(problem, ssl.SSLZeroReturnError):  # how `ssl` reports close_notify once ours is sent
            self.finished = True
        else:
            # Its traceback refers to frames, which would keep the stream until a garbage collection.
            self.problem = problem.with_traceback(None)

    def seal(self, piece: bytes | memoryview) -> None:
        """Encrypt a piece of up to SEAL_SIZE bytes; `sealed` is empty before and holds the records after this."""
        at, size = 0, len(piece)
        if size <= RECORD_SIZE:
            at = self.encrypt(piece)
        view = memoryview(piece)
        while at < size:
            at += self.encrypt(view[at : at + RECORD_SIZE])
        self.sealed_plain += size
        self.sealed = self.take()

    def notify(self) -> None:
        """Make our close_notify, once, to be sent after all else (RFC 8446, section 6.1)."""
        if not self.notified:
            self.notified = True
            # SSLWantReadError: the peer's has not come yet; others: TLS has failed before.
            with contextlib.suppress(ssl.SSLError):
                self.object.unwrap()
