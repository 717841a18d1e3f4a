"""Split the output that a worker prints into bounded lines."""

from __future__ import annotations

from typing import NamedTuple

from rtservice.escaping import escaped

# Limit of a line in bytes. The rest of a longer line becomes the next line.
LONGEST_PRINTED = 8192


class Line(NamedTuple):
    """A printed line, escaped and without its line feed. `cost` is in the units of `worker_messages`."""

    text: str
    cost: int


class PrintedLines:
    """Splits printed bytes, which arrive in pieces, into lines."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer without the end of a line
        self._ended = False

    def feed(self, data: bytes) -> None:
        """Add printed bytes."""
        self._buffer += data

    def end(self) -> None:
        """End the output: an incomplete last line counts as a line."""
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
        line = escaped(text.decode("utf-8", "backslashreplace"), keep="\t")
        return Line(line, 1 + len(text) // 1024 + max(0, len(line) - len(text)) // 64)
