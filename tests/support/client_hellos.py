"""ClientHellos for tests: real ones of OpenSSL, and a seeded supply of what is made of them to confuse a reader."""

from __future__ import annotations

import random
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress


def real_hello(
    *, alpn: list[str] | None = None, name: str | None = None, maximum: ssl.TLSVersion | None = None, ciphers: str = ""
) -> bytes:
    """What a client of Python's `ssl` sends first."""
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
    """The handshake message in a ClientHello of one record."""
    return hello[5:]


def fragmented(content: bytes, sizes: list[int]) -> list[bytes]:
    """Records with so many bytes of the content each; the last size is repeated."""
    records = []
    at = index = 0
    while at < len(content):
        size = sizes[min(index, len(sizes) - 1)]
        records.append(record(content[at : at + size]))
        at, index = at + size, index + 1
    return records


def with_extension(hello: bytes, kind: int, content: bytes) -> bytes:
    """A ClientHello of one record with one more extension, at the end."""
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
    """First bytes of connections: what honest clients send, and what is made of that.

    The changes are the same for the same seed; the random bytes of the ClientHellos are OpenSSL's.
    """
    dice = random.Random(seed)
    sources = _sources()
    for _ in range(count):
        hello = dice.choice(sources)
        for _ in range(dice.choice((0, 1, 1, 1, 2, 4))):
            hello = dice.choice(_CHANGES)(dice, hello)
        yield hello


def _flip(dice: random.Random, hello: bytes) -> bytes:
    changed = bytearray(hello)
    for _ in range(dice.choice((1, 1, 2, 8))):
        if changed:
            changed[dice.randrange(len(changed))] = dice.choice((0, 1, 0xFF, dice.randrange(256)))
    return bytes(changed)


def _flip_a_length(dice: random.Random, hello: bytes) -> bytes:
    """Change one of the first bytes, or one of the extensions', by one."""
    changed = bytearray(hello)
    at = dice.choice((3, 4, 6, 7, 8, 43, dice.randrange(max(1, len(changed)))))
    if at < len(changed):
        changed[at] = (changed[at] + dice.choice((-1, 1))) % 256
    return bytes(changed)


def _cut(dice: random.Random, hello: bytes) -> bytes:
    return hello[: dice.randrange(len(hello) + 1)]


def _insert(dice: random.Random, hello: bytes) -> bytes:
    at = dice.randrange(len(hello) + 1)
    return hello[:at] + dice.randbytes(dice.choice((1, 2, 5, 40))) + hello[at:]


def _remove(dice: random.Random, hello: bytes) -> bytes:
    at = dice.randrange(len(hello) + 1)
    return hello[:at] + hello[at + dice.choice((1, 2, 5)) :]


def _append(dice: random.Random, hello: bytes) -> bytes:
    return hello + dice.choice((record(b"\1", 20), record(dice.randbytes(40), 23), hello, dice.randbytes(70)))


def _fragment(dice: random.Random, hello: bytes) -> bytes:
    sizes = [dice.choice((1, 2, 3, 4, 5, 30, 100, 200)) for _ in range(dice.randrange(1, 6))]
    return b"".join(fragmented(message(hello), sizes))


def _interleave(dice: random.Random, hello: bytes) -> bytes:
    """Put records between fragments that are no part of the handshake's transcript."""
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
    records = fragmented(message(hello), [dice.choice((1, 4, 100, 4096))])
    records.insert(dice.choice((0, 1, len(records))), dice.choice(foreign))
    return b"".join(records)


def _extend(dice: random.Random, hello: bytes) -> bytes:
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
        (0xFAFA, dice.randbytes(dice.choice((0, 1, 300, 9000)))),
        (0xFAFA, b""),
        (21, bytes(dice.choice((0, 200)))),
    )
    with suppress(IndexError, struct.error):  # of a hello that is not whole any more
        return with_extension(hello, *dice.choice(extensions))
    return hello


def _noise(dice: random.Random, hello: bytes) -> bytes:
    return dice.choice(
        (
            b"GET / HTTP/1.1\r\n\r\n",
            dice.randbytes(dice.choice((1, 5, 100, 20000))),
            b"\x16\x03\x01" + dice.randbytes(100),
            b"\x80\x2e\x01\x03\x03\0\x15\0\0\0\x10" + dice.randbytes(37),  # a ClientHello as in SSL 2
            record(b"\x01\x7f\xff\xff" + dice.randbytes(100)),
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
