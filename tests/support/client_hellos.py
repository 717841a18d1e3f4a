"""ClientHellos for tests: real ones of OpenSSL, and mutations of them from a seed."""

from __future__ import annotations

import random
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress


def real_hello(
    *, alpn: list[str] | None = None, name: str | None = None, maximum: ssl.TLSVersion | None = None, ciphers: str = ""
) -> bytes:
    """Return the ClientHello of a client of Python's `ssl`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if alpn is not None:
        context.set_alpn_protocols(alpn)
    if maximum is not None:
        context.maximum_version = maximum
    if ciphers:
        context.set_ciphers(ciphers)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def record(content: bytes, kind: int = 22, version: bytes = b"\x03\x01") -> bytes:
    return bytes([kind]) + version + struct.pack("!H", len(content)) + content


def message(hello: bytes) -> bytes:
    """Return the handshake message in a ClientHello of one record."""
    return hello[5:]


def fragmented(content: bytes, sizes: list[int]) -> list[bytes]:
    """Split the content into records of these sizes; the last size is repeated."""
    records = []
    at = index = 0
    while at < len(content):
        size = sizes[min(index, len(sizes) - 1)]
        records.append(record(content[at : at + size]))
        at, index = at + size, index + 1
    return records


def with_extension(hello: bytes, kind: int, content: bytes) -> bytes:
    """Return a ClientHello of one record with an extension appended."""
    body = message(hello)[4:]
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2])
    at += 1 + body[at]
    extensions = body[at + 2 :] + struct.pack("!HH", kind, len(content)) + content
    body = body[:at] + struct.pack("!H", len(extensions)) + extensions
    return record(b"\x01" + struct.pack("!I", len(body))[1:] + body)


def _sources() -> list[bytes]:
    return [
        real_hello(),
        real_hello(alpn=["echo"], name="localhost"),
        real_hello(alpn=["h2", "http/1.1"], name="a.example"),
        real_hello(alpn=["x" * 255] * 40, name="n" * 60 + ".example"),
        real_hello(alpn=["other"], maximum=ssl.TLSVersion.TLSv1_2),
        real_hello(maximum=ssl.TLSVersion.TLSv1_2, name="localhost"),
        real_hello(alpn=["echo"], maximum=ssl.TLSVersion.TLSv1_2, ciphers="ECDHE+AESGCM"),
    ]


def mutated_hellos(seed: int, count: int) -> Iterator[bytes]:
    """Yield first bytes of connections: valid ClientHellos and mutations of them.

    The mutations depend only on the seed; the random bytes within the ClientHellos are from OpenSSL.
    """
    rng = random.Random(seed)
    sources = _sources()
    for _ in range(count):
        hello = rng.choice(sources)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
            hello = rng.choice(_CHANGES)(rng, hello)
        yield hello


def _flip(rng: random.Random, hello: bytes) -> bytes:
    changed = bytearray(hello)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _flip_a_length(rng: random.Random, hello: bytes) -> bytes:
    """Change a byte by one: a length near the start, or any byte."""
    changed = bytearray(hello)
    at = rng.choice((3, 4, 6, 7, 8, 43, rng.randrange(max(1, len(changed)))))
    if at < len(changed):
        changed[at] = (changed[at] + rng.choice((-1, 1))) % 256
    return bytes(changed)


def _cut(rng: random.Random, hello: bytes) -> bytes:
    return hello[: rng.randrange(len(hello) + 1)]


def _insert(rng: random.Random, hello: bytes) -> bytes:
    at = rng.randrange(len(hello) + 1)
    return hello[:at] + rng.randbytes(rng.choice((1, 2, 5, 40))) + hello[at:]


def _remove(rng: random.Random, hello: bytes) -> bytes:
    at = rng.randrange(len(hello) + 1)
    return hello[:at] + hello[at + rng.choice((1, 2, 5)) :]


def _append(rng: random.Random, hello: bytes) -> bytes:
    return hello + rng.choice((record(b"\1", 20), record(rng.randbytes(40), 23), hello, rng.randbytes(70)))


def _fragment(rng: random.Random, hello: bytes) -> bytes:
    sizes = [rng.choice((1, 2, 3, 4, 5, 30, 100, 200)) for _ in range(rng.randrange(1, 6))]
    return b"".join(fragmented(message(hello), sizes))


def _interleave(rng: random.Random, hello: bytes) -> bytes:
    """Insert a record that is not part of the handshake transcript between fragments."""
    foreign = (
        record(b""),
        record(b"\1", 20),
        record(b"\1\0", 21),
        record(b"\1\x5a", 21),
        record(b"", 23),
        record(b"x", 23),
        record(b"\1\0\0", 24),
        record(b"", version=b"\x02\x00"),
        record(b"\0\0\0\0"),  # a HelloRequest
    )
    records = fragmented(message(hello), [rng.choice((1, 4, 100, 4096))])
    records.insert(rng.choice((0, 1, len(records))), rng.choice(foreign))
    return b"".join(records)


def _extend(rng: random.Random, hello: bytes) -> bytes:
    if len(hello) < 60 or hello[0] != 22:
        return hello
    extensions = (
        (16, b"\0\5\4echo"),
        (16, b"\0\3\2h2"),
        (16, b"\0\0"),
        (16, b""),
        (16, b"\0\1\0"),
        (16, b"\0\5\4ech"),
        (16, b"\0\5\4echoo"),
        (16, b"\0\6\4echo\0"),
        (0, b"\0\x0c\0\0\x09localhost"),
        (0, b"\0\x0c\1\0\x09localhost"),
        (0, b""),
        (0xFAFA, rng.randbytes(rng.choice((0, 1, 300, 9000)))),
        (0xFAFA, b""),
        (21, bytes(rng.choice((0, 200)))),
    )
    with suppress(IndexError, struct.error):  # if the hello is truncated
        return with_extension(hello, *rng.choice(extensions))
    return hello


def _noise(rng: random.Random, hello: bytes) -> bytes:
    return rng.choice(
        (
            b"GET / HTTP/1.1\r\n\r\n",
            rng.randbytes(rng.choice((1, 5, 100, 20000))),
            b"\x16\x03\x01" + rng.randbytes(100),
            b"\x80\x2e\x01\x03\x03\0\x15\0\0\0\x10" + rng.randbytes(37),  # a ClientHello in SSL 2 format
            record(b"\x01\x7f\xff\xff" + rng.randbytes(100)),
        )
    )


_CHANGES = (
    _flip,
    _flip_a_length,
    _cut,
    _insert,
    _remove,
    _append,
    _fragment,
    _fragment,
    _interleave,
    _interleave,
    _extend,
    _extend,
    _extend,
    _noise,
)
