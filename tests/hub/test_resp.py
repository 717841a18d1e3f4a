"""A connection to Redis, without one: commands, replies, pushes and bounds."""

from __future__ import annotations

import random
from typing import Any

import hiredis
import pytest
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from rtservice.hub.resp import MAX_REPLY, ConnectionEnded, RedisConnection, Refused


class World:
    """A connection whose output is `sent`, and what it called back."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.messages: list[tuple[bytes, bytes]] = []
        self.replies: list[Any] = []
        self.confirmed: list[bytes] = []
        self.ended: list[str] = []
        self.connection = RedisConnection(hiredis, self.clock, lambda *message: self.messages.append(message))
        self.transport = StringTransport()
        self.connection.makeConnection(self.transport)
        self.connection.ended.addCallback(self.ended.append)

    def send(self, *command: Any) -> None:
        self.connection.send(command, (self.reply, command[0]))

    def reply(self, argument: Any, reply: Any) -> None:
        self.replies.append((argument, reply))

    def change(self, command: bytes, *channels: bytes) -> None:
        self.connection.change(command, channels, self.confirmed.append, (self.reply, command))

    def feed(self, data: bytes) -> None:
        self.connection.dataReceived(data)

    def lose(self) -> None:
        self.connection.connectionLost(Failure(ConnectionDone()))


@pytest.fixture
def world() -> World:
    return World()


def push(*parts: bytes) -> bytes:
    return b">%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def confirmation(kind: bytes, channel: bytes) -> bytes:
    return push(kind, channel)[:1] + b"3\r\n" + push(kind, channel)[4:] + b":1\r\n"


def test_the_commands_of_a_turn_are_one_write(world: World) -> None:
    written: list[bytes] = []
    world.transport.write = written.append
    world.transport.writeSequence = lambda pieces: written.append(b"".join(pieces))
    world.send("a", b"\r\n")
    world.send("b", 1)
    assert not written
    world.clock.advance(0)
    assert written == [b"*2\r\n$1\r\na\r\n$2\r\n\r\n\r\n*2\r\n$1\r\nb\r\n$1\r\n1\r\n"]


@pytest.mark.parametrize("seed", range(5))
def test_replies_and_messages_are_the_same_in_pieces_of_any_size(world: World, seed: int) -> None:
    rng = random.Random(seed)
    for name in "abcd":
        world.send(name)
    world.change(b"SUBSCRIBE", b"x", b"y")
    world.send("e")
    data = b":1\r\n" + push(b"message", b"x", b"\r\n+OK\r\n") + b"-ERR no\r\n$-1\r\n%1\r\n+k\r\n*1\r\n#f\r\n"
    data += confirmation(b"subscribe", b"x") + push(b"message", b"x", b"") + confirmation(b"subscribe", b"y") + b"_\r\n"
    while data:
        size = rng.randrange(1, 12)
        world.feed(data[:size])
        data = data[size:]
    assert world.messages == [(b"x", b"\r\n+OK\r\n"), (b"x", b"")]
    assert world.confirmed == [b"x", b"y"]
    assert [name for name, _ in world.replies] == ["a", "b", "c", "d", "e"]
    values = [value for _, value in world.replies]
    assert isinstance(values[1], Refused)
    assert (values[1].code, values[1].shown) == ("ERR", "ERR no")
    assert [values[0], *values[2:]] == [1, None, {b"k": [False]}, None]


def test_an_error_of_subscribe_is_not_the_reply_of_another_command(world: World) -> None:
    world.change(b"SUBSCRIBE", b"x", b"y")
    world.send("a")
    world.feed(b"-NOPERM\r\n:1\r\n")
    assert [name for name, _ in world.replies] == [b"SUBSCRIBE", "a"]
    assert not world.confirmed


def test_each_command_without_a_reply_fails_when_the_connection_ends(world: World) -> None:
    world.send("a")
    world.change(b"SUBSCRIBE", b"x")
    world.connection.request(b"b").addErrback(lambda failure: world.reply("b", failure.value))
    world.lose()
    assert [name for name, _ in world.replies] == ["a", b"SUBSCRIBE", "b"]
    assert all(isinstance(reply, ConnectionEnded) for _, reply in world.replies)
    assert world.ended == ["connection closed by Redis"]
    world.send("late")
    assert isinstance(world.replies[-1][1], ConnectionEnded)


def test_a_callback_can_send_while_the_connection_ends(world: World) -> None:
    world.connection.send((b"a",), (lambda *_: world.send("again"), None))
    world.lose()
    assert [name for name, _ in world.replies] == ["again"]


def test_after_abort_nothing_more_is_handled(world: World) -> None:
    world.connection.send((b"a",), (lambda *_: world.connection.abort("enough"), None))
    world.send("b")
    world.feed(b":1\r\n:2\r\n" + push(b"message", b"x", b"y"))
    world.feed(push(b"message", b"x", b"y"))
    assert world.transport.disconnecting
    world.lose()
    assert world.messages == []
    assert isinstance(world.replies[0][1], ConnectionEnded)
    assert world.ended == ["enough"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\n", "not the protocol of Redis"),
        (b":1\r\n", "a reply without a command"),
        (b"$-2\r\n", "not the protocol of Redis"),
        (confirmation(b"unsubscribe", b"x"), "ended a subscription"),
        (b"$99999999\r\n" + b"x" * MAX_REPLY, "more than 4 MiB"),
    ],
)
def test_what_no_redis_sends_ends_the_connection(world: World, data: bytes, problem: str) -> None:
    for at in range(0, len(data), 65536):
        world.feed(data[at : at + 65536])
    assert world.transport.disconnecting
    world.lose()
    assert problem in world.ended[0]


def test_many_large_replies_are_not_one_that_is_too_large(world: World) -> None:
    message = push(b"message", b"x", b"y" * (1 << 20))
    data = message * 8
    for at in range(0, len(data), 65536):
        world.feed(data[at : at + 65536])
    assert len(world.messages) == 8
    assert not world.transport.disconnecting


def test_pushes_that_nothing_asked_for_are_ignored(world: World) -> None:
    world.send("a")
    world.feed(push(b"invalidate", b"x") + b":1\r\n")
    assert world.replies == [("a", 1)]


def test_a_text_of_redis_is_shown_escaped_and_short() -> None:
    refused = Refused("ERR \x1b[31m" + "x" * 1000)
    assert refused.shown.startswith("ERR \\x1b[31mxxx")
    assert len(refused.shown) < 220
