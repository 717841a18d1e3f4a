"""Certificate revocation lists in PEM form: the number of lists in a file, and their earliest next update.

OpenSSL verifies the lists and checks certificates against them. This module only reads the time that the log shows:
neither `ssl` nor pyOpenSSL has an API for it.
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

    `next_update` is the earliest next update of a list, in seconds since the epoch; None if no list has one. After this
    time OpenSSL rejects every certificate of the list's authority.
    """

    path: str
    count: int
    next_update: int | None


def pem_blocks(text: str) -> list[str]:
    """Return the PEM blocks in a text. Raises ValueError if there is none, or if one is not terminated."""
    found = [match.group() for match in _PEM.finditer(text)]
    if not found or len(found) != text.count(_BEGIN):
        raise ValueError("not PEM")
    return found


def describe(path: str, blocks: list[str]) -> RevocationLists:
    """Return the description of the lists in these PEM blocks, read from the file `path`. Raises ValueError."""
    times = []
    for block in blocks:
        match = _PEM.fullmatch(block)
        if match is None:
            raise ValueError("not PEM")
        times.append(_next_update(base64.b64decode(match.group(1))))
    return RevocationLists(path, len(blocks), min((update for update in times if update is not None), default=None))


def _next_update(der: bytes) -> int | None:
    """Return `nextUpdate` of a DER CertificateList (RFC 5280, section 5.1), or None. Raises ValueError."""
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
