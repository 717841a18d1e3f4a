"""Certificate revocation lists in PEM form: how many a file holds, and when the first of them has to be replaced.

OpenSSL verifies them and looks certificates up. This only finds the time that the log shows: neither `ssl` nor
pyOpenSSL has an API for it.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass

from rtservice.net.der import GENERALIZED_TIME, INTEGER, SEQUENCE, UTC_TIME, element, time

_BEGIN = "-----BEGIN X509 CRL-----"
_PEM = re.compile(f"{_BEGIN}(.*?)-----END X509 CRL-----", re.DOTALL)


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
    return RevocationLists(path, len(blocks), min((one for one in times if one is not None), default=None))


def _next_update(der: bytes) -> int | None:
    """`nextUpdate` of a CertificateList (RFC 5280, section 5.1)."""
    _, start, _ = element(der, 0, SEQUENCE)
    _, at, _ = element(der, start, SEQUENCE)  # tbsCertList
    kind, _, end = element(der, at)
    if kind == INTEGER:  # version
        at = end
    for expected in (SEQUENCE, SEQUENCE):  # signature, issuer
        _, _, at = element(der, at, expected)
    kind, start, at = element(der, at)
    time(kind, der[start:at])  # thisUpdate
    if at == len(der):
        return None
    kind, start, end = element(der, at)
    return time(kind, der[start:end]) if kind in (UTC_TIME, GENERALIZED_TIME) else None
