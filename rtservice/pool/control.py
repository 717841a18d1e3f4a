"""The control channel between supervisor and worker: one message per line, a word and a JSON value.

Twisted's AMP limits a value to 64 KiB, and here only one kind of question has an answer. A line is readable by eye.

    to a worker     start {…}   what to serve: see `worker.py`
                    share N     number of workers now; divided limits change
                    drain […]   end; the kinds of socket whose queue is served first
                    hurry       end the drain
                    rows {…}    list open connections: `id`, `sort`, `count`
    from a worker   ready       every listener accepts
                    failed "…"  it cannot start, and why
                    beat {…}    heartbeat; the counters that have changed
                    rows {…}    the answer to a question: `id`, `rows`
                    leave       it was asked to end, and wants to be replaced first
                    records […] log records as finished text: see `worker_messages.py`
                    access […]  lines for the access log

A worker runs hosted code, so nothing that it sends is trusted: `worker_messages.py` decodes and checks it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

# Descriptors of a worker: messages to it, messages from it, and from here on its sockets.
CONTROL_IN, CONTROL_OUT, FIRST_SOCKET = 3, 4, 5

# Seconds between two heartbeats of a worker.
BEAT = 1.0

TO_WORKER = frozenset(("start", "share", "drain", "hurry", "rows"))

# The longest message to a worker, in bytes: a large directory of certificates.
LONGEST_TO_WORKER = 64 * 1024 * 1024

# The longest message from a worker, in bytes. A message that is decoded at once must not take many milliseconds: the
# worst JSON of 128 KiB takes about 10. Twice that is accepted only as the answer to a question.
LONGEST_FROM_WORKER: Mapping[str, int] = {
    "ready": 64,
    "failed": 64 * 1024,
    "beat": 64 * 1024,
    "rows": 256 * 1024,
    "leave": 64,
    "records": 128 * 1024,
    "access": 128 * 1024,
}

# Digits of an integer. A hosted factory's counter may be 1e300; int() of a longer text takes quadratic time, or raises.
_MOST_DIGITS = 310

# Characters of a foreign text in an error.
_SHOWN = 20


class ProtocolViolation(Exception):  # noqa: N818  # it names what the peer did
    """The other side sent something that the protocol does not allow. The text is one short printable line."""


def encode(word: str, value: object = None) -> bytes:
    """Return a message as it is sent."""
    return f"{word} {json.dumps(value)}\n".encode()


def shown(text: object) -> str:
    """Return the beginning of a foreign text, or what else it is, for an error."""
    return ascii(text[:_SHOWN]) if isinstance(text, str) else f"of type {type(text).__name__}"


class Framing:
    """Splits bytes into lines of at most `longest` bytes. Work is linear in the bytes, however they are cut."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer without the end of a line

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next complete line without its end, or None. Raises ProtocolViolation for one that is too long."""
        end = self._buffer.find(b"\n", self._searched)
        if (len(self._buffer) if end < 0 else end) > self._longest:
            self._buffer.clear()
            raise ProtocolViolation(f"a message of more than {self._longest} bytes")
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line


def split_word(line: bytes) -> tuple[str, bytes]:
    """Return the word of a message, and the text of its value."""
    word, _, text = line.partition(b" ")
    return word[: _SHOWN + 1].decode("ascii", "backslashreplace"), text


def _checked_int(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError("an integer of too many digits")
    return int(text)


def _refused_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_decode_json = json.JSONDecoder(parse_int=_checked_int, parse_constant=_refused_constant).decode


def decode_value(word: str, text: bytes) -> Any:
    """Return the value of a message. Raises ProtocolViolation."""
    try:
        return _decode_json(text.decode())
    except (ValueError, RecursionError):  # whose own texts may quote all of the message
        raise ProtocolViolation(f"a message {word!r} that is not JSON") from None


class SupervisorMessages:
    """Decodes what a worker receives: bytes in, messages out.

    The supervisor is trusted. This finds what is no message at all, so that a worker can drain instead of guessing.
    """

    def __init__(self, longest: int = LONGEST_TO_WORKER) -> None:
        self._framing = Framing(longest)

    def feed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """Yield the word and the value of each message that is complete now. Raises ProtocolViolation."""
        self._framing.feed(data)
        while (line := self._framing.next()) is not None:
            word, text = split_word(line)
            if word not in TO_WORKER:
                raise ProtocolViolation(f"an unknown message {shown(word)}")
            yield word, decode_value(word, text)


# What a log or a terminal could act on: C0 and C1 control characters and DEL (ECMA-48), but for a line's end and a tab.
_CONTROLS = {
    code: chr(code).encode("unicode_escape").decode()
    for code in (*range(0x20), *range(0x7F, 0xA0))
    if chr(code) not in "\n\t"
}
_LAYOUT = re.compile("[\n\t]")


def escape_controls(text: str) -> str:
    r"""Return a text without anything that a terminal or a log reader acts on, but for `\n` and tabs.

    Takes linear time, and about 0.1 µs for each character that is escaped. A text with a character that is not
    printable and not ASCII, such as U+202E, is returned in ASCII.
    """
    if text.isprintable():
        return text
    text = text.translate(_CONTROLS)
    if _LAYOUT.sub("", text).isprintable():
        return text
    return text.encode("ascii", "backslashreplace").decode()
