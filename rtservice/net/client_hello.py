"""The ClientHello of a TLS connection, read before OpenSSL reads it: for ALPN that has to end in an alert.

RFC 7301, section 3.2: a server that has none of the protocols that a client offers answers with the fatal alert
no_application_protocol, and so no client speaks one protocol with a server of another (ALPACA). The callback of
Python's `ssl` goes on without a protocol instead.

A client's bytes are read without an exception, in linear time and bounded memory. What is not a ClientHello is left to
OpenSSL, which refuses it with the right alert. What could be put around an honest client's hello by somebody on the
path (records of other types, empty ones) is not left to it: the transcript of a handshake does not cover them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# Bytes of a ClientHello message. Real ones have 0.2 to 2 KiB; with a session ticket that holds a client's certificate
# some KiB more.
MAX_CLIENT_HELLO = 16 * 1024

# The same with the heads of records, of which the smallest has one byte of content to its five.
_MAX_BYTES = 2 * MAX_CLIENT_HELLO

_HANDSHAKE, _CLIENT_HELLO = 22, 1  # types of a record, and of a handshake message
_OTHER_RECORDS = (20, 21, 23, 24)  # change_cipher_spec, alert, application_data, heartbeat
_MAX_FRAGMENT = 1 << 14
_SERVER_NAME, _ALPN = 0, 16  # extensions

# Fatal alerts in a record of TLS 1.2 (RFC 8446, section 6).
NO_APPLICATION_PROTOCOL = b"\x15\x03\x03\x00\x02\x02\x78"
UNEXPECTED_MESSAGE = b"\x15\x03\x03\x00\x02\x02\x0a"
ILLEGAL_PARAMETER = b"\x15\x03\x03\x00\x02\x02\x2f"


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What a client offers: its ALPN protocols, in its order, and the server's name; None without the extension."""

    alpn: tuple[bytes, ...] | None
    server_name: bytes | None


class Unread(Enum):
    """Why there is no ClientHello."""

    MORE = "it is not complete"
    OTHER = "it is none, or malformed: OpenSSL refuses it"
    MISPLACED = "a record of another type is before its end"
    TOO_LARGE = "it is too large"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is closed before OpenSSL has seen it, and the alert that is sent first."""

    alert: bytes
    reason: str


class ClientHelloReader:
    """Takes the bytes of a connection, from its first on, in any pieces."""

    __slots__ = ("_body", "_bytes", "_next", "_result")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._next = 0  # where the next record begins
        self._body = bytearray()  # of the records before that
        self._result: ClientHello | Unread = Unread.MORE

    @property
    def data(self) -> bytes:
        """All bytes that were fed."""
        return bytes(self._bytes)

    def feed(self, data: bytes) -> ClientHello | Unread:
        """Read on; once the answer is another than MORE it stays."""
        self._bytes += data
        while self._result is Unread.MORE and self._take_record():
            self._result = self._message()
        return self._result

    def _take_record(self) -> bool:
        """Add the content of the next record to the body; whether it is all there and of the right kind."""
        buffered, at = self._bytes, self._next
        if len(buffered) == at:
            return False
        if buffered[at] != _HANDSHAKE:
            misplaced = at > 0 or buffered[at] in _OTHER_RECORDS
            self._result = Unread.MISPLACED if misplaced else Unread.OTHER
            return False
        if len(buffered) < at + 5:
            return False
        length = int.from_bytes(buffered[at + 3 : at + 5])
        # SSL 3.0 and TLS; the major version has never been another.
        if buffered[at + 1] != 3 or length > _MAX_FRAGMENT:
            self._result = Unread.OTHER
            return False
        if at + 5 + length > _MAX_BYTES:
            self._result = Unread.TOO_LARGE
            return False
        if len(buffered) < at + 5 + length:
            return False
        self._next = at + 5 + length
        self._body += buffered[at + 5 : self._next]
        return True

    def _message(self) -> ClientHello | Unread:
        body = self._body
        if body and body[0] != _CLIENT_HELLO:
            return Unread.OTHER
        if len(body) < 4:
            return Unread.MORE
        length = int.from_bytes(body[1:4])
        if length > MAX_CLIENT_HELLO:
            return Unread.TOO_LARGE
        if len(body) < 4 + length:
            return Unread.MORE
        return parse_body(bytes(body[4 : 4 + length]))


def parse_client_hello(data: bytes) -> ClientHello | Unread:
    """Read the first bytes of a TLS connection, which may be more than its ClientHello."""
    return ClientHelloReader().feed(data)


class ALPNGate:
    """Holds back the first bytes of a client until it is known to have one of our protocols, or not to use ALPN."""

    __slots__ = ("_protocols", "_reader")

    def __init__(self, protocols: tuple[bytes, ...]) -> None:
        self._protocols = protocols
        self._reader = ClientHelloReader()

    def feed(self, data: bytes) -> bytes | Refusal | None:
        """Take what the client has sent next.

        Returns None to wait for more; or all bytes that were fed, which are OpenSSL's now, and whatever follows; or a
        Refusal. After one of the last two the gate is not to be used again.
        """
        found = self._reader.feed(data)
        if found is Unread.MORE:
            return None
        if found is Unread.MISPLACED:
            return Refusal(UNEXPECTED_MESSAGE, "TLS record before the ClientHello")
        if found is Unread.TOO_LARGE:
            return Refusal(ILLEGAL_PARAMETER, "TLS ClientHello too large")
        if isinstance(found, ClientHello) and found.alpn is not None and not set(found.alpn) & set(self._protocols):
            return Refusal(NO_APPLICATION_PROTOCOL, "no common ALPN protocol")
        return self._reader.data


# --- the message (RFC 8446, section 4.1.2) ---


class _Fields:
    """Reads fields one after the other; `bad` once one was longer than what is left."""

    __slots__ = ("_at", "_data", "bad")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.bad = False

    @property
    def left(self) -> bool:
        return not self.bad and self._at < len(self._data)

    def take(self, length: int) -> bytes:
        end = self._at + length
        if self.bad or end > len(self._data):
            self.bad = True
            return b""
        taken, self._at = self._data[self._at : end], end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def vector(self, size: int) -> bytes:
        """Bytes behind their length, which has `size` bytes."""
        return self.take(self.number(size))


def parse_body(body: bytes) -> ClientHello | Unread:
    """Read the body of a ClientHello message; OTHER when it is malformed."""
    fields = _Fields(body)
    fields.take(2 + 32)  # version, random
    fields.vector(1)  # session ID
    fields.vector(2)  # cipher suites
    fields.vector(1)  # compression methods
    if not fields.left:  # no extensions, or malformed
        return Unread.OTHER if fields.bad else ClientHello(None, None)
    extensions = _Fields(fields.vector(2))
    if fields.bad or fields.left:
        return Unread.OTHER
    found: dict[int, bytes] = {}
    while extensions.left:
        kind = extensions.number(2)
        content = extensions.vector(2)
        if extensions.bad or (kind in found and kind in (_SERVER_NAME, _ALPN)):  # RFC 8446, section 4.2: once each
            return Unread.OTHER
        found[kind] = content
    alpn = None
    if _ALPN in found:
        alpn = _protocols(found[_ALPN])
        if not alpn:
            return Unread.OTHER
    return ClientHello(alpn, _host_name(found.get(_SERVER_NAME, b"")))


def _protocols(content: bytes) -> tuple[bytes, ...]:
    """The names in an ALPN extension (RFC 7301, section 3.1); none when it is malformed."""
    fields = _Fields(content)
    names = _Fields(fields.vector(2))
    if fields.bad or fields.left:
        return ()
    protocols = []
    while names.left:
        name = names.vector(1)
        if not name:  # also when it is cut short
            return ()
        protocols.append(name)
    return tuple(protocols)


def _host_name(content: bytes) -> bytes | None:
    """The name in a server_name extension (RFC 6066, section 3); None when there is none, or it is malformed."""
    fields = _Fields(content)
    names = _Fields(fields.vector(2))
    kind = names.number(1)
    name = names.vector(2)
    malformed = fields.bad or fields.left or names.bad or names.left
    return None if malformed or kind != 0 or not name else name
