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
from typing import Any

from rtservice.net.tls_bounds import FIRST_READ, MAX_RECORD, MAX_RECORDS

# The most plaintext in one record (RFC 8446, section 5.1).
RECORD_SIZE = 1 << 14

# Bytes of plaintext that are encrypted before they are given to the kernel. More would save system calls, but a
# MemoryBIO keeps its largest size for as long as the connection lives.
SEAL_SIZE = 2 * RECORD_SIZE

_HEADER = 5
_APPLICATION_DATA = 23


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

    def take(self, data: bytes, cost: int) -> list[int]:
        """Go on by `data`, and return where to cut it into pieces for OpenSSL: the end of each.

        A piece has whole records and up to MAX_RECORD bytes; the first one may begin within a record, and the last one
        end within one. There are no more pieces, and the last one ends short of the end of `data`, once its records
        have cost this much (1 or more): 1 for each with application data, more for others.
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
            # In TLS 1.3 all records look like data, and none has more than one message that OpenSSL goes on after.
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
    """The TLS of one connection: bytes of the peer in, plaintext out, and the reverse.

    Raises ssl.SSLError and ValueError as `ssl.SSLContext.wrap_bio` does.

    `feed`, `decrypt`, `encrypt` and `take` are methods of the two BIOs and of OpenSSL's object, for the usual message:
    one record, or up to FIRST_READ bytes, while `aligned`; up to RECORD_SIZE of plaintext while nothing is `sealed`.
    `receive` and `seal` are for all cases.
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
        # Bound once; not the object's own methods, which are these in another frame for each message.
        inner = self.object._sslobj  # type: ignore[attr-defined]  # private, not typed
        self.feed: Callable[[bytes | memoryview], int] = self.incoming.write
        self.decrypt: Callable[[int], bytes] = inner.read
        self.encrypt: Callable[[bytes | memoryview], int] = inner.write
        self.take: Callable[[], bytes] = self.outgoing.read
        self.read_size = FIRST_READ  # what to read in one event
        self.records = Records()
        self.aligned = True  # all records that were fed have ended
        self.without_data = 0  # bytes since the last application data
        self.rest = b""  # received, but for a later turn
        self.finished = False  # the peer has sent close_notify
        self.problem: ssl.SSLError | None = None  # what ended it, after the data that came before
        self.sealed: bytes | memoryview = b""  # encrypted, not yet taken by the kernel
        self.sealed_plain = 0  # bytes of plaintext in there that are not counted as sent
        self.notified = False  # we have sent close_notify

    def receive(self, data: bytes) -> bytes:
        """Return the plaintext in what the peer has sent; what is for a later turn is in `rest` then.

        After this, `finished` and `problem` say whether the stream ends with this plaintext.
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
        """As `receive`, after `feed(data)` and a `decrypt` that returned `first`."""
        self._note(data)
        if not first:
            self.finished = True
            return first
        pieces = [first]
        self._decrypt_all(pieces)
        return self._result(len(data), pieces)

    def receive_none(self, data: bytes, problem: ssl.SSLError) -> bytes:
        """As `receive`, after `feed(data)` and a `decrypt` that raised the problem."""
        self._note(data)
        self._stopped(problem)
        return self._result(len(data), [])

    def _note(self, data: bytes) -> None:
        """Note where records begin in data that was fed whole."""
        self.records.take(data, len(data))
        self.aligned = self.records.at_boundary

    def _result(self, size: int, pieces: list[bytes]) -> bytes:
        if not pieces:
            self.without_data += size
            return b""
        self.without_data = 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _decrypt_all(self, pieces: list[bytes]) -> bool:
        """Decrypt all that was fed; False if that was the last."""
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
        """Note why there is no more to decrypt; False if there never will be."""
        if isinstance(problem, ssl.SSLWantReadError):
            return True
        if isinstance(problem, ssl.SSLZeroReturnError):  # how `ssl` reports close_notify once ours is sent
            self.finished = True
        else:
            # Its traceback refers to frames, which would keep the stream until a garbage collection.
            self.problem = problem.with_traceback(None)
        return False

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

    def count_sent(self, sent: int) -> int:
        """Note that the kernel took so many bytes of what is `sealed`; return how many of plaintext these count for."""
        done = sent == len(self.sealed)
        plain = self.sealed_plain if done else min(sent, self.sealed_plain)
        self.sealed_plain -= plain
        self.sealed = b"" if done else memoryview(self.sealed)[sent:]
        return plain

    # --- what a transport tells about its TLS ---

    @property
    def handle(self) -> ssl.SSLObject:
        """OpenSSL's object."""
        return self.object

    @property
    def peer_certificate(self) -> dict[str, Any] | None:
        """The peer's certificate as `ssl.SSLObject.getpeercert` describes it; None when it showed none.

        Without names and dates when one of the names is not UTF-8, which `ssl` cannot decode: a name that is guessed
        would be worse than none.
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
        """OpenSSL's name of the cipher suite in use."""
        cipher = self.object.cipher()
        return None if cipher is None else cipher[0]
