"""Parse the ClientHello of a TLS connection before OpenSSL does, to reject clients without a common ALPN protocol.

RFC 7301, section 3.2: a server that supports none of the offered protocols sends the fatal alert
no_application_protocol. This prevents a client from speaking one protocol with a server of another (ALPACA). Python's
`ssl` continues without a protocol instead.

The parser raises no exception, and needs linear time and bounded memory. Input that is not a ClientHello is passed to
OpenSSL, which sends the right alert. Records that an attacker on the path can insert around a valid ClientHello (other
types, empty records) are rejected here: the handshake transcript does not cover them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# Limit of a ClientHello message, in bytes. Clients send 0.2 to 2 KiB, and some KiB more if the session ticket contains
# a client certificate.
MAX_CLIENT_HELLO = 16 * 1024

# The same with record headers of five bytes each; the smallest record has one byte of content.
_MAX_BYTES = 2 * MAX_CLIENT_HELLO

_HANDSHAKE, _CLIENT_HELLO = 22, 1  # a record type and a handshake message type
_OTHER_RECORDS = (20, 21, 23, 24)  # change_cipher_spec, alert, application_data, heartbeat
_MAX_FRAGMENT = 1 << 14
_SERVER_NAME, _ALPN = 0, 16  # extensions

# Fatal alerts in a record of TLS 1.2 (RFC 8446, section 6).
NO_APPLICATION_PROTOCOL = b"\x15\x03\x03\x00\x02\x02\x78"
UNEXPECTED_MESSAGE = b"\x15\x03\x03\x00\x02\x02\x0a"
ILLEGAL_PARAMETER = b"\x15\x03\x03\x00\x02\x02\x2f"


@dataclass(frozen=True, slots=True)
class ClientHello:
    """The ALPN protocols of a client, in its order of preference, and the server name; None without the extension."""

    alpn: tuple[bytes, ...] | None
    server_name: bytes | None


class Unread(Enum):
    """Why no ClientHello was parsed."""

    MORE = "it is incomplete"
    OTHER = "it is another message or malformed: OpenSSL rejects it"
    MISPLACED = "a record of another type comes before its end"
    TOO_LARGE = "it is too large"


@dataclass(frozen=True, slots=True)
class HandshakeRejection:
    """The alert to send and the reason to log for a connection that is closed before OpenSSL gets its bytes."""

    alert: bytes
    reason: str


class ClientHelloReader:
    """Incremental parser for the first bytes of a connection."""

    __slots__ = ("_body", "_bytes", "_next", "_result")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._next = 0  # offset of the next record
        self._body = bytearray()  # content of the records before that
        self._result: ClientHello | Unread = Unread.MORE

    @property
    def data(self) -> bytes:
        """All bytes that were passed to `feed`."""
        return bytes(self._bytes)

    def feed(self, data: bytes) -> ClientHello | Unread:
        """Parse more bytes, and return the result so far. A result other than MORE is final."""
        self._bytes += data
        while self._result is Unread.MORE and self._take_record():
            self._result = self._message()
        return self._result

    def _take_record(self) -> bool:
        """Add the content of the next record to the body. Return False if it is incomplete or of another type."""
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
        # The major version of SSL 3.0 and of every version of TLS.
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
    """Parse the first bytes of a TLS connection. `data` may extend beyond the ClientHello."""
    return ClientHelloReader().feed(data)


class ALPNGate:
    """Keeps the first bytes of a client until it is known to offer a common protocol or to use no ALPN."""

    __slots__ = ("_protocols", "_reader")

    def __init__(self, protocols: tuple[bytes, ...]) -> None:
        self._protocols = protocols
        self._reader = ClientHelloReader()

    def feed(self, data: bytes) -> bytes | HandshakeRejection | None:
        """Add received bytes.

        Returns None if more bytes are needed, all bytes so far if OpenSSL may process them and what follows, or a
        Refusal. The gate must not be used after one of the last two.
        """
        found = self._reader.feed(data)
        if found is Unread.MORE:
            return None
        if found is Unread.MISPLACED:
            return HandshakeRejection(UNEXPECTED_MESSAGE, "TLS record before the ClientHello")
        if found is Unread.TOO_LARGE:
            return HandshakeRejection(ILLEGAL_PARAMETER, "TLS ClientHello too large")
        if isinstance(found, ClientHello) and found.alpn is not None and not set(found.alpn) & set(self._protocols):
            return HandshakeRejection(NO_APPLICATION_PROTOCOL, "no common ALPN protocol")
        return self._reader.data


# --- the message (RFC 8446, section 4.1.2) ---


class _Fields:
    """Reader of consecutive fields. `bad` is set once a field exceeds the remaining bytes."""

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
        """Read a length of `size` bytes, then return that many bytes."""
        return self.take(self.number(size))


def parse_body(body: bytes) -> ClientHello | Unread:
    """Parse the body of a ClientHello message. Returns OTHER if it is malformed."""
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
    """Return the names in an ALPN extension (RFC 7301, section 3.1); empty if it is malformed."""
    fields = _Fields(content)
    names = _Fields(fields.vector(2))
    if fields.bad or fields.left:
        return ()
    protocols = []
    while names.left:
        name = names.vector(1)
        if not name:  # empty or truncated
            return ()
        protocols.append(name)
    return tuple(protocols)


def _host_name(content: bytes) -> bytes | None:
    """Return the name in a server_name extension (RFC 6066, section 3); None if it is absent or malformed."""
    fields = _Fields(content)
    names = _Fields(fields.vector(2))
    kind = names.number(1)
    name = names.vector(2)
    malformed = fields.bad or fields.left or names.bad or names.left
    return None if malformed or kind != 0 or not name else name
