"""The chat: rooms, names, and a bound on everything, without a reactor."""

import socket
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from rtservice.protocols.chat import ChatFactory


class Turns:
    """A reactor of which a test takes each turn."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def callLater(self, delay: float, call: Any) -> "Turns":
        self.calls.append(call)
        return self

    def cancel(self) -> None:
        self.calls.clear()

    def turn(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Client:
    """One connection: what the server would see and send."""

    def __init__(self, factory: ChatFactory, nick: str = "", room: str = "") -> None:
        factory.clock = factory.clock or Turns()
        self.protocol: Any = factory.buildProtocol(None)
        self.transport = StringTransport()
        self.transport.unsent = 0
        self.transport.abortConnection = self.aborted
        self.protocol.makeConnection(self.transport)
        if nick:
            self.says(nick)
        if room:
            self.says(f"/join {room}")
        self.hears()

    def aborted(self) -> None:
        self.transport.disconnecting = True

    def says(self, *lines: str) -> None:
        self.protocol.dataReceived("".join(f"{line}\r\n" for line in lines).encode())

    def hears(self) -> list[str]:
        heard = self.transport.value().decode().splitlines()
        self.transport.clear()
        return heard

    def goes(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))

    @property
    def closing(self) -> bool:
        return self.transport.disconnecting


def test_what_is_said_is_heard_by_all_in_the_room_and_by_nobody_else() -> None:
    factory = ChatFactory()
    ann, bob, eve = (Client(factory, nick, room) for nick, room in (("ann", "tea"), ("bob", "tea"), ("eve", "den")))
    assert ann.hears() == ["* bob has joined tea"]
    ann.says("hello", "")
    assert ann.hears() == bob.hears() == ["ann: hello"]
    assert eve.hears() == []
    bob.says("/nick rob", "/who", "/rooms", "/leave", "into the void")
    assert bob.hears() == [
        *("* bob is now rob", "* ann rob", "* den tea", "* rob has left tea"),
        "* you are in no room: /join ROOM",
    ]
    ann.goes()
    eve.goes()
    assert factory.rooms == {}
    assert factory.metrics() == {"members": 1, "rooms": 0, "messages_total": 1, "too_slow_total": 0}


def test_a_name_is_taken_once_and_free_again() -> None:
    factory = ChatFactory(max_name=5)
    ann, other = Client(factory, "ann"), Client(factory)
    other.says("ann", "a b", "toolong", "\x1b[2J", "")
    wrong = "* a name has up to 5 letters, digits and . _ -"
    assert other.hears() == ["* ann is taken", wrong, wrong, wrong, wrong]
    ann.goes()
    other.says("ann")
    assert other.hears()[0].startswith("* hello ann; ")


def test_nothing_reaches_others_that_a_terminal_would_obey() -> None:
    factory = ChatFactory()
    ann = Client(factory, "ann", "tea")
    ann.says("a\x1b[2J\x07\u202eb")
    assert ann.hears() == ["ann: a[2Jb"]


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"x" * 101, "a line may have 100 bytes"), (b"\xff\n", "only UTF-8"), (b"/quit\n", "goodbye")],
)
def test_a_client_is_told_why_it_is_closed_and_not_heard_any_more(data, words) -> None:
    factory = ChatFactory(max_line=100)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob", "tea")
    ann.hears()
    bob.protocol.dataReceived(data)
    assert words in bob.hears()[-1]
    assert bob.closing
    assert bob.transport.producer is None
    bob.says("still here")
    assert ann.hears() == []


def test_members_and_rooms_are_bounded() -> None:
    factory = ChatFactory(max_members=2, max_rooms=1)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob")
    third = Client(factory)
    assert third.closing
    third.goes()
    bob.says("/join den", "/join tea")
    assert bob.hears() == ["* there are 1 rooms already", "* bob has joined tea"]
    assert not ann.closing
    bob.goes()
    assert not Client(factory, "eve").closing


def test_a_member_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    factory = ChatFactory(max_unsent=1000)
    ann, slow = Client(factory, "ann", "tea"), Client(factory, "slow", "tea")
    ann.hears()
    slow.transport.unsent = 995
    ann.says("hello")
    assert (ann.hears(), slow.hears()) == (["ann: hello"], [])
    assert slow.closing
    slow.goes()
    assert ann.hears() == ["* slow has left tea"]
    assert factory.metrics()["too_slow_total"] == 1
    assert slow.transport.producer is slow.transport  # while it is not read from either


def test_who_says_very_much_at_once_has_to_wait_and_is_not_read_from_meanwhile() -> None:
    factory = ChatFactory(max_unsent=1000)
    ann, bob, eve = (Client(factory, nick, "tea") for nick in ("ann", "bob", "eve"))
    factory.clock.turn()
    bob.hears()
    ann.says(*(f"{number:03}" for number in range(100)))  # 10 bytes each
    assert bob.hears() == [f"ann: {number:03}" for number in range(25)]
    assert ann.transport.producerState == "paused"
    eve.says("and I")
    assert bob.hears() == []
    factory.clock.turn()
    assert bob.hears() == [f"ann: {number:03}" for number in range(25, 50)]
    factory.clock.turn()  # it is not ann's turn again
    assert bob.hears() == ["eve: and I", *(f"ann: {number:03}" for number in range(50, 74))]
    assert eve.transport.producerState == "producing"
    for _ in range(3):
        factory.clock.turn()
    assert bob.hears() == [f"ann: {number:03}" for number in range(74, 100)]
    assert ann.transport.producerState == "producing"
    ann.goes()
    assert bob.hears() == ["* ann has left tea"]


def test_one_that_goes_while_it_waits_says_no_more() -> None:
    factory = ChatFactory(max_unsent=200)
    ann, bob = (Client(factory, nick, "tea") for nick in ("ann", "bob"))
    factory.clock.turn()
    bob.hears()
    ann.says(*["x"] * 100)
    ann.goes()
    for _ in range(10):
        factory.clock.turn()
    assert bob.hears()[-1] == "* ann has left tea"
    assert factory.clock.calls == []


@pytest_twisted.inlineCallbacks
def test_a_flood_is_heard_by_all_who_read(serve):
    address = ("127.0.0.1", serve(ChatFactory()).getHost().port)
    lines = 20_000

    def member(nick: str) -> socket.socket:
        client = socket.create_connection(address, timeout=30)
        client.sendall(f"{nick}\n/join tea\n".encode())
        return client

    def read(client: socket.socket) -> int:
        received = b""
        while not received.endswith(b": last\r\n"):
            data = client.recv(1 << 16)
            assert data, received[-100:]
            received += data
        return received.count(b": x\r\n")

    def talk() -> list[int]:
        with ExitStack() as stack:
            members = [stack.enter_context(member(nick)) for nick in ("ann", "bob")]
            for client in members:
                while b"bob has joined" not in client.recv(1 << 16):
                    pass
            loud = stack.enter_context(member("𐍈" * 20))
            loud.sendall(b"x\n" * lines + b"last\n")
            return [read(client) for client in (*members, loud)]

    assert (yield deferToThread(talk)) == [lines] * 3


def test_everybody_is_told_that_the_end_is_near() -> None:
    ann = Client(ChatFactory(), "ann", "tea")
    ann.protocol.drain()
    assert ann.closing
    assert "about to end" in ann.hears()[0]


@pytest.mark.parametrize("bound", ["max_line", "max_members", "max_rooms", "max_name", "max_unsent"])
def test_a_bound_below_one_is_refused(bound) -> None:
    with pytest.raises(ValueError, match=f"{bound.replace('_', '-')} is 0"):
        ChatFactory(**{bound: 0})
