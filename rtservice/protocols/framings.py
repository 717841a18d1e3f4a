"""Split a byte stream into messages, without I/O: bytes in, the bytes of all complete messages out.

Time and memory for a read are linear in its size, for any content: a message that arrives in many pieces is neither
copied nor searched again for each piece. The receivers of `twisted.protocols.basic` have the same rules and quadratic
time: 64 KiB of empty netstrings took 170 ms, 64 KiB of empty lines 44 ms.
"""

from __future__ import annotations

import re
from functools import cache
from struct import Struct

from rtservice.counted import counted

# Payloads of up to this many bytes are matched by a regular expression. For longer ones, of which one read contains
# few, a loop in Python is fast enough.
_SHORT = 63


class Framing:
    """Splits the stream of one connection into messages of at most `longest` bytes (1 or more), framing not counted."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.problem = ""  # the error in the stream, after which input is ignored
        self._begun = bytearray()  # the beginning of an incomplete message

    @staticmethod
    def frame(message: bytes) -> bytes:
        """Return a message with its framing."""
        raise NotImplementedError

    def take(self, data: bytes) -> bytes:
        """Add received bytes. Return the messages that are complete now, with their framing, unchanged.

        Sets `problem` if the bytes after these messages cannot be a message.
        """
        raise NotImplementedError


class Lines(Framing):
    r"""Lines that end with `\n`; a `\r` before it belongs to the terminator."""

    @staticmethod
    def frame(message: bytes) -> bytes:
        return message + b"\r\n"

    def take(self, data: bytes) -> bytes:
        if self.problem:
            return b""
        begun = self._begun
        if not begun:
            end = self._end(data, 0)
            if end == len(data):
                return data
            begun += data[end:]
            return data[:end]
        first = data.find(b"\n") + 1
        if not first:
            begun += data
            self._check(begun, 0, len(begun))
            return b""
        begun += data[:first]
        if not self._check(begun, 0, len(begun) - 1):
            return b""
        end = self._end(data, first)
        complete = bytes(begun) + data[first:end]
        begun[:] = data[end:]
        return complete

    def _end(self, data: bytes, start: int) -> int:
        """Return the end of the complete lines from `start` on. Stops at a line that is too long."""
        while start < len(data):
            # The last line feed within `longest` bytes from here: all lines up to it are short enough. Two steps
            # advance by more than `longest` bytes.
            found = data.rfind(b"\n", start, start + self.longest + 1)
            if found < 0:
                found = data.find(b"\n", start, start + self.longest + 2)
                if not self._check(data, start, len(data) if found < 0 else found) or found < 0:
                    return start
            start = found + 1
        return start

    def _check(self, data: bytes | bytearray, start: int, end: int) -> bool:
        """Return whether `data` from `start` to `end` may be a line, or if `data` ends there, the beginning of one."""
        over = end - start - self.longest
        if over > 1 or (over == 1 and end < len(data) and data[end - 1 : end] != b"\r"):
            self.problem = f"a line longer than the {counted(self.longest, 'byte')} of --max-message"
        return not self.problem


class _Prefixed(Framing):
    """Messages that begin with their length."""

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._needed = 0  # bytes of the incomplete message with its framing; 0 if not known yet
        self._skip_short = self._short_messages(min(longest, _SHORT)).match

    @staticmethod
    def _short_messages(longest: int) -> re.Pattern[bytes]:
        """Return a pattern that matches one or more consecutive messages of at most `longest` bytes each."""
        raise NotImplementedError

    def take(self, data: bytes) -> bytes:
        if self.problem:
            return b""
        begun = self._begun
        if not begun:
            end = self._end(data, 0)
            if end == len(data):
                return data
            begun += data[end:]
            return data[:end]
        missing = self._needed - len(begun)
        if self._needed and len(data) < missing:
            begun += data
            return b""
        # The length of the message is not known yet, or the message is complete now.
        begun += data
        data = bytes(begun)
        begun.clear()
        end = self._end(data, 0)
        begun += memoryview(data)[end:]
        return data if end == len(data) else data[:end]

    def _end(self, data: bytes, start: int) -> int:
        """Return the end of the complete messages from `start` on. Sets `_needed` for the next message."""
        skip_short, size = self._skip_short, self._size
        length = len(data)
        while True:
            short = skip_short(data, start)
            if short is not None:
                start = short.end()
            if start == length:
                self._needed = 0
                return start
            self._needed = needed = size(data, start)
            if not needed or start + needed > length:
                return start
            if not self._ends_well(data, start + needed):
                return start
            start += needed

    def _size(self, data: bytes, start: int) -> int:
        """Return the size of the message at `start` with its framing; 0 if it is not known yet or invalid."""
        raise NotImplementedError

    def _ends_well(self, data: bytes, end: int) -> bool:
        """Return whether a message may end at `end`. Sets `problem` if not."""
        return True


class Netstrings(_Prefixed):
    """Netstrings (http://cr.yp.to/proto/netstrings.txt)."""

    _length = re.compile(rb"(?:0|[1-9][0-9]*)?")

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self._digits = len(str(longest))

    @staticmethod
    @cache
    def _short_messages(longest: int) -> re.Pattern[bytes]:
        sizes = b"|".join(b"%d:.{%d}," % (size, size) for size in range(longest + 1))
        return re.compile(b"(?:%s)++" % sizes, re.DOTALL)

    @staticmethod
    def frame(message: bytes) -> bytes:
        return b"%d:%s," % (len(message), message)

    def _size(self, data: bytes, start: int) -> int:
        # One digit more than the maximum is enough to detect too many.
        match = self._length.match(data, start, start + self._digits + 1)
        assert match is not None  # it may be empty
        digits, end = match[0], match.end()
        if digits and int(digits) <= self.longest and data[end : end + 1] in (b":", b""):
            return end + 1 + int(digits) + 1 - start if end < len(data) else 0
        if end > start or end < len(data):
            self._refuse()
        return 0

    def _ends_well(self, data: bytes, end: int) -> bool:
        if data[end - 1] != 0x2C:
            self._refuse()
        return not self.problem

    def _refuse(self) -> None:
        self.problem = f"not a netstring of at most the {counted(self.longest, 'byte')} of --max-message"


class Int32(_Prefixed):
    """Messages that follow their length as 32 bits in network byte order."""

    _prefix = Struct("!I")

    @staticmethod
    @cache
    def _short_messages(longest: int) -> re.Pattern[bytes]:
        sizes = b"|".join(b"\\x%02x.{%d}" % (size, size) for size in range(longest + 1))
        return re.compile(b"(?:\\0\\0\\0(?:%s))++" % sizes, re.DOTALL)

    @staticmethod
    def frame(message: bytes) -> bytes:
        return Int32._prefix.pack(len(message)) + message

    def _size(self, data: bytes, start: int) -> int:
        if start + 4 > len(data):
            return 0
        length: int
        (length,) = self._prefix.unpack_from(data, start)
        if length > self.longest:
            self.problem = f"a message of {counted(length, 'byte')}, above the {self.longest} of --max-message"
            return 0
        return 4 + length
