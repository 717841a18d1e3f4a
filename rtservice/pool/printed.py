"""Lines that a worker prints: bytes in, bounded lines out."""

from __future__ import annotations

from typing import NamedTuple

from rtservice.pool.control import escape_controls

# Bytes of a line. The rest of a longer one is the next line.
LONGEST_PRINTED = 8192


class Line(NamedTuple):
    """A printed line: escaped, and without its end. `cost` is as of `worker_messages`."""

    text: str
    cost: int


class PrintedLines:
    """Splits what is printed into lines, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer without the end of a line
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Add printed bytes."""
        self._buffer += data

    def end(self) -> None:
        """What has no end yet is a line, too."""
        self._ended = True

    def next(self) -> Line | None:
        """Return the next line, or None."""
        buffer = self._buffer
        end = buffer.find(b"\n", self._searched, LONGEST_PRINTED + 1)
        if end >= 0:
            text, rest = bytes(buffer[:end]), end + 1
        elif len(buffer) > LONGEST_PRINTED or (self._ended and buffer):
            text = bytes(buffer[:LONGEST_PRINTED])
            rest = len(text)
        else:
            self._searched = len(buffer)
            return None
        del buffer[:rest]
        self._searched = 0
        line = escape_controls(text.decode("utf-8", "backslashreplace"))
        return Line(line, 1 + len(text) // 1024 + max(0, len(line) - len(text)) // 64)
