"""PROXY headers of version 2, with any content."""

import struct

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")


def v2(command: int, family: int, body: bytes = b"", length: int | None = None) -> bytes:
    """Return a header; `length` is the declared length of the body, by default the correct one."""
    return SIGNATURE + struct.pack("!BBH", command, family, len(body) if length is None else length) + body


def tlv(kind: int, value: bytes = b"") -> bytes:
    """Return a field of a header: type, length and value."""
    return struct.pack("!BH", kind, len(value)) + value
