"""The PROXY protocol parser: valid headers, invalid headers, and fuzzing against an independent implementation."""

import ipaddress
import random
import re
import socket
import struct
import tracemalloc

import pytest
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress

from rtservice.net import proxy
from rtservice.net.proxy import Header, ProxyError, parse
from tests.support.proxy_headers import SIGNATURE, tlv, v2

# ---- making headers -------------------------------------------------------------------------------------------------


def inet(source="192.0.2.1", destination="198.51.100.2", ports=(56324, 443)) -> bytes:
    return socket.inet_aton(source) + socket.inet_aton(destination) + struct.pack("!HH", *ports)


def inet6(source="2001:db8::1", destination="2001:db8::2", ports=(56324, 443)) -> bytes:
    hosts = (socket.inet_pton(socket.AF_INET6, host) for host in (source, destination))
    return b"".join(hosts) + struct.pack("!HH", *ports)


def unix(source=b"", destination=b"/run/rt.sock") -> bytes:
    return source.ljust(108, b"\0") + destination.ljust(108, b"\0")


def crc32c(data: bytes) -> int:
    """Return the CRC32c by its definition (RFC 9260, Appendix A): a polynomial remainder, without a table."""
    bits = "".join(f"{byte:08b}"[::-1] for byte in data) + "0" * 32
    bits = "".join("10"[int(bit)] for bit in bits[:32]) + bits[32:]
    rest = 0
    for bit in bits:
        rest = rest << 1 | int(bit)
        if rest >> 32:
            rest ^= 0x11EDC6F41
    return int(f"{rest:032b}"[::-1], 2) ^ 0xFFFFFFFF


def checked(header: bytes) -> bytes:
    """Return the header with its checksum filled in after `03 00 04`."""
    at = header.index(tlv(3, b"####")) + 3
    zeroed = header[:at] + bytes(4) + header[at + 4 :]
    return header[:at] + struct.pack("!I", crc32c(zeroed)) + header[at + 4 :]


# ---- the cases ------------------------------------------------------------------------------------------------------

CLIENT, SERVER = IPv4Address("TCP", "192.0.2.1", 56324), IPv4Address("TCP", "198.51.100.2", 443)
CLIENT6, SERVER6 = IPv6Address("TCP", "2001:db8::1", 56324), IPv6Address("TCP", "2001:db8::2", 443)
LISTENER = UNIXAddress(b"/run/rt.sock")
LONGEST6 = "abcd:ef01:2345:6789:abcd:ef01:2345:6789"
SSL = tlv(0x20, b"\x07\0\0\0\0" + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"example.com"))
ALPN_AND_SNI = tlv(1, b"h2") + tlv(2, "пример.example".encode())

# name: (header, source, destination, TLVs)
VALID = {
    "v1 TCP4": (b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n", CLIENT, SERVER, ()),
    "v1 TCP4, longest": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        IPv4Address("TCP", "255.255.255.255", 65535),
        IPv4Address("TCP", "255.255.255.255", 65535),
        (),
    ),
    "v1 TCP4, shortest": (
        b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n",
        IPv4Address("TCP", "0.0.0.0", 0),
        IPv4Address("TCP", "0.0.0.0", 0),
        (),
    ),
    "v1 TCP6": (b"PROXY TCP6 2001:db8::1 2001:db8::2 56324 443\r\n", CLIENT6, SERVER6, ()),
    "v1 TCP6, another spelling": (b"PROXY TCP6 2001:0DB8:0:0::1 2001:DB8::0:2 56324 443\r\n", CLIENT6, SERVER6, ()),
    "v1 TCP6, longest": (
        f"PROXY TCP6 {LONGEST6} {LONGEST6} 65535 65535\r\n".encode(),
        IPv6Address("TCP", LONGEST6, 65535),
        IPv6Address("TCP", LONGEST6, 65535),
        (),
    ),
    # The spelling of inet_ntop(3), and therefore of HAProxy.
    "v1 TCP6, IPv4-mapped": (
        b"PROXY TCP6 ::ffff:192.0.2.1 ::FFFF:c633:6402 56324 443\r\n",
        IPv6Address("TCP", "::ffff:192.0.2.1", 56324),
        IPv6Address("TCP", "::ffff:198.51.100.2", 443),
        (),
    ),
    "v1 UNKNOWN": (b"PROXY UNKNOWN\r\n", None, None, ()),
    "v1 UNKNOWN, a space": (b"PROXY UNKNOWN \r\n", None, None, ()),
    "v1 UNKNOWN, addresses": (b"PROXY UNKNOWN 192.0.2.1 ::1 1 99999\r\n", None, None, ()),
    "v1 UNKNOWN, anything": (b"PROXY UNKNOWN   ~{TCP4 PROXY}~ \r\n", None, None, ()),
    "v1 UNKNOWN, longest": (b"PROXY UNKNOWN ".ljust(105, b"f") + b"\r\n", None, None, ()),
    "v2 TCP4": (v2(0x21, 0x11, inet()), CLIENT, SERVER, ()),
    "v2 TCP6": (v2(0x21, 0x21, inet6()), CLIENT6, SERVER6, ()),
    "v2 TCP6, IPv4-mapped": (
        v2(0x21, 0x21, inet6("::ffff:192.0.2.1")),
        IPv6Address("TCP", "::ffff:192.0.2.1", 56324),
        SERVER6,
        (),
    ),
    "v2 UNIX, a client without a name": (v2(0x21, 0x31, unix()), UNIXAddress(None), LISTENER, ()),
    "v2 UNIX, all 108 bytes": (v2(0x21, 0x31, unix(b"/" * 108)), UNIXAddress(b"/" * 108), LISTENER, ()),
    "v2 UNIX, bytes after the NUL": (v2(0x21, 0x31, unix(b"/a\0b\0/c")), UNIXAddress(b"/a"), LISTENER, ()),
    "v2 UNIX, abstract": (v2(0x21, 0x31, unix(b"\0a\0b")), UNIXAddress(b"\0a\0b"), LISTENER, ()),
    "v2 UNIX, not UTF-8": (v2(0x21, 0x31, unix(b"/\xff\x1b")), UNIXAddress(b"/\xff\x1b"), LISTENER, ()),
    "v2 UDP4": (v2(0x21, 0x12, inet()), None, None, ()),
    "v2 UDP6, TLVs": (v2(0x21, 0x22, inet6() + tlv(4)), None, None, ((4, b""),)),
    "v2 UNIX datagram": (v2(0x21, 0x32, unix()), None, None, ()),
    "v2 UNSPEC": (v2(0x21, 0x00), None, None, ()),
    "v2 UNSPEC, something": (v2(0x21, 0x00, b"\xff\xff\xff\xff"), None, None, ()),
    "v2 UNSPEC over STREAM": (v2(0x21, 0x01, b"?"), None, None, ()),
    "v2 UNSPEC over DGRAM": (v2(0x21, 0x02), None, None, ()),
    "v2 INET over UNSPEC": (v2(0x21, 0x10, b"shorter"), None, None, ()),
    "v2 INET6 over UNSPEC": (v2(0x21, 0x20), None, None, ()),
    "v2 UNIX over UNSPEC": (v2(0x21, 0x30), None, None, ()),
    "v2 LOCAL": (v2(0x20, 0x00), None, None, ()),
    "v2 LOCAL, addresses": (v2(0x20, 0x11, inet()), None, None, ()),
    "v2 LOCAL, too short for its family": (v2(0x20, 0x21, b"\0"), None, None, ()),
    "v2 LOCAL, a reserved family": (v2(0x20, 0xFF, b"anything"), None, None, ()),
    "v2 LOCAL, TLVs that overrun": (v2(0x20, 0x11, inet() + b"\x01\xff\xff"), None, None, ()),
    "v2 LOCAL, a wrong checksum": (v2(0x20, 0x11, inet() + tlv(3, b"####")), None, None, ()),
    "v2 an empty TLV": (v2(0x21, 0x11, inet() + tlv(0xE0)), CLIENT, SERVER, ((0xE0, b""),)),
    "v2 TLVs": (
        v2(0x21, 0x11, inet() + ALPN_AND_SNI + SSL + tlv(4, bytes(9))),
        CLIENT,
        SERVER,
        ((1, b"h2"), (2, "пример.example".encode()), (0x20, SSL[3:]), (4, bytes(9))),
    ),
    # The content of a value is not checked.
    "v2 a TLV of TLS whose own overruns": (
        v2(0x21, 0x11, inet() + tlv(0x20, b"\x01\0\0\0\0\x21\xff\xff")),
        CLIENT,
        SERVER,
        ((0x20, b"\x01\0\0\0\0\x21\xff\xff"),),
    ),
    "v2 CRC32C": (
        checked(v2(0x21, 0x11, inet() + tlv(3, b"####"))),
        CLIENT,
        SERVER,
        ((3, bytes.fromhex("20ec9549")),),
    ),
    "v2 CRC32C among others": (
        checked(v2(0x21, 0x31, unix() + tlv(4, b"\0") + tlv(3, b"####") + tlv(5, b"id"))),
        UNIXAddress(None),
        LISTENER,
        ((4, b"\0"), (3, bytes.fromhex("0142a583")), (5, b"id")),
    ),
}

NOT_A_BEGINNING = "bytes that do not begin a line of TCP4, TCP6 or UNKNOWN"
NOT_IPV4 = "v1 header of TCP4 whose source address is not of this family"
NOT_IPV6 = "v1 header of TCP6 whose source address is not of this family"
NOT_A_PORT = "v1 header of TCP4 whose destination port is not a number from 0 to 65535 without leading zeros"


def tcp4(source="192.0.2.1", destination="198.51.100.2", source_port="56324", destination_port="443") -> bytes:
    return f"PROXY TCP4 {source} {destination} {source_port} {destination_port}\r\n".encode("latin-1")


def tcp6(source: str) -> bytes:
    return f"PROXY TCP6 {source} ::1 1 2\r\n".encode("latin-1")


# name: (bytes, how many of them are needed for the rejection or None for all, part of the error)
INVALID = {
    "HTTP": (b"GET / HTTP/1.1\r\n", 1, "the first byte is 0x47, neither 0x50 (v1) nor 0x0d (v2)"),
    "HTTP's POST": (b"POST / HTTP/1.1\r\n", 2, "byte 2 is 0x4f instead of 0x52"),
    "TLS": (bytes.fromhex("1603010200010001fc"), 1, "the first byte is 0x16"),
    "an empty line": (b"\r\n\r\n\r\n", 5, "byte 5 is 0x0d instead of 0x00"),
    "v1 lower case": (b"proxy TCP4", 1, "the first byte is 0x70"),
    "v1 without a space": (b"PROXY\r\n", 6, "byte 6 is 0x0d instead of 0x20"),
    "v1 two spaces": (b"PROXY  TCP4", 7, NOT_A_BEGINNING),
    "v1 no word": (b"PROXY \r\n", 7, NOT_A_BEGINNING),
    "v1 UDP4": (b"PROXY UDP4 192.0.2.1", 8, NOT_A_BEGINNING),
    "v1 TCP5": (b"PROXY TCP5 192.0.2.1", 10, NOT_A_BEGINNING),
    "v1 the word alone": (b"PROXY TCP4\r\n", 11, NOT_A_BEGINNING),
    "v1 the whole line of another word": (b"PROXY TCP4\x1b[2J 1 2\r\n", 11, NOT_A_BEGINNING),
    "v1 UNKNOWN goes on": (b"PROXY UNKNOWNS\r\n", 14, NOT_A_BEGINNING),
    "v1 UNKNOWN, a tab": (b"PROXY UNKNOWN \t\r\n", 15, NOT_A_BEGINNING),
    "v1 UNKNOWN, DEL": (b"PROXY UNKNOWN \x7f\r\n", 15, NOT_A_BEGINNING),
    "v1 UNKNOWN, above 0x7f": (b"PROXY UNKNOWN \xff\r\n", 15, NOT_A_BEGINNING),
    "v1 UNKNOWN, LF alone": (b"PROXY UNKNOWN\n", 14, NOT_A_BEGINNING),
    "v1 UNKNOWN, CR alone": (b"PROXY UNKNOWN\r\r\n", 15, NOT_A_BEGINNING),
    "v1 UNKNOWN, CR in the line": (b"PROXY UNKNOWN a\rb\r\n", 17, NOT_A_BEGINNING),
    "v1 UNKNOWN, too long": (b"PROXY UNKNOWN ".ljust(106, b"f") + b"\r\n", 106, "without CRLF in its first 107 bytes"),
    "v1 TCP4, LF alone": (tcp4().replace(b"\r", b""), 44, NOT_A_BEGINNING),
    "v1 TCP4, CR alone": (tcp4().replace(b"\n", b"G"), 45, NOT_A_BEGINNING),
    "v1 TCP4, a space more": (tcp4(destination_port="443 "), 44, NOT_A_BEGINNING),
    "v1 TCP4, a double space": (tcp4(destination=" 198.51.100.2"), 26, NOT_A_BEGINNING),
    "v1 TCP4, a field less": (b"PROXY TCP4 192.0.2.1 198.51.100.2 443\r\n", 38, NOT_A_BEGINNING),
    "v1 TCP4, no field": (b"PROXY TCP4 \r\n", 12, NOT_A_BEGINNING),
    "v1 TCP4, IPv6": (tcp4("::1"), 12, NOT_A_BEGINNING),
    "v1 TCP4, a name": (tcp4("localhost"), 12, NOT_A_BEGINNING),
    "v1 TCP4, 256": (tcp4("192.0.2.256"), None, NOT_IPV4),
    "v1 TCP4, 999": (tcp4("999.0.2.1"), None, NOT_IPV4),
    "v1 TCP4, a leading zero": (tcp4("192.0.2.01"), None, NOT_IPV4),
    "v1 TCP4, three parts": (tcp4("192.0.2"), None, NOT_IPV4),
    "v1 TCP4, five parts": (tcp4("1.1.2.2.1"), None, NOT_IPV4),
    "v1 TCP4, one number": (tcp4("3221225985"), None, NOT_IPV4),
    "v1 TCP4, nothing": (tcp4(""), None, NOT_IPV4),
    "v1 TCP4, destination": (tcp4(destination="1.2.3."), None, "whose destination address is not of this family"),
    "v1 TCP4, source port": (tcp4(source_port=""), None, "whose source port is not a number from 0 to 65535"),
    "v1 port 65536": (tcp4(destination_port="65536"), None, NOT_A_PORT),
    "v1 port 99999": (tcp4(destination_port="99999"), None, NOT_A_PORT),
    "v1 port of six digits": (tcp4(destination_port="000443"), 46, NOT_A_BEGINNING),
    "v1 port with a leading zero": (tcp4(destination_port="0443"), None, NOT_A_PORT),
    "v1 port 00": (tcp4(destination_port="00"), None, NOT_A_PORT),
    "v1 port missing": (tcp4(destination_port=""), None, NOT_A_PORT),
    "v1 port with a sign": (tcp4(destination_port="+443"), 41, NOT_A_BEGINNING),
    "v1 port below 0": (tcp4(destination_port="-1"), 41, NOT_A_BEGINNING),
    "v1 port with an underscore": (tcp4(destination_port="4_3"), 42, NOT_A_BEGINNING),
    "v1 port with a tab": (tcp4(destination_port="443\t"), 44, NOT_A_BEGINNING),
    "v1 port with a superscript": (tcp4(destination_port="\xb2"), 41, NOT_A_BEGINNING),
    "v1 TCP6, IPv4": (tcp6("192.0.2.1"), None, NOT_IPV6),
    "v1 TCP6, a scope": (tcp6("fe80::1%eth0"), 19, NOT_A_BEGINNING),
    "v1 TCP6, brackets": (tcp6("[::1]"), 12, NOT_A_BEGINNING),
    "v1 TCP6, a prefix": (tcp6("::1/64"), 15, NOT_A_BEGINNING),
    "v1 TCP6, two double colons": (tcp6("1::2::3"), None, NOT_IPV6),
    "v1 TCP6, seven groups": (tcp6("1:2:3:4:5:6:7"), None, NOT_IPV6),
    "v1 TCP6, nine groups": (tcp6("1:2:3:4:5:6:7:8:9"), None, NOT_IPV6),
    "v1 TCP6, five digits": (tcp6("::12345"), None, NOT_IPV6),
    "v1 TCP6, a NUL": (tcp6("::1\0"), 15, NOT_A_BEGINNING),
    "v1 TCP6, too long": (tcp6("0:" * 50), 106, "without CRLF in its first 107 bytes"),
    "v2 the signature's last byte": (SIGNATURE[:-1] + b"\r", 12, "byte 12 is 0x0d instead of 0x0a"),
    "v2 of version 1": (v2(0x11, 0x11, inet()), 13, "v2 header of version 1 instead of 2"),
    "v2 of version 3": (v2(0x31, 0x11, inet()), 13, "v2 header of version 3 instead of 2"),
    "v2 command 2": (v2(0x22, 0x11, inet()), 13, "v2 header with command 2, neither LOCAL (0) nor PROXY (1)"),
    "v2 command 15": (v2(0x2F, 0x00), 13, "v2 header with command 15"),
    "v2 a reserved family": (v2(0x21, 0x41, inet()), 14, "v2 header with family and protocol 0x41, which is reserved"),
    "v2 a reserved protocol": (v2(0x21, 0x13, inet()), 14, "v2 header with family and protocol 0x13"),
    "v2 UNSPEC over a reserved protocol": (v2(0x21, 0x03), 14, "v2 header with family and protocol 0x03"),
    "v2 TCP4, no addresses": (v2(0x21, 0x11), 16, "v2 header of 0 bytes for 0x11, whose addresses are 12 bytes"),
    "v2 TCP4, a byte less": (v2(0x21, 0x11, inet()[:-1]), 16, "of 11 bytes for 0x11, whose addresses are 12 bytes"),
    "v2 TCP6, IPv4 addresses": (v2(0x21, 0x21, inet()), 16, "of 12 bytes for 0x21, whose addresses are 36 bytes"),
    "v2 UNIX, a byte less": (v2(0x21, 0x31, unix()[1:]), 16, "of 215 bytes for 0x31, whose addresses are 216 bytes"),
    "v2 UDP4, no addresses": (v2(0x21, 0x12), 16, "v2 header of 0 bytes for 0x12, whose addresses are 12 bytes"),
    "v2 one byte more": (v2(0x21, 0x11, inet() + b"\0"), None, "with 1 byte after its last TLV, too few for another"),
    "v2 two bytes more": (v2(0x21, 0x11, inet() + tlv(4) + b"\4\0"), None, "with 2 bytes after its last TLV"),
    "v2 a TLV overruns": (
        v2(0x21, 0x11, inet() + b"\1\0\3h2"),
        None,
        "a TLV of type 0x01 that extends 1 byte beyond it",
    ),
    "v2 a TLV overruns by far": (
        v2(0x21, 0x11, inet() + b"\4\xff\xff"),
        None,
        "0x04 that extends 65535 bytes beyond it",
    ),
    "v2 the second TLV overruns": (v2(0x21, 0x22, inet6() + tlv(4) + b"\4\0\1"), None, "that extends 1 byte beyond it"),
    "v2 CRC32C of no byte": (v2(0x21, 0x11, inet() + tlv(3)), None, "with a CRC32C of 0 bytes instead of 4"),
    "v2 CRC32C of 5 bytes": (v2(0x21, 0x11, inet() + tlv(3, bytes(5))), None, "with a CRC32C of 5 bytes instead of 4"),
    "v2 CRC32C of 0": (
        v2(0x21, 0x11, inet() + tlv(3, bytes(4))),
        None,
        "v2 header with CRC32C 0x00000000, but its bytes have 0x20ec9549",
    ),
    "v2 CRC32C in the other order": (v2(0x21, 0x11, inet() + tlv(3, bytes.fromhex("4995ec20"))), None, "CRC32C 0x4995"),
    "v2 CRC32C of a datagram": (v2(0x21, 0x12, inet() + tlv(3, bytes(4))), None, "v2 header with CRC32C 0x00000000"),
    "v2 two CRC32C": (
        v2(0x21, 0x11, inet() + 2 * tlv(3, bytes(4))),
        None,
        "v2 header with more than one CRC32C",
    ),
}


def facts(header: Header) -> tuple:
    """Return the fields of a header for comparison; comparing UNIXAddress objects would access the file system."""
    return header.length, plain(header.source), plain(header.destination), header.tlvs


def plain(address) -> object:
    return address.name if isinstance(address, UNIXAddress) else address


def answer(data: bytes) -> tuple | str | None:
    """Return the result of parse(), or the text of its error."""
    try:
        header = parse(data)
    except ProxyError as refusal:
        text = str(refusal)
        # Printable in any log, for any input.
        assert text.isascii()
        assert text.isprintable()
        return text
    return None if header is None else facts(header)


@pytest.mark.parametrize("case", VALID.values(), ids=VALID)
def test_a_header_is_complete_exactly_at_its_last_byte(case) -> None:
    data, source, destination, tlvs = case
    for length in range(len(data)):
        assert parse(data[:length]) is None, length
    assert answer(data) == (len(data), plain(source), plain(destination), tlvs)
    assert type(parse(data).source) is type(source)
    assert type(parse(data).destination) is type(destination)


@pytest.mark.parametrize("case", VALID.values(), ids=VALID)
@pytest.mark.parametrize("after", [b"\0", b"\r\n", b"GET / HTTP/1.1\r\n", b"\xff" * 70_000, "again"])
def test_data_after_a_header_does_not_change_the_result(case, after) -> None:
    data = case[0]
    assert answer(data + (data if after == "again" else after)) == answer(data)


@pytest.mark.parametrize("case", INVALID.values(), ids=INVALID)
def test_an_invalid_header_is_rejected_at_the_first_wrong_byte(case) -> None:
    data, soonest, text = case
    soonest = len(data) if soonest is None else soonest
    for length in range(soonest):
        assert parse(data[:length]) is None, length
    with pytest.raises(ProxyError, match=re.escape(text)):
        parse(data[:soonest])
    # Longer prefixes are rejected too; the complete header may have another error.
    for length in range(soonest, len(data) + 1):
        assert isinstance(answer(data[:length]), str), length
    assert isinstance(answer(data + b"\r\n"), str)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b"PROXY UDP4 192.0.2.1 198.51.100.2 1 2\r\n", "a word of 4 bytes where TCP4, TCP6 or UNKNOWN belongs"),
        (b"PROXY \r\n", "a word of 0 bytes where TCP4, TCP6 or UNKNOWN belongs"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.2 443\r\n", "v1 header of TCP4 with 5 fields"),
        (b"PROXY TCP6 ::1  ::2 1 2\r\n", "v1 header of TCP6 with 7 fields, separated by single spaces, instead of 6"),
        (b"PROXY UNKNOWN \x1b[2J\r\n", "v1 header of UNKNOWN with a control byte or a byte above 0x7f"),
        (b"PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", NOT_IPV6),
        (b"PROXY TCP6 ::1\0 ::1 1 2\r\n", NOT_IPV6),
        (b"PROXY TCP4 \xff ::1 1 2\r\n", NOT_IPV4),
        (tcp4(destination_port="+443"), NOT_A_PORT),
        (tcp4(destination_port="-1"), NOT_A_PORT),
        (tcp4(destination_port="4_3"), NOT_A_PORT),
        (tcp4(destination_port="443\t"), NOT_A_PORT),
        (tcp4(destination_port="\xb2"), NOT_A_PORT),
        (tcp4(destination_port="1" * 50), NOT_A_PORT),
    ],
)
def test_a_complete_invalid_line_is_rejected_with_its_reason(line, text) -> None:
    with pytest.raises(ProxyError, match=re.escape(text)):
        parse(line)


@pytest.mark.parametrize("line", [tcp4("192.0.2.01"), tcp6("fe80::1%eth0")])
def test_a_lenient_inet_pton_does_not_change_the_result(line, monkeypatch) -> None:
    def reads_more(family, host):
        return socket.inet_pton(family, re.sub(r"%.*|\b0+(?=[1-9])", "", host))

    monkeypatch.setattr(proxy, "inet_pton", reads_more)
    with pytest.raises(ProxyError, match="whose source address is not of this family"):
        parse(line)


def test_empty_input_is_incomplete() -> None:
    assert parse(b"") is None


def test_the_longest_possible_v2_header_is_accepted() -> None:
    values = tlv(3, b"####") + tlv(4, bytes(65535 - 12 - 7 - 3))
    data = checked(v2(0x21, 0x11, inet() + values))
    assert len(data) == 65551
    assert parse(data[:-1]) is None
    header = parse(data + b"after")
    assert header.length == len(data)
    assert header.source == CLIENT


def test_the_memory_for_a_header_does_not_depend_on_its_number_of_tlvs() -> None:
    count = (65535 - 12) // 3
    data = v2(0x21, 0x11, inet() + tlv(4) * count)
    sizes = []
    for _ in range(3):  # other threads and the coverage measurement allocate memory too, but not in each run
        tracemalloc.start()
        try:
            header = parse(data)
            sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert min(sizes) < len(data) + 4096
    assert header.tlvs == ((4, b""),) * count


def test_a_checksum_detects_any_changed_bit() -> None:
    data = VALID["v2 CRC32C among others"][0]
    for bit in range(16 * 8, len(data) * 8):  # earlier bits may make it another command or a longer header
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        if bit // 8 != data.index(b"\3\0\4"):  # with another type, the TLV is not a checksum
            assert isinstance(answer(bytes(changed)), str), bit


# ---- the oracle: an independent implementation ---------------------------------------------------------------------

V1_LINE = re.compile(
    rb"PROXY (?:UNKNOWN(?: [\x20-\x7e]*)?|TCP(?P<v>[46]) (\S+) (\S+) (0|[1-9]\d{0,4}) (0|[1-9]\d{0,4}))\r\n"
)
V1_ENDS = [b"PROXY UNKNOWN\r\n"[-n:] for n in range(1, 16)] + [
    end[at:]
    for end in (b"PROXY TCP4 1.1.1.1 1.1.1.1 1 1\r\n", b"PROXY TCP6 ::1 ::1 1 1\r\n", b".1.1.1 1.1.1.1 1 1\r\n")
    for at in range(len(end))
]


def oracle(data: bytes) -> object:
    """Return a tuple of facts, "refused", "more" for the beginning of a header, or "open" if undecided."""
    if data[:13].startswith(SIGNATURE):
        return oracle_v2(data)
    if SIGNATURE.startswith(data):
        return "more"
    found = oracle_v1(data)
    if found != "refused":
        return found
    if b"\r\n" in data[:107] or len(data) >= 107 or data[:6] != b"PROXY "[: len(data)]:
        return "refused"
    return "more" if any(isinstance(oracle_v1(data + end), tuple) for end in V1_ENDS) else "open"


def oracle_v1(data: bytes) -> object:
    line = V1_LINE.match(data[:107])
    if line is None:
        return "refused"
    if line["v"] is None:
        return line.end(), None, None, ()
    _, source, destination, source_port, destination_port = line.groups()
    kind, address = {b"4": (ipaddress.IPv4Address, IPv4Address), b"6": (ipaddress.IPv6Address, IPv6Address)}[line["v"]]
    ends = []
    for host, port in ((source, source_port), (destination, destination_port)):
        try:
            number = kind(host.decode("ascii"))
        except ValueError:
            return "refused"
        if int(port) >= 2**16 or b"%" in host:
            return "refused"
        ends.append(address("TCP", as_system_spells(number), int(port)))
    return line.end(), *ends, ()


def as_system_spells(number) -> str:
    """Not str(): `ipaddress` spells an IPv6 address that contains an IPv4 address differently."""
    return socket.inet_ntop(socket.AF_INET if number.version == 4 else socket.AF_INET6, number.packed)


def oracle_v2(data: bytes) -> object:
    whole = data + b"\x21\x11\xff\xff"[len(data) - 12 :] if len(data) < 16 else data
    command, family, length = struct.unpack("!BBH", whole[12:16])
    sizes = {1: 4, 2: 16, 3: 108}
    if command not in (0x20, 0x21):
        return "refused"
    size = 0
    if command == 0x21:
        if family >> 4 > 3 or family % 16 > 2:
            return "refused"
        if family >> 4 and family % 16:
            size = sizes[family >> 4]
        if 2 * size + (4 if 0 < size < 108 else 0) > length:
            return "refused"
    body = data[16 : 16 + length]
    if len(data) < 16 or len(body) < length:
        return "more"
    if not size:
        return 16 + length, None, None, ()
    hosts, body = (body[:size], body[size : 2 * size]), body[2 * size :]
    ports = ()
    if size < 108:
        ports, body = struct.unpack("!HH", body[:4]), body[4:]
    tlvs = []
    while body:
        if len(body) < 3:
            return "refused"
        value = body[3 : 3 + int(body[1:3].hex(), 16)]
        if len(value) != int(body[1:3].hex(), 16):
            return "refused"
        tlvs.append((body[0], value))
        body = body[3 + len(value) :]
    sums = [value for kind, value in tlvs if kind == 3]
    if sums:
        if len(sums) > 1 or len(sums[0]) != 4:
            return "refused"
        zeroed = data[: 16 + length - sum(3 + len(value) for _, value in tlvs)]
        zeroed += b"".join(tlv(kind, bytes(4) if kind == 3 else value) for kind, value in tlvs)
        if crc32c(zeroed) != struct.unpack("!I", sums[0])[0]:
            return "refused"
    if family % 16 == 2:
        return 16 + length, None, None, tuple(tlvs)
    if size == 108:
        names = [host.rstrip(b"\0") if host[:1] == b"\0" else host.split(b"\0")[0] for host in hosts]
        return 16 + length, *[name or None for name in names], tuple(tlvs)
    address = IPv4Address if size == 4 else IPv6Address
    ends = [address("TCP", as_system_spells(ipaddress.ip_address(h)), p) for h, p in zip(hosts, ports, strict=True)]
    return 16 + length, *ends, tuple(tlvs)


@pytest.mark.parametrize(
    ("data", "value"),
    [  # RFC 3720, B.4, and the published check value
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_the_oracle_computes_the_published_checksums(data, value) -> None:
    assert crc32c(data) == value


def test_the_oracle_agrees_with_the_tables() -> None:
    for data, source, destination, tlvs in VALID.values():
        assert oracle(data) == (len(data), plain(source), plain(destination), tlvs)
    for data, _, _ in INVALID.values():
        assert oracle(data) in ("refused", "open")


# ---- fuzzing --------------------------------------------------------------------------------------------------------

HEADERS = [data for data, *_ in VALID.values()]
SEEDS = HEADERS + [data for data, *_ in INVALID.values()]
TOKENS = [
    *(b"PROXY", b"TCP4", b"TCP6", b"UNKNOWN", b" ", b"  ", b"\r\n", b"\r", b"\n", b"\0", b"\xff", b"%", b"-1", b"+"),
    *(b"0", b"00", b"65535", b"65536", b"255", b"256", b".", b":", b"::", b"::ffff:", b"fFfF", b"12345", b"1.2.3.4"),
    *(
        SIGNATURE,
        b"\x20",
        b"\x21",
        b"\x11",
        b"\x12",
        b"\x22",
        b"\x31",
        tlv(3, b"####"),
        tlv(4),
        tlv(4, b"\0"),
        b"\3\0\4",
    ),
]


def mutated(chance: random.Random) -> bytes:
    """Return a header with one to four changes; many results are still valid headers."""
    data = bytearray(chance.choice(HEADERS if chance.random() < 0.8 else SEEDS))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = chance.choice(TOKENS)
            case 3:
                token = chance.choice(TOKENS)
                data[at : at + len(token)] = token
            case 4:
                del data[at : at + chance.randint(1, 4)]
            case 5:
                other = chance.choice(SEEDS)
                data[at:] = other[chance.choice((at, chance.randrange(len(other)))) :]
            case 6 if len(data) >= 16:
                data[14:16] = struct.pack("!H", chance.choice((0, 12, 36, 216, len(data) - 16, chance.randrange(512))))
            case 7 if len(data) >= 16:
                data[chance.choice((12, 13))] = chance.choice((0x20, 0x21, 0x11, 0x21, 0x31, 0x10, 0x12, 0x22, 0x32))
            case _:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
    if len(data) > 16 and chance.random() < 0.5:  # typical mistakes of a sender, with a correct length
        data[14:16] = struct.pack("!H", len(data) - 16)
    if tlv(3, b"####") in data and chance.random() < 0.8:
        data[:] = checked(bytes(data))
    return bytes(data)


@pytest.mark.parametrize("seed", range(8))
def test_mutated_headers_get_the_result_of_the_oracle_in_any_split(seed) -> None:
    chance = random.Random(seed)
    seen = dict.fromkeys(("header", "refused", "more"), 0)
    for _ in range(3000):
        data = mutated(chance)
        verdict, expected = answer(data), oracle(data)
        cuts = [chance.randrange(len(data) + 1) for _ in range(4)]
        after = chance.randbytes(chance.randint(1, 64))
        if isinstance(verdict, tuple):
            seen["header"] += 1
            length = verdict[0]
            assert verdict == expected, data
            assert length <= len(data)
            assert answer(data[:length]) == answer(data[:length] + after) == verdict, data
            for cut in (length - 1, *cuts):
                assert answer(data[:cut]) == (verdict if cut >= length else None), (data, cut)
        elif verdict is None:
            seen["more"] += 1
            assert expected in ("more", "open"), data
            for cut in cuts:
                assert answer(data[:cut]) is None, (data, cut)
        else:
            seen["refused"] += 1
            assert expected in ("refused", "open"), data
            assert isinstance(answer(data + after), str), data
            for cut in cuts:
                assert not isinstance(answer(data[:cut]), tuple), (data, cut)
    assert min(seen.values()) > 300, seen  # otherwise there are too few or too many changes


def test_random_bytes_are_parsed_or_rejected() -> None:
    chance = random.Random(2)
    for _ in range(20_000):
        beginning = chance.choice((b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", SIGNATURE, SIGNATURE + b"\x21"))
        data = beginning + chance.randbytes(chance.randint(0, 300))
        verdict = answer(data)
        assert verdict is None or isinstance(verdict, str) or verdict == oracle(data), data
