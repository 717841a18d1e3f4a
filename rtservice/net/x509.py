"""Read the names and the validity of a certificate (RFC 5280, section 4.1).

OpenSSL has accepted the certificate before. `ssl` could describe it too, but rejects a certificate with a name that is
not UTF-8, which OpenSSL and peers accept. So a name that cannot be decoded is never an error here.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from rtservice.net import der
from rtservice.net.der import INTEGER, SEQUENCE, element

_OBJECT_IDENTIFIER, _OCTET_STRING, _SET = 0x06, 0x04, 0x31
_VERSION, _EXTENSIONS = 0xA0, 0xA3
_DNS_NAME = 0x82  # dNSName of GeneralName, section 4.2.1.6

_COMMON_NAME = bytes((0x55, 0x04, 0x03))
_SUBJECT_ALTERNATIVE_NAME = bytes((0x55, 0x1D, 0x11))

# String types with an encoding other than ASCII: UTF8String, UniversalString and BMPString.
_ENCODINGS = {0x0C: "utf-8", 0x1C: "utf-32-be", 0x1E: "utf-16-be"}


class CertificateDescription(NamedTuple):
    """The names of a certificate, and its validity in seconds since the epoch.

    The names are the DNS names among the alternative names, or the common names if the certificate has no alternative
    names of any kind. ASCII names are in lower case. Names are not validated: they may contain control characters, and
    must be escaped for display.
    """

    names: tuple[str, ...]
    not_before: int
    not_after: int


def describe(pem: str) -> CertificateDescription:
    """Describe the certificate in a PEM block. Raises ValueError if its structure or its dates are malformed."""
    return describe_der(ssl.PEM_cert_to_DER_cert(pem))


def describe_der(data: bytes) -> CertificateDescription:
    """Describe a certificate in DER form. Raises ValueError as `describe` does."""
    _, start, _ = element(data, 0, SEQUENCE)
    _, at, end = element(data, start, SEQUENCE)  # tbsCertificate
    kind, _, after = element(data, at)
    if kind == _VERSION:
        at = after
    for expected in (INTEGER, SEQUENCE, None):  # serialNumber, signature, issuer
        _, _, at = element(data, at, expected)
    _, start, at = element(data, at, SEQUENCE)  # validity
    kind, start, after = element(data, start)
    not_before = der.time(kind, data[start:after])
    kind, start, after = element(data, after)
    not_after = der.time(kind, data[start:after])
    _, subject, at = element(data, at)  # any tag: OpenSSL accepts names that are not marked as constructed
    alternative = None
    with suppress(ValueError):
        alternative = _alternative_names(data, at, end)
    names = alternative
    if names is None:
        names = []
        with suppress(ValueError):
            names += _common_names(data, subject, at)
    names = [name.lower() if name.isascii() else name for name in names if name]
    return CertificateDescription(tuple(dict.fromkeys(names)), not_before, not_after)


def _each(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the result of `element` for each element between two offsets. Raises ValueError."""
    while at < end:
        kind, start, at = element(data, at)
        yield kind, start, at


def _common_names(data: bytes, at: int, end: int) -> Iterator[str]:
    """Yield the common names of a subject (section 4.1.2.6)."""
    for _, start, stop in _each(data, at, end):  # RelativeDistinguishedName
        for _, attribute, _ in _each(data, start, stop):
            kind, value, after = element(data, attribute, _OBJECT_IDENTIFIER)
            if data[value:after] == _COMMON_NAME:
                kind, value, after = element(data, after)
                yield _text(kind, data[value:after])


def _alternative_names(data: bytes, at: int, end: int) -> list[str] | None:
    """Return the DNS names among the alternative names, in the fields after the subject; None without these names."""
    for kind, start, _ in _each(data, at, end):
        if kind != _EXTENSIONS:
            continue
        _, start, stop = element(data, start, SEQUENCE)
        for _, at, after in _each(data, start, stop):
            _, value, at = element(data, at, _OBJECT_IDENTIFIER)
            if data[value:at] != _SUBJECT_ALTERNATIVE_NAME:
                continue
            *_, (_, start, after) = _each(data, at, after)  # the last element: `critical` may precede the value
            return _dns_names(data, start, after)
    return None


def _dns_names(data: bytes, at: int, end: int) -> list[str] | None:
    names: list[str] = []
    _, at, end = element(data, at, SEQUENCE)
    if at == end:
        return None
    with suppress(ValueError):  # names before a malformed element are kept
        for kind, start, after in _each(data, at, end):
            if kind == _DNS_NAME:
                names.append(_text(kind, data[start:after]))
    return names


def _text(kind: int, value: bytes) -> str:
    """Decode an ASN.1 string. As in most software, a string with an invalid encoding is decoded as Latin-1."""
    try:
        return value.decode(_ENCODINGS.get(kind, "utf-8"))
    except UnicodeDecodeError:
        return value.decode("latin-1")
