"""Certificates that `openssl req` cannot create: copies of a certificate with other names, dates and serial numbers.

Their signature is invalid, which only clients check.
"""

import base64
import ssl
from pathlib import Path

from rtservice.net.der import element


def tlv(tag: int, *content: bytes) -> bytes:
    """Return a DER element."""
    value = b"".join(content)
    size = len(value).to_bytes((len(value).bit_length() + 7) // 8 or 1)
    return bytes((tag, len(value))) + value if len(value) < 128 else bytes((tag, 128 + len(size))) + size + value


def common_name(tag: int, value: bytes) -> bytes:
    """Return a subject with this string as its common name."""
    return tlv(0x30, tlv(0x31, tlv(0x30, b"\x06\x03\x55\x04\x03", tlv(tag, value))))


def dns(*names: bytes) -> bytes:
    """Return alternative names of type DNS."""
    return tlv(0x30, *(tlv(0x82, name) for name in names))


def odd_certificate(
    path: str | Path,
    *,
    subject: bytes | None = None,
    alternative: bytes | None = None,
    critical: bool = False,
    dates: bytes | None = None,
    serial: bytes | None = None,
) -> str:
    """Return a PEM certificate with these values replaced; without `alternative` it has no alternative names."""
    der = ssl.PEM_cert_to_DER_cert(Path(path).read_text())
    _, at, _ = element(der, 0)
    _, start, end = element(der, at)
    parts = []
    while start < end:
        _, _, after = element(der, start)
        parts.append(der[start:after])
        start = after
    version, number, signature, issuer, validity, own, key = parts[:7]
    extensions = []
    if alternative is not None:
        flag = tlv(0x01, b"\xff") if critical else b""
        extensions = [tlv(0xA3, tlv(0x30, tlv(0x30, b"\x06\x03\x55\x1d\x11", flag, tlv(0x04, alternative))))]
    tbs = tlv(
        0x30,
        version,
        number if serial is None else tlv(0x02, serial),
        signature,
        issuer,
        validity if dates is None else tlv(0x30, dates),
        own if subject is None else subject,
        key,
        *extensions,
    )
    body = base64.encodebytes(tlv(0x30, tbs, der[end : element(der, 0)[2]])).decode()
    return f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
