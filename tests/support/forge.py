"""A TLS client that can send arbitrary records, encrypted with the keys of a real session.

Python's `ssl` does the handshake, and its key log provides the secrets; after that each record is encrypted here.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import ssl
import struct
import tempfile
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
CHANGE_CIPHER_SPEC = bytes.fromhex("140303000101")  # a complete record (RFC 8446, appendix D.4)


def record(kind: int, content: bytes, version: int = 0x0303) -> bytes:
    """Return an unencrypted record (RFC 8446, section 5.1)."""
    return struct.pack("!BHH", kind, version, len(content)) + content


def message(kind: int, body: bytes) -> bytes:
    """Return a handshake message (RFC 8446, section 4)."""
    return bytes([kind]) + len(body).to_bytes(3) + body


def client_hello(*, key_share: bytes | None = None, padding: int = 0, version: str = "TLSv1_3") -> bytes:
    """Return a ClientHello message. In TLS 1.3 without a key share the server answers with a HelloRetryRequest."""

    def extension(kind: int, body: bytes) -> bytes:
        return struct.pack("!HH", kind, len(body)) + body

    extensions = extension(10, bytes.fromhex("00040017001d"))  # supported_groups: P-256, X25519
    extensions += extension(13, bytes.fromhex("000a0403080408050806 0401".replace(" ", "")))  # signature_algorithms
    suites = bytes.fromhex("c02cc030c02bc02f")
    if version == "TLSv1_3":
        extensions += extension(43, bytes.fromhex("020304"))  # supported_versions
        shares = b"" if key_share is None else struct.pack("!HH", 23, len(key_share)) + key_share
        extensions += extension(51, struct.pack("!H", len(shares)) + shares)
        suites = bytes.fromhex("13021301")
    if padding:
        extensions += extension(21, bytes(padding))
    body = b"\x03\x03" + os.urandom(32) + b"\x20" + bytes(32)
    body += struct.pack("!H", len(suites)) + suites + b"\x01\x00" + struct.pack("!H", len(extensions)) + extensions
    return message(1, body)


class Forger:
    """A client that does a handshake when created; `seal` encrypts further records."""

    def __init__(
        self,
        address: Any,
        version: str = "TLSv1_3",
        *,
        small_buffers: bool = False,
        before: bytes = b"",
        timeout: float = 20,
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.settimeout(timeout)
        if small_buffers:  # so that the kernel buffers little unread data
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.sock.connect(address)
        self.sock.sendall(before)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        context.set_ciphers("ECDHE+AESGCM")
        with tempfile.NamedTemporaryFile("r") as log:
            context.keylog_filename = log.name
            self._shake(context)
            secrets = {words[0]: bytes.fromhex(words[2]) for words in map(str.split, log) if len(words) == 3}
            context.keylog_filename = None
        suite = self.tls.cipher()[0]
        self._hash = "sha384" if suite.endswith("SHA384") else "sha256"
        self._key_size = 32 if "256" in suite.removesuffix("SHA256") else 16
        if version == "TLSv1_3":
            self._use(secrets["CLIENT_TRAFFIC_SECRET_0"])
            self.seal = self._seal_1_3
        else:
            self._use_1_2(secrets["CLIENT_RANDOM"])
            self.seal = self._seal_1_2

    def _shake(self, context: ssl.SSLContext) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.incoming = incoming
        self.tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        sent = received = b""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                sent += self._send(outgoing.read())
                data = self.sock.recv(1 << 16)
                if not data:
                    raise ConnectionError("the server closed the connection during the handshake") from None
                received += data
                incoming.write(data)
            else:
                break
        self._send(outgoing.read())
        # The random values of both hellos, which follow record header, message header and version.
        self._randoms = received[11:43] + sent[11:43]

    def _send(self, data: bytes) -> bytes:
        self.sock.sendall(data)
        return data

    # --- TLS 1.3: RFC 8446, sections 5.2, 5.3, 7.1 to 7.3 ---

    def _expand(self, label: bytes, size: int) -> bytes:
        full = b"tls13 " + label
        info = struct.pack("!HB", size, len(full)) + full + b"\x00"
        return hmac.digest(self._secret, info + b"\x01", self._hash)[:size]

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(self._expand(b"key", self._key_size))
        self._iv = int.from_bytes(self._expand(b"iv", 12))
        self._sequence = 0

    def _new_secret_1_3(self) -> None:
        self._use(self._expand(b"traffic upd", hashlib.new(self._hash).digest_size))

    def _seal_1_3(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        inner = content + bytes([kind]) + bytes(padding)
        header = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(inner) + 16)
        nonce = (self._iv ^ self._sequence).to_bytes(12)
        self._sequence += 1
        return header + self._aead.encrypt(nonce, inner, header)

    def key_update(self, *, ask: bool = False) -> bytes:
        """Return a KeyUpdate that does or does not request one in return (RFC 8446, section 4.6.3)."""
        sealed = self.seal(HANDSHAKE, message(24, bytes([ask])))
        self._new_secret_1_3()
        return sealed

    # --- TLS 1.2: RFC 5246, sections 5 and 6.3; RFC 5288, section 3 ---

    def _use_1_2(self, master: bytes) -> None:
        size = 2 * self._key_size + 8
        seed = b"key expansion" + self._randoms
        block, a = b"", seed
        while len(block) < size:
            a = hmac.digest(master, a, self._hash)
            block += hmac.digest(master, a + seed, self._hash)
        self._aead = AESGCM(block[: self._key_size])
        self._salt = block[2 * self._key_size :][:4]
        self._sequence = 1  # Finished was 0

    def _seal_1_2(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        explicit = struct.pack("!Q", self._sequence)
        self._sequence += 1
        aad = explicit + struct.pack("!BHH", kind, 0x0303, len(content))
        return record(kind, explicit + self._aead.encrypt(self._salt + explicit, content, aad))

    def __enter__(self) -> Forger:
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()
