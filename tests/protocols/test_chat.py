"""The chat: rooms, names, and a bound on everything, without a reactor."""

import gc
import socket
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionDone
from twisted.internet.testing import StringTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from rtservice.protocols.chat import CHUNK, DELIVERIES_PER_TURN, INPUT_LIMIT, LINES_PER_TURN, ChatFactory


class Call:
    """A delayed call."""

    def __init__(self, calls: "list[Call]", when: float, call: Callable[[], object]) -> None:
        self._calls, self.when, self.call = calls, when, call
        calls.append(self)

    def cancel(self) -> None:
        self._calls.remove(self)


class Turns:
    """A reactor of which a test takes each turn."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.now = 0.0

    def seconds(self) -> float:
        return self.now

    def callLater(self, delay: float, call: Any, *arguments: Any) -> Call:
        return Call(self.calls, self.now + delay, lambda: call(*arguments))

    def turn(self) -> None:
        """Do what is due now, and not what that asks for."""
        for call in [call for call in self.calls if call.when <= self.now]:
            if call in self.calls:
                self.calls.remove(call)
                call.call()

    def settle(self, seconds: float = 1000.0) -> int:
        """Let so many seconds pass; return how many turns were taken."""
        end, count = self.now + seconds, 0
        while (due := min((call.when for call in self.calls), default=end + 1)) <= end:
            self.now = max(self.now, due)
            self.turn()
            count += 1
            assert count < 100_000, "the work has no end"
        self.now = end
        return count


class Transport(StringTransport):
    """One that counts the bytes that a client has not read, and asks its producer to pause, as Twisted's do."""

    unsent = 0
    stalled = False  # the client does not read
    writes = 0

    def write(self, data: bytes) -> None:
        super().write(data)
        self.writes += 1
        if self.stalled:
            self.unsent += len(data)
            if self.unsent > 64 * 1024:
                self.producer.pauseProducing()

    def read_all(self) -> None:
        """The client has read everything."""
        self.unsent = 0
        if self.producer is not None:
            self.producer.resumeProducing()

    def abortConnection(self) -> None:
        self.disconnecting = True


class Client:
    """One connection: what the server would see and send."""

    def __init__(self, factory: ChatFactory, nick: str = "", room: str = "") -> None:
        factory.clock = self.clock = factory.clock or Turns()
        self.protocol: Any = factory.buildProtocol(None)
        self.transport = Transport()
        self.protocol.makeConnection(self.transport)
        if nick:
            self.says(nick)
        if room:
            self.says(f"/join {room}")
        self.hears()

    def sends(self, *lines: str) -> None:
        """Lines arrive at the server, in one event."""
        self.protocol.dataReceived("".join(f"{line}\r\n" for line in lines).encode())

    def says(self, *lines: str) -> None:
        """Lines arrive at the server, which does all that they ask for."""
        self.sends(*lines)
        self.clock.settle()

    def hears(self) -> list[str]:
        heard = self.transport.value().decode().splitlines()
        self.transport.clear()
        return heard

    def goes(self) -> None:
        self.protocol.connectionLost(Failure(ConnectionDone()))
        self.clock.settle()

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
    wrong = "* a name consists of up to 5 letters of one script, digits and . _ -"
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
    [
        (b"x" * 101, "the line is too long; the maximum is 100 bytes"),
        (b"\xff\n", "the line is not UTF-8"),
        (b"/quit\n", "goodbye"),
    ],
)
def test_a_client_is_told_why_it_is_closed_and_not_heard_any_more(data, words) -> None:
    factory = ChatFactory(max_line=100)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob", "tea")
    ann.hears()
    bob.protocol.dataReceived(data)
    factory.clock.settle()
    assert words in bob.hears()[-1]
    assert bob.closing
    assert bob.transport.producer is None
    bob.says("still here")
    assert ann.hears() == []
    assert factory.clock.calls == []


def test_members_and_rooms_are_bounded() -> None:
    factory = ChatFactory(max_members=2, max_rooms=1)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob")
    third = Client(factory)
    assert third.closing
    third.goes()
    bob.says("/join den", "/join tea")
    assert bob.hears() == ["* there is 1 room already", "* bob has joined tea"]
    assert not ann.closing
    bob.goes()
    assert not Client(factory, "eve").closing


def test_a_member_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    factory = ChatFactory(max_unsent=1000)
    ann, slow = Client(factory, "ann", "tea"), Client(factory, "slow", "tea")
    ann.hears()
    slow.hears()
    slow.transport.unsent = 995
    ann.says("hello")
    assert (ann.hears(), slow.hears()) == (["ann: hello"], [])
    assert slow.closing
    slow.goes()
    assert ann.hears() == ["* slow has left tea"]
    assert factory.metrics()["too_slow_total"] == 1


def crowd(factory: ChatFactory, count: int, room: str = "den") -> list[Client]:
    """So many members of a room, of which the first has the first word."""
    members = [Client(factory) for _ in range(count)]
    for number, member in enumerate(members):
        member.sends(f"member-{number}", f"/join {room}")
    factory.clock.settle()
    for member in members:
        member.hears()
        member.transport.writes = 0
    return members


def most_writes_in_a_turn(factory: ChatFactory, clients: list[Client]) -> int:
    """Take turns until there is nothing to do; return the most writes that one of them did."""
    most = 0
    for _ in range(100_000):
        if not factory.clock.calls:
            return most
        before = sum(client.transport.writes for client in clients)
        factory.clock.now = max(factory.clock.now, min(call.when for call in factory.clock.calls))
        factory.clock.turn()
        most = max(most, sum(client.transport.writes for client in clients) - before)
    raise AssertionError("the work has no end")


def one_says_something(members: list[Client]) -> None:
    members[0].sends("hello")


def one_says_very_much(members: list[Client]) -> None:
    members[0].sends(*["a"] * 20_000)


def all_say_something(members: list[Client]) -> None:
    for member in members:
        member.sends("a", "b")


def one_flips_its_name(members: list[Client]) -> None:
    members[0].sends(*["/nick flip", "/nick flop"] * 200)


def all_flip_their_names(members: list[Client]) -> None:
    for number, member in enumerate(members):
        member.sends(f"/nick flip-{number}", f"/nick flop-{number}")


def all_change_the_room(members: list[Client]) -> None:
    for member in members:
        member.sends("/join out", "/join den", "/leave", "/join den")


def most_are_gone_at_once(members: list[Client]) -> None:
    for member in members[100:]:
        member.protocol.connectionLost(Failure(ConnectionDone()))


def all_ask_who_is_there(members: list[Client]) -> None:
    for member in members:
        member.sends("/who", "/rooms")


def the_service_ends(members: list[Client]) -> None:
    for member in members:
        member.protocol.drain()


@pytest.mark.parametrize(
    "happens",
    [
        *(one_says_something, one_says_very_much, all_say_something, one_flips_its_name, all_flip_their_names),
        *(all_change_the_room, most_are_gone_at_once, all_ask_who_is_there, the_service_ends),
    ],
)
def test_a_room_of_a_thousand_never_takes_more_than_its_share_of_a_turn(happens) -> None:
    factory = ChatFactory(max_members=1100)
    members = crowd(factory, 1000)
    happens(members)
    # Nothing of it in the event itself.
    assert sum(member.transport.writes for member in members) == 0
    # An answer is a write too; with it come what was said before, and what is said at the end.
    assert 0 < most_writes_in_a_turn(factory, members) <= DELIVERIES_PER_TURN + 2 * LINES_PER_TURN
    if happens is not the_service_ends and happens is not most_are_gone_at_once:
        assert not any(member.closing for member in members)


@pytest.mark.parametrize(
    "line", ["x", "", "\x07" * 1000, "x" * 1000, "/nick x y", "/who", "/rooms", "/join a b", "/help"]
)
def test_a_turn_handles_a_bounded_number_of_lines(line) -> None:
    factory = ChatFactory()
    ann, *_ = crowd(factory, 100)
    handled = 0

    def count(text: str, handle: Callable[[str], None] = ann.protocol._handle) -> None:
        nonlocal handled
        handled += 1
        handle(text)

    ann.protocol._handle = count
    ann.sends(*[line] * 300)
    assert handled == 0
    most = 0
    while factory.clock.calls:
        before = handled
        factory.clock.now += 1
        factory.clock.turn()
        most = max(most, handled - before)
    assert handled == 300
    weight = 1 + (len(line.encode()) + 1) // 256 + (100 // 16 if line == "/who" else 0)
    assert most <= LINES_PER_TURN // weight + 1


def test_lines_have_the_same_order_for_all_whenever_they_join_and_ask() -> None:
    factory = ChatFactory(max_unsent=4000)  # so that a round has few lines
    members = crowd(factory, 300)
    heard: dict[Client, list[str]] = {member: [] for member in members}
    for number in range(60):
        for member in members[number::60]:
            member.sends(f"line {number}", *(["/who"] if number % 7 == 0 else []))
        if number % 10 == 0:
            late = Client(factory)
            late.sends(f"late-{number}", "/join den", "I am late")
            heard[late] = []
            members[-1 - number].sends("/leave", "/join den")
        factory.clock.now += 0.01
        factory.clock.turn()
    factory.clock.settle()
    for member, lines in heard.items():
        lines += [line for line in member.hears() if ": " in line]
    said = heard[members[1]]
    assert len(said) == 300 + 6
    places = {line: place for place, line in enumerate(said)}
    assert len(places) == len(said)
    for member, lines in heard.items():
        order = [places[line] for line in lines]
        assert order == sorted(order)
        if member.protocol.nick.startswith("late"):
            assert lines == said[order[0] :]
        elif member in members[1:-60]:
            assert lines == said


def test_an_answer_comes_after_what_was_said_before_it() -> None:
    factory = ChatFactory()
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob", "tea")
    ann.hears()
    bob.sends("before", "/who", "after")
    factory.clock.settle()
    assert bob.hears() == ["bob: before", "* ann bob", "bob: after"]
    assert ann.hears() == ["bob: before", "bob: after"]


def test_many_short_lines_are_one_write_to_each_member() -> None:
    factory = ChatFactory()
    members = crowd(factory, 50)
    members[0].sends(*["a"] * 100)
    factory.clock.settle()
    assert {member.transport.writes for member in members} == {1}
    assert members[7].hears() == ["member-0: a"] * 100


def test_a_flood_in_one_room_leaves_other_rooms_their_turns() -> None:
    factory = ChatFactory(max_members=1100)
    members = crowd(factory, 1000)
    ann = Client(factory, "ann", "tea")
    for member in members:
        member.sends(*["a"] * 1000)
    for _ in range(20):
        factory.clock.now += 0.005
        factory.clock.turn()
        ann.sends("hello")
        # The lines are handled and sent in the same turn, or in the next one.
        factory.clock.turn()
        factory.clock.turn()
        assert ann.hears() == ["ann: hello"]


def test_who_floods_a_room_is_not_read_from_and_others_have_their_say() -> None:
    factory = ChatFactory()
    loud, bob, eve = crowd(factory, 3)
    loud.sends(*["x" * 1000] * 60)
    assert loud.transport.producerState == "paused"
    bob.sends("and I")
    assert bob.transport.producerState == "producing"
    factory.clock.turn()
    heard = eve.hears()
    assert "member-1: and I" in heard
    assert 1 < len(heard) < 30
    factory.clock.settle()
    assert eve.hears().count("member-0: " + "x" * 1000) == 61 - len(heard)
    assert loud.transport.producerState == "producing"


def test_what_waits_is_bounded_however_much_is_sent() -> None:
    factory = ChatFactory(max_members=300)
    members = crowd(factory, 200)
    loud = members[0]
    log = 0
    for _ in range(200):
        if loud.transport.producerState == "producing":
            loud.protocol.dataReceived(b"y" * 1000 + b"\n" * 64_535)
        factory.clock.turn()  # no time passes: the rate of the room is used up
        log = max(log, len(factory.rooms["den"]._log))
        assert len(loud.protocol._input) <= INPUT_LIMIT + 65_535
    assert log < 2 * CHUNK + 2000


def test_members_that_come_and_go_do_not_fill_a_room_that_is_full() -> None:
    factory = ChatFactory(max_members=300)
    members = crowd(factory, 100)
    for member in members:
        member.sends(*["x" * 1000] * 10)
    most = 0
    for _ in range(500):
        guest = Client.__new__(Client)  # one whose turns are not taken at once
        guest.protocol, guest.transport = factory.buildProtocol(None), Transport()
        guest.protocol.makeConnection(guest.transport)
        guest.sends("guest", "/join den")
        for _ in range(3):
            factory.clock.turn()
        guest.protocol.connectionLost(Failure(ConnectionDone()))
        room = factory.rooms["den"]
        most = max(most, len(room._log))
        assert len(room.speakers) <= 101
    assert most < 2 * CHUNK + 2000
    factory.clock.settle()
    assert not any(member.closing for member in members)


def test_one_that_escapes_from_a_flooded_room_does_not_wait_for_it() -> None:
    factory = ChatFactory(max_members=300)
    members = crowd(factory, 100)
    for member in members[1:]:
        member.sends(*["x" * 1000] * 10)
    for _ in range(5):
        factory.clock.turn()
    members[0].sends("/join tea", "peace")
    for _ in range(3):
        factory.clock.turn()
    assert members[0].hears()[-2:] == ["* member-0 has joined tea", "member-0: peace"]


def test_one_that_reads_as_fast_as_the_rate_of_a_room_is_never_cut_off() -> None:
    factory = ChatFactory(max_unsent=64_000, max_rate=10_000)
    members = crowd(factory, 20)
    reader = members[-1]
    reader.transport.stalled = True
    for member in members[:-1]:
        member.sends(*["x" * 1000] * 60)
    heard = 0
    while factory.clock.calls:
        factory.clock.settle(0.1)
        heard += len(reader.hears())
        assert not reader.closing
        reader.transport.unsent = max(0, reader.transport.unsent - 1000)
        if not reader.transport.unsent:
            reader.transport.read_all()
    assert heard == 19 * 60
    assert 100 < factory.clock.now - 1000 < 125  # 1.15 MB


def test_answers_wait_for_one_that_does_not_read() -> None:
    factory = ChatFactory(max_members=1100)
    members = crowd(factory, 1000)
    slow = members[0]
    slow.transport.stalled = True
    slow.sends(*["/who"] * 1000)
    factory.clock.settle()
    assert 64 * 1024 < slow.transport.unsent < 80 * 1024
    assert slow.transport.producerState == "paused"
    assert not slow.closing
    assert factory.clock.calls == []
    answers = 0
    for _ in range(1000):
        answers += len(slow.hears())
        slow.transport.read_all()
        factory.clock.settle()
    assert answers == 1000
    assert slow.transport.producerState == "producing"


def test_one_of_a_foreign_transport_that_does_not_read_is_cut_off_too() -> None:
    factory = ChatFactory()
    ann, slow = crowd(factory, 2)
    slow.transport.stalled = True
    type(slow.transport).unsent, unsent = 0, type(slow.transport).unsent
    for _ in range(500):
        ann.says("x" * 1000)
        known, slow.transport.unsent = slow.transport.unsent, 0
        if slow.closing:
            break
        if known:
            slow.transport.producer.pauseProducing()
    type(slow.transport).unsent = unsent
    assert slow.closing
    assert factory.metrics()["too_slow_total"] == 1


def test_the_list_of_a_very_large_room_is_cut() -> None:
    factory = ChatFactory(max_members=1100)
    members = crowd(factory, 1003)
    members[5].says("/who")
    (line,) = members[5].hears()
    assert line.startswith("* member-0 member-1 member-10 ")
    assert line.endswith(" and 3 more")
    assert line.count("member") == 1000


def test_one_that_goes_while_it_waits_says_no_more() -> None:
    factory = ChatFactory()
    ann, bob = crowd(factory, 2)
    ann.sends(*["x"] * 1000)
    factory.clock.turn()
    assert len(ann.hears()) == LINES_PER_TURN
    ann.goes()
    factory.clock.settle()
    assert bob.hears()[LINES_PER_TURN - 1 :] == ["member-0: x", "* member-0 has left den"]
    assert factory.clock.calls == []


def test_a_room_that_ends_lets_those_make_a_new_one_who_waited_for_it() -> None:
    factory = ChatFactory()
    (loud,) = crowd(factory, 1)
    bob = Client(factory, "bob")
    loud.sends(*["x" * 1000] * 60)
    for _ in range(10):
        factory.clock.turn()
    bob.sends("/join den", "hello")
    factory.clock.turn()
    assert bob.hears() == []
    loud.protocol.connectionLost(Failure(ConnectionDone()))
    factory.clock.turn()
    factory.clock.turn()
    assert bob.hears() == ["* bob has joined den", "bob: hello"]
    factory.clock.settle()
    assert factory.rooms.keys() == {"den"}


def test_members_that_go_are_freed_at_once() -> None:
    factory = ChatFactory()
    members = crowd(factory, 20)
    for member in members:
        member.sends(*["x" * 1000] * 60)
    for _ in range(5):
        factory.clock.turn()
    gc.collect()
    gc.disable()
    try:
        gone = []
        for member in members[10:]:
            member.transport.producer = None  # as every transport does at its end
            member.protocol.connectionLost(Failure(ConnectionDone()))
            gone.append(weakref.ref(member.protocol))
        del members[10:], member
        for _ in range(50):
            factory.clock.turn()
        assert [one() for one in gone] == [None] * 10
    finally:
        gc.enable()


def test_stopping_the_factory_leaves_no_delayed_calls() -> None:
    factory = ChatFactory()
    for member in crowd(factory, 3):
        member.sends(*["x" * 1000] * 60)
    for _ in range(10):
        factory.clock.turn()
    assert any(call.when > factory.clock.now for call in factory.clock.calls)  # the room waits for its rate
    member.sends("more")
    factory.stopFactory()
    assert factory.clock.calls == []


@pytest.mark.parametrize(
    ("taken", "wanted", "problem"),
    [
        ("anna", "Anna", "Anna looks like anna, which is taken"),
        ("anna", "аnnа", "a name consists of up to 20 letters of one script, digits and . _ -"),
        ("coco", "сосо", "сосо looks like coco, which is taken"),
        ("bob", "b0b", "b0b looks like bob, which is taken"),
        ("ann", "ann\u3164", "a name consists of up to 20 letters of one script, digits and . _ -"),
        ("ab", "ａｂ", "ab is taken"),
    ],
)
def test_a_name_like_a_taken_one_is_refused_for_members_and_rooms(taken, wanted, problem) -> None:
    factory = ChatFactory()
    Client(factory, taken, taken)
    other = Client(factory)
    other.says(wanted)
    assert other.hears() == [f"* {problem}"]
    other.says("other")
    other.hears()
    other.says(f"/join {wanted}")
    assert other.hears() == ["* other has joined ab" if taken == "ab" else f"* {problem}"]


def test_one_may_change_the_case_of_its_own_name_and_not_take_it_twice() -> None:
    factory = ChatFactory()
    ann = Client(factory, "ann", "tea")
    ann.says("/nick Ann", "/nick Ann", "/join tea")
    assert ann.hears() == ["* ann is now Ann", "* Ann is taken", "* you are in tea already"]
    ann.goes()
    assert Client(factory, "ann").protocol.nick == "ann"


@pytest_twisted.inlineCallbacks
def test_a_flood_is_heard_by_all_who_read(serve):
    address = ("127.0.0.1", serve(ChatFactory(max_rate=1 << 30)).getHost().port)
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
            loud = stack.enter_context(member("ж" * 20))
            loud.sendall(b"x\n" * lines + b"last\n")
            return [read(client) for client in (*members, loud)]

    assert (yield deferToThread(talk)) == [lines] * 3


def test_everybody_is_told_that_the_end_is_near() -> None:
    ann = Client(ChatFactory(), "ann", "tea")
    ann.sends("the last words")
    ann.protocol.drain()
    ann.clock.settle()
    assert ann.closing
    assert "the chat shuts down" in ann.hears()[-1]


@pytest.mark.parametrize("bound", ["max_line", "max_members", "max_rooms", "max_name", "max_unsent", "max_rate"])
def test_a_bound_below_one_is_refused(bound) -> None:
    with pytest.raises(ValueError, match=f"{bound.replace('_', '-')} is 0"):
        ChatFactory(**{bound: 0})
