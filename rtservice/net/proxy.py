"""Parse the header of the PROXY protocol, versions 1 and 2, without I/O.

§ refers to sections of HAProxy's doc/proxy-protocol.txt of 2020/03/05.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from struct import Struct

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress

from rtservice.counted import counted

Address = IPv4Address | IPv6Address | UNIXAddress

# §2.1: the longest line, CRLF included: UNKNOWN with two IPv6 addresses.
_V1_LONGEST = 107

# Valid beginnings of a v1 line without its CRLF. §2.1 has the addresses parsed only with the CRLF, so these expressions
# check characters and field counts only. That is enough to reject a peer of another protocol or family at once.
_V1_BEGINNINGS = {
    b"PROXY TCP4 ": re.compile(rb"[0-9.]{0,15}(?: [0-9.]{0,15}(?: [0-9]{0,5}(?: [0-9]{0,5}\r?)?)?)?"),
    b"PROXY TCP6 ": re.compile(rb"[0-9A-Fa-f:.]*(?: [0-9A-Fa-f:.]*(?: [0-9]{0,5}(?: [0-9]{0,5}\r?)?)?)?"),
    b"PROXY UNKNOWN ": re.compile(rb"[ -~]*\r?"),
    b"PROXY UNKNOWN\r": re.compile(rb""),
}

# §2.2
_V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_V2_FIXED = 16  # signature, version and command, family and protocol, length of the rest
_V2_LOCAL = 0x20
_V2_PROXY = 0x21

# §2.2: family and protocol (the 14th byte) → size of the addresses and ports in bytes; the TLVs follow. Other values
# are reserved. With an unspecified family or protocol the layout is unknown, and the rest is skipped: 0.
_V2_ADDRESSES = {
    **dict.fromkeys((0x00, 0x01, 0x02, 0x10, 0x20, 0x30), 0),
    **dict.fromkeys((0x11, 0x12), 12),
    **dict.fromkeys((0x21, 0x22), 36),
    **dict.fromkeys((0x31, 0x32), 216),
}
_V2_INET = Struct("!4s4sHH")
_V2_INET6 = Struct("!16s16sHH")
_V2_UNIX = Struct("108s108s")

_PP2_TYPE_CRC32C = 0x03  # §2.2.3


# Bytes to keep of input that is not a header, to identify its sender: a request line, or a ClientHello and its version.
BEGINNING = 64


class ProxyError(ValueError):
    """The received bytes are not the beginning of a PROXY header. The text describes what was found.

    The text contains no bytes of the peer, only numbers. The receiver may set `beginning` to the peer's first bytes, up
    to BEGINNING.
    """

    beginning = b""


@dataclass(frozen=True, slots=True)
class Header:
    """A complete header of `length` bytes.

    `source` is the client and `destination` the address that it connected to, in the canonical form of inet_ntop(3).
    Both are None if the connection's own addresses apply. The path of a UNIX socket is one on the proxy's host: use its
    name, since comparing or hashing a UNIXAddress looks for the file on this host.
    """

    length: int
    source: Address | None
    destination: Address | None
    # Not decoded: 21,841 empty TLVs would take 1.4 MB for as long as the connection lasts.
    _tlvs: bytes = b""

    @property
    def tlvs(self) -> tuple[tuple[int, bytes], ...]:
        """The type and value of each TLV (§2.2), in order. Empty for v1, LOCAL and UNSPEC."""
        return tuple((kind, self._tlvs[at:end]) for kind, at, end in _each_tlv(self._tlvs, 0, len(self._tlvs)))


def parse(data: bytes) -> Header | None:
    """Parse the header at the beginning of all bytes received so far (1 or more).

    Returns None if the header is incomplete. Raises ProxyError as soon as the bytes cannot be a header; errors in
    addresses and TLVs are found once the header is complete. Bytes after the header are ignored.
    """
    if data.startswith(b"PROXY "):
        return _parse_v1(data)
    if data.startswith(_V2_SIGNATURE):
        return _parse_v2(data)
    for beginning in (b"PROXY ", _V2_SIGNATURE):
        if beginning.startswith(data):
            return None
        if beginning[0] == data[0]:
            at = next(at for at, byte in enumerate(beginning) if data[at] != byte)
            raise ProxyError(f"no PROXY header: byte {at + 1} is 0x{data[at]:02x} instead of 0x{beginning[at]:02x}")
    raise ProxyError(f"no PROXY header: the first byte is 0x{data[0]:02x}, neither 0x50 (v1) nor 0x0d (v2)")


def _parse_v1(data: bytes) -> Header | None:
    end = data.find(b"\r\n", 0, _V1_LONGEST)
    if end < 0:
        # LF may still follow the CR, as the last byte of the longest line.
        if len(data) - data.endswith(b"\r") >= _V1_LONGEST - 1:
            raise ProxyError(f"v1 header without CRLF in its first {_V1_LONGEST} bytes")
        for beginning, rest in _V1_BEGINNINGS.items():
            if beginning.startswith(data) or (data.startswith(beginning) and rest.fullmatch(data, len(beginning))):
                return None
        raise ProxyError(f"v1 header with {len(data)} bytes that do not begin a line of TCP4, TCP6 or UNKNOWN")
    line = data[:end].decode("latin-1")
    fields = line.split(" ")
    kind = fields[1]
    if kind == "UNKNOWN":
        # The rest of the line has no meaning (§2.1), but must be US-ASCII too.
        if not (line.isascii() and line.isprintable()):
            raise ProxyError("v1 header of UNKNOWN with a control byte or a byte above 0x7f")
        return Header(end + 2, None, None)
    if kind not in ("TCP4", "TCP6"):
        raise ProxyError(f"v1 header with a word of {counted(len(kind), 'byte')} where TCP4, TCP6 or UNKNOWN belongs")
    if len(fields) != 6:
        raise ProxyError(f"v1 header of {kind} with {len(fields)} fields, separated by single spaces, instead of 6")
    _, _, source, destination, source_port, destination_port = fields
    return Header(
        end + 2,
        _v1_address(kind, "source", source, source_port),
        _v1_address(kind, "destination", destination, destination_port),
    )


def _v1_address(kind: str, which: str, host: str, port: str) -> IPv4Address | IPv6Address:
    family = AF_INET if kind == "TCP4" else AF_INET6
    try:
        packed = inet_pton(family, host)
        canonical = inet_ntop(family, packed)
        # Some systems accept leading zeros and scope IDs. An IPv6 address may have several spellings (§2.1).
        if (family == AF_INET and canonical != host) or "%" in host:
            raise ValueError
    except (OSError, ValueError):  # ValueError also for a NUL
        raise ProxyError(f"v1 header of {kind} whose {which} address is not of this family") from None
    try:
        number = int(port)
        if not 0 <= number <= 65535 or str(number) != port:  # int() accepts signs, leading zeros, spaces, underscores
            raise ValueError
    except ValueError:
        raise ProxyError(
            f"v1 header of {kind} whose {which} port is not a number from 0 to 65535 without leading zeros"
        ) from None
    return IPv4Address("TCP", canonical, number) if family == AF_INET else IPv6Address("TCP", canonical, number)


def _parse_v2(data: bytes) -> Header | None:
    size = len(data)
    if size < 13:
        return None
    version_command = data[12]
    if version_command >> 4 != 2:
        raise ProxyError(f"v2 header of version {version_command >> 4} instead of 2")
    if version_command not in (_V2_LOCAL, _V2_PROXY):
        raise ProxyError(f"v2 header with command {version_command & 15}, neither LOCAL (0) nor PROXY (1)")
    if size < 14:
        return None
    # LOCAL: everything after the command except the length is ignored (§2.2), including a reserved family.
    family = data[13] if version_command == _V2_PROXY else 0
    addresses = _V2_ADDRESSES.get(family)
    if addresses is None:
        raise ProxyError(f"v2 header with family and protocol 0x{family:02x}, which is reserved")
    if size < _V2_FIXED:
        return None
    following = data[14] << 8 | data[15]
    if following < addresses:
        raise ProxyError(
            f"v2 header of {counted(following, 'byte')} for 0x{family:02x}, whose addresses are {addresses} bytes"
        )
    length = _V2_FIXED + following
    if size < length:
        return None
    if not addresses:
        return Header(length, None, None)
    _check_tlvs(data, _V2_FIXED + addresses, length)
    tlvs = data[_V2_FIXED + addresses : length]
    source: Address
    destination: Address
    if family == 0x11:
        from_host, to_host, from_port, to_port = _V2_INET.unpack_from(data, _V2_FIXED)
        source = IPv4Address("TCP", inet_ntop(AF_INET, from_host), from_port)
        destination = IPv4Address("TCP", inet_ntop(AF_INET, to_host), to_port)
    elif family == 0x21:
        from_host, to_host, from_port, to_port = _V2_INET6.unpack_from(data, _V2_FIXED)
        source = IPv6Address("TCP", inet_ntop(AF_INET6, from_host), from_port)
        destination = IPv6Address("TCP", inet_ntop(AF_INET6, to_host), to_port)
    elif family == 0x31:
        from_path, to_path = _V2_UNIX.unpack_from(data, _V2_FIXED)
        source, destination = _unix_address(from_path), _unix_address(to_path)
    else:
        # Datagrams: a valid combination that this receiver does not support. For these §2.2 requires UNSPEC, which
        # means the connection's own addresses. The TLVs are at a known place, and are checked.
        return Header(length, None, None, tlvs)
    return Header(length, source, destination, tlvs)


def _unix_address(field: bytes) -> UNIXAddress:
    """Return the address in a sun_path (unix(7)): a path up to the first NUL, or all 108 bytes without one.

    A field that begins with NUL is a name of Linux's abstract namespace. It may contain NULs, and its length is not in
    the header, so NULs at its end are taken as padding. A field of NULs only is an unnamed socket, such as a client's.
    """
    if field[0]:
        return UNIXAddress(field.partition(b"\0")[0])
    return UNIXAddress(field.rstrip(b"\0") or None)


def _each_tlv(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the type of each TLV (§2.2) in `data` from `at` to `end`, and the start and end of its value.

    Raises ProxyError if the TLVs do not fill this range exactly.
    """
    while at < end:
        if end - at < 3:
            raise ProxyError(f"v2 header with {counted(end - at, 'byte')} after its last TLV, too few for another")
        kind = data[at]
        value_at = at + 3
        at = value_at + (data[at + 1] << 8 | data[at + 2])
        if at > end:
            raise ProxyError(
                f"v2 header with a TLV of type 0x{kind:02x} that extends {counted(at - end, 'byte')} beyond it"
            )
        yield kind, value_at, at


def _check_tlvs(data: bytes, at: int, end: int) -> None:
    """Check that TLVs fill `data` from `at` to `end`, and that a checksum among them is right. Raises ProxyError.

    Values, such as those in PP2_TYPE_SSL (§2.2.6), are not decoded.
    """
    checksum_at = 0
    for kind, value_at, value_end in _each_tlv(data, at, end):
        if kind == _PP2_TYPE_CRC32C:
            if value_end - value_at != 4:
                raise ProxyError(f"v2 header with a CRC32C of {counted(value_end - value_at, 'byte')} instead of 4")
            if checksum_at:  # each would be computed over the other
                raise ProxyError("v2 header with more than one CRC32C")
            checksum_at = value_at
    if checksum_at:
        # §2.2.3: over the whole header with this field set to zero, in network byte order.
        received = int.from_bytes(data[checksum_at : checksum_at + 4])
        computed = _crc32c(data[:checksum_at] + b"\0\0\0\0" + data[checksum_at + 4 : end])
        if received != computed:
            raise ProxyError(f"v2 header with CRC32C 0x{received:08x}, but its bytes have 0x{computed:08x}")


def _crc32c_of_byte(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


# The Castagnoli polynomial 0x1EDC6F41, bit-reversed, one byte at a time: RFC 9260, Appendix A. §2.2.3 refers to it as
# RFC 4960, Appendix B.
_CRC32C_TABLE = tuple(_crc32c_of_byte(value) for value in range(256))


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
