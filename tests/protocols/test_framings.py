"""Framings: the same messages and errors as Twisted's receivers, in linear time."""

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.testing import StringTransport
from twisted.protocols import basic

from rtservice.protocols.framings import Framing, Int32, Lines, Netstrings


class _Reference:
    """Echoes messages with Twisted's receivers; `broken` is set on a protocol error."""

    transport: Any
    broken = False

    def __init__(self, longest: int) -> None:
        self.longest = self.MAX_LENGTH = longest

    def fail(self, *_: object) -> None:
        self.broken = True
        self.transport.loseConnection()


class TwistedLines(_Reference, basic.LineOnlyReceiver):
    delimiter = b"\n"

    def __init__(self, longest: int) -> None:
        super().__init__(longest)
        self.MAX_LENGTH = longest + 1  # room for the `\r`

    def lineReceived(self, line: bytes) -> None:
        if len(line) == self.MAX_LENGTH and not line.endswith(b"\r"):
            self.fail()
        else:
            self.sendLine(line)

    lineLengthExceeded = _Reference.fail


class TwistedNetstrings(_Reference, basic.NetstringReceiver):
    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.broken = bool(self.brokenPeer)


class TwistedInt32(_Reference, basic.Int32StringReceiver):
    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)

    lengthLimitExceeded = _Reference.fail


FRAMINGS: dict[str, tuple[type[Framing], type[Any], bytes]] = {
    # Each: our framing, Twisted's receiver, and bytes that are likely in a stream of this framing.
    "line": (Lines, TwistedLines, b"\n\n\r\r\na"),
    "netstring": (Netstrings, TwistedNetstrings, b"0123:,,:\n"),
    "int32": (Int32, TwistedInt32, b"\0\0\0\0\0\1\x0a"),
}

every_framing = pytest.mark.parametrize("name", FRAMINGS)


def stream(name: str, rng: random.Random, longest: int) -> bytes:
    """Return messages with lengths around the limits, sometimes with bytes changed, added or removed."""
    framing, _, likely = FRAMINGS[name]
    sizes = [0, 0, 1, 9, 10, 62, 63, 64, longest - 1, longest, rng.randrange(longest + 1)]
    oversized = [longest + 1, longest + 2, longest * 10] if rng.random() < 0.2 else []

    def message() -> bytes:
        size = rng.choice([*sizes, *oversized])
        payload = bytes(rng.choices(likely, k=max(0, size if oversized else min(size, longest))))
        if name != "line":
            return framing.frame(payload)
        return payload.replace(b"\n", b"x") + rng.choice((b"\n", b"\r\n"))

    data = bytearray(b"".join(message() for _ in range(rng.randrange(12))))
    for _ in range(rng.choice((0, 0, 1, 3))):
        position = rng.randrange(len(data) + 1)
        data[position : position + rng.randrange(2)] = bytes(rng.choices(likely, k=rng.randrange(3)))
    return bytes(data)


def split_randomly(data: bytes, rng: random.Random) -> list[bytes]:
    """Split the bytes at random positions, often into many pieces, sometimes not at all."""
    most = rng.choice((1, 3, 20, 200, len(data) + 1))
    found, start = [], 0
    while start < len(data):
        end = start + rng.randint(1, most)
        found.append(data[start:end])
        start = end
    return found


@every_framing
def test_messages_and_errors_match_twisteds_receivers(name) -> None:
    ours, twisteds, _ = FRAMINGS[name]
    rng = random.Random(14)
    problems = 0
    for _ in range(2000):
        longest = rng.choice((1, 2, 5, 9, 10, 30, 63, 64, 99, 100, 1000))
        data = stream(name, rng, longest)
        framing, reference, transport = ours(longest), twisteds(longest), StringTransport()
        reference.makeConnection(transport)
        taken = b""
        for piece in split_randomly(data, rng):
            if not reference.broken:
                reference.dataReceived(piece)
            taken += framing.take(piece)
            # Twisted's receiver of netstrings waits for one more byte after digits and a line feed.
            if bool(framing.problem) != reference.broken and not (name == "netstring" and piece.endswith(b"\n")):
                break
        if not reference.broken and name == "netstring" and framing.problem:
            reference.dataReceived(b"x")
        assert (taken, bool(framing.problem)) == (transport.value(), reference.broken), (longest, data)
        problems += reference.broken
    assert 200 < problems < 1800


@every_framing
def test_data_after_an_error_is_ignored(name) -> None:
    framing = FRAMINGS[name][0](10)
    assert framing.take(framing.frame(b"one") + framing.frame(b"x" * 12) + framing.frame(b"two")) == framing.frame(
        b"one"
    )
    assert "--max-message" in framing.problem
    assert framing.take(framing.frame(b"three")) == b""


def lines_executed(function: Callable[[], object]) -> int:
    """Count the Python lines that a function executes: a measure of work that does not depend on the machine."""
    count = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@every_framing
@pytest.mark.parametrize("size", [0, 1, 9, 10, 63, 64, 1000])
@pytest.mark.parametrize("longest", [1000, 65536])
def test_a_read_full_of_short_messages_executes_few_lines(name, size, longest) -> None:
    framing = FRAMINGS[name][0](longest)
    message = framing.frame(b"x" * size)
    data = message * (65536 // len(message))
    assert lines_executed(lambda: framing.take(data)) < 25_000  # Twisted's: 200,000 to 1,200,000 for empty messages


@every_framing
def test_a_message_in_many_pieces_is_not_copied_for_each_piece(name) -> None:
    framing = FRAMINGS[name][0](1 << 24)
    message = framing.frame(b"x" * (1 << 22))
    # Copying or searching everything for each piece would process 4 TB.
    taken = [framing.take(message[start : start + 64]) for start in range(0, 1 << 20, 64)]
    taken.append(framing.take(message[1 << 20 :]))
    assert not any(taken[:-1])
    assert taken[-1] == message
