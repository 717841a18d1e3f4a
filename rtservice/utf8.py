"""Decode text files of users: UTF-8, with or without a byte order mark."""

from __future__ import annotations

import codecs

# The marks of UTF-32 begin with those of UTF-16 (Unicode, section 23.8).
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class NotUTF8Error(ValueError):
    """Bytes are not UTF-8. The text has the position or the detected encoding, and none of the bytes."""


def decode_utf8(content: bytes) -> str:
    """Decode the content of a UTF-8 file, and remove a byte order mark. Raises NotUTF8Error."""
    check_mark(content)
    try:
        return content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise NotUTF8Error(f"is not UTF-8: line {line}, the byte at offset {error.start}") from None


def check_mark(content: bytes) -> None:
    """Raise NotUTF8Error if the content of a file begins with the byte order mark of another encoding."""
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            raise NotUTF8Error(f"is {encoding} by its byte order mark; save it as UTF-8")
