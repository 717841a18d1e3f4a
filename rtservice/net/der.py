"""Parse the elements and times of DER (X.690) that certificates and revocation lists (RFC 5280) use.

OpenSSL verifies both. This module only reads the fields that logs show, for which `ssl` has no public API.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

SEQUENCE, INTEGER, UTC_TIME, GENERALIZED_TIME = 0x30, 0x02, 0x17, 0x18


def element(der: bytes, at: int, expected: int | None = None) -> tuple[int, int, int]:
    """Return the tag of the element at offset `at`, and the offsets of the start and end of its content.

    Raises ValueError if the element is truncated, or if `expected` is given and its tag differs.
    """
    if at + 2 > len(der):
        raise ValueError("truncated")
    kind, length = der[at], der[at + 1]
    at += 2
    if length & 0x80:
        size = length & 0x7F
        length = int.from_bytes(der[at : at + size])
        at += size
    if at + length > len(der) or expected not in (None, kind):
        raise ValueError("truncated, or an unexpected tag")
    return kind, at, at + length


# The part after the year. RFC 5280 requires seconds and Z. Older certificates omit the seconds or have an offset
# (X.680, clause 47).
_TIME = re.compile(rb"([0-9]{8})([0-9]{2})?(?:Z|([+-])([0-9]{2})([0-9]{2}))")


def time(kind: int, text: bytes) -> int:
    """Return a time (RFC 5280, section 4.1.2.5) in seconds since the epoch. Raises ValueError."""
    if kind == UTC_TIME:
        year, rest = (b"20" if text < b"5" else b"19") + text[:2], text[2:]
    elif kind == GENERALIZED_TIME:
        year, rest = text[:4], text[4:]
    else:
        raise ValueError("not a time")
    match = _TIME.fullmatch(rest)
    if match is None or not year.isdigit():
        raise ValueError("not a time")
    digits, seconds, sign, hours, minutes = match.groups()
    month, day, hour, minute = (int(digits[at : at + 2]) for at in (0, 2, 4, 6))
    found = datetime(int(year), month, day, hour, minute, int(seconds or 0), tzinfo=UTC)
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    return int(found.timestamp() - offset.total_seconds() * (-1 if sign == b"-" else 1))
