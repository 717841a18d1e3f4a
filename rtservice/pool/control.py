"""The control channel between supervisor and worker: one message per line, a word and a JSON value.

Twisted's AMP is not used: it limits a value to 64 KiB, and only one kind of message here has an answer. Lines are
readable in a trace.

    to a worker     start {…}   settings, listeners and certificates: see `start_message.py`
                    share N     current number of workers, among which limits are divided
                    drain […]   begin the graceful shutdown; types of sockets whose backlog is served first
                    abort_drain end the drain now
                    rows {…}    list open connections: `id`, `sort`, `count`
    from a worker   ready       every listener accepts
                    failed "…"  the start failed, and the reason
                    beat {…}    heartbeat, with the counters that have changed
                    rows {…}    the answer to `rows`: `id`, `rows`
                    leave       the worker received a stop signal, and asks to be replaced
                    records […] log records as formatted text: see `worker_messages.py`
                    access […]  lines for the access log
                    mesh        the worker uses the hub, and asks for links to the other workers: see `mesh_links.py`
                    peer {…}    another worker does not read its link or violates the protocol: `incarnation`, `problem`

A worker runs hosted code, so its messages are not trusted: `worker_messages.py` decodes and checks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

# Descriptors of a worker: messages to it, messages from it, its link channel, and the first of its sockets.
CONTROL_IN, CONTROL_OUT, LINK_CHANNEL, FIRST_SOCKET = 3, 4, 5, 6

# Seconds between two heartbeats of a worker.
BEAT = 1.0

TO_WORKER = frozenset(("start", "share", "drain", "abort_drain", "rows"))

# Limit of a message to a worker, in bytes: a large directory of certificates fits.
LONGEST_TO_WORKER = 64 * 1024 * 1024

# Limits of messages from a worker, in bytes. A message is decoded at once, which must not take many milliseconds: the
# worst JSON of 128 KiB takes about 10. Only the answer to `rows`, which is requested, may have twice that.
LONGEST_FROM_WORKER: Mapping[str, int] = {
    "ready": 64,
    "failed": 64 * 1024,
    "beat": 64 * 1024,
    "rows": 256 * 1024,
    "leave": 64,
    "records": 128 * 1024,
    "access": 128 * 1024,
    "mesh": 64,
    "peer": 1024,
}

# Limit of digits of an integer. A hosted factory's counter may be 1e300. int() of a long text takes quadratic time, or
# raises.
_MOST_DIGITS = 310

# Characters of a received text in an error.
_SHOWN = 20


class ProtocolViolation(Exception):  # noqa: N818  # it names what the peer did
    """The other side violated the protocol of the channel. The text is one short printable line."""


def encode(word: str, value: object = None) -> bytes:
    """Return the bytes of a message."""
    return f"{word} {json.dumps(value)}\n".encode()


def shown(text: object) -> str:
    """Return the beginning of a received text, or the type of another value, for an error."""
    return ascii(text[:_SHOWN]) if isinstance(text, str) else f"of type {type(text).__name__}"


class LineFraming:
    """Splits bytes into lines of at most `longest` bytes, in linear time for any division into pieces."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer without the end of a line

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def next(self) -> bytes | None:
        """Return the next complete line without its line feed, or None. Raises ProtocolViolation if it is too long."""
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
    except (ValueError, RecursionError):  # their texts may quote the whole message
        raise ProtocolViolation(f"a message {word!r} that is not JSON") from None


class SupervisorMessages:
    """Decodes the messages that a worker receives: bytes in, messages out.

    The supervisor is trusted. Only invalid messages are detected, so that the worker can drain.
    """

    def __init__(self, longest: int = LONGEST_TO_WORKER) -> None:
        self._framing = LineFraming(longest)

    def feed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """Add received bytes, and yield the word and value of each complete message. Raises ProtocolViolation."""
        self._framing.feed(data)
        while (line := self._framing.next()) is not None:
            word, text = split_word(line)
            if word not in TO_WORKER:
                raise ProtocolViolation(f"an unknown message {shown(word)}")
            yield word, decode_value(word, text)
