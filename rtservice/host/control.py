"""The messages between supervisor and worker: one a line, a word and a JSON value.

Twisted's AMP would do, but for what it has no use for here: a log record may be longer than AMP's 64 KiB, one question
alone has an answer, and a line can be read by eyes.

    to a worker     start {…}   what to serve: see `worker.py`
                    share N     it is one of so many now, and limits that are divided change
                    drain […]   end; the kinds of socket whose queue is to be served first
                    hurry       end the drain
                    rows {…}    say which connections are open: `id`, `sort`, `count`
    from a worker   ready       every listener accepts
                    failed "…"  it cannot start, and why
                    beat {…}    it is alive; those of its counters that have changed
                    rows {…}    the answer to a question: `id`, `rows`
                    leave       somebody asked it to end, and it would like to be replaced first
                    log {…}     a record of its, as twisted.logger has it in JSON
                    record {…}  the same, of one whose fields are plain, and its level a word: most are
                    access […]  lines for the access log
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

# Descriptors of a worker: messages to it, messages from it, and from here on its sockets.
CONTROL_IN, CONTROL_OUT, FIRST_SOCKET = 3, 4, 5

# Seconds between two signs of life of a worker.
BEAT = 1.0

TO_WORKER = frozenset(("start", "share", "drain", "hurry", "rows"))
FROM_WORKER = frozenset(("ready", "failed", "beat", "leave", "log", "record", "access", "rows"))

# The longest message that is taken, in bytes. To a worker: a large directory of certificates. From one, which may have
# gone mad: a long traceback.
LONGEST_TO_WORKER, LONGEST_FROM_WORKER = 64 * 1024 * 1024, 256 * 1024


class ControlError(Exception):
    """The other side said something that is no message; the text says what."""


def encode(word: str, value: object = None) -> bytes:
    """A message as it is sent."""
    return f"{word} {json.dumps(value)}\n".encode()


class Messages:
    """Bytes in, messages out. `words` are those that are known, `longest` is the longest line in bytes."""

    def __init__(self, words: frozenset[str], longest: int) -> None:
        self._words = words
        self._longest = longest
        self._rest = bytearray()  # of the line that is not complete

    def feed(self, data: bytes) -> Iterator[tuple[str, Any]]:
        """The word and value of each message that is complete now; of `log`, the JSON itself. Raises ControlError."""
        first, *more = data.split(b"\n")
        self._rest += first  # and is not searched again: a long message comes in very many pieces
        for piece in more:
            self._check_length()
            line, self._rest = bytes(self._rest), bytearray(piece)
            yield self._decoded(line)
        self._check_length()

    def _check_length(self) -> None:
        if len(self._rest) > self._longest:
            raise ControlError(f"a message of more than {self._longest} bytes")

    def _decoded(self, line: bytes) -> tuple[str, Any]:
        name, _, text = line.partition(b" ")
        word = name.decode("ascii", "backslashreplace")
        if word not in self._words:
            raise ControlError(f"a message {word[:20]!r}, which is none of {', '.join(sorted(self._words))}")
        try:
            return word, text.decode() if word == "log" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"a message {word!r} that is not JSON") from error
