"""Certificate revocation lists in PEM form: how many a file holds, and when the first of them has to be replaced.

OpenSSL verifies them and looks certificates up. This only finds the time that the log shows: neither `ssl` nor
pyOpenSSL has an API for it.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from datetime import UTC, datetime

_BEGIN = "-----BEGIN X509 CRL-----"
_PEM = re.compile(f"{_BEGIN}(.*?)-----END X509 CRL-----", re.DOTALL)

_SEQUENCE, _INTEGER, _UTC_TIME, _GENERALIZED_TIME = 0x30, 0x02, 0x17, 0x18


@dataclass(frozen=True)
class RevocationLists:
    """The certificate revocation lists of a file.

    `next_update` is the earliest time, in seconds since the epoch, at which one of them is replaced by its authority,
    after which OpenSSL refuses each certificate of this authority; None where none of them says so.
    """

    path: str
    count: int
    next_update: int | None


def pem_blocks(text: str) -> list[str]:
    """The PEM blocks of a text; raises ValueError when one does not end, or when there is none."""
    found = [match.group() for match in _PEM.finditer(text)]
    if not found or len(found) != text.count(_BEGIN):
        raise ValueError("not PEM")
    return found


def describe(path: str, blocks: list[str]) -> RevocationLists:
    """What the lists in these PEM blocks say; `path` is where they came from. Raises ValueError."""
    times = []
    for block in blocks:
        match = _PEM.fullmatch(block)
        if match is None:
            raise ValueError("not PEM")
        times.append(_next_update(base64.b64decode(match.group(1))))
    return RevocationLists(path, len(blocks), min((time for time in times if time is not None), default=None))


def _next_update(der: bytes) -> int | None:
    """`nextUpdate` of a CertificateList (RFC 5280, section 5.1)."""
    _, start, _ = _element(der, 0, _SEQUENCE)
    _, at, _ = _element(der, start, _SEQUENCE)  # tbsCertList
    kind, _, end = _element(der, at)
    if kind == _INTEGER:  # version
        at = end
    for expected in (_SEQUENCE, _SEQUENCE):  # signature, issuer
        _, _, at = _element(der, at, expected)
    kind, start, at = _element(der, at)
    _time(kind, der[start:at])  # thisUpdate
    if at == len(der):
        return None
    kind, start, end = _element(der, at)
    return _time(kind, der[start:end]) if kind in (_UTC_TIME, _GENERALIZED_TIME) else None


def _element(der: bytes, at: int, expected: int | None = None) -> tuple[int, int, int]:
    """The tag of the element at an offset, and where its content begins and ends. Raises ValueError."""
    if at + 2 > len(der):
        raise ValueError("cut short")
    kind, length = der[at], der[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[at : at + size])
        at += size
    if at + length > len(der) or expected not in (None, kind):
        raise ValueError("not a certificate revocation list")
    return kind, at, at + length


def _time(kind: int, text: bytes) -> int:
    """RFC 5280, sections 5.1.2.4 to 5.1.2.6. Raises ValueError."""
    if kind not in (_UTC_TIME, _GENERALIZED_TIME):
        raise ValueError("not a time")
    digits = text.decode("ascii")  # a UnicodeDecodeError is a ValueError
    if kind == _UTC_TIME:
        digits = ("20" if digits < "5" else "19") + digits
    return int(datetime.strptime(digits, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp())
