"""The chat: rooms, names, and limits of memory and of work per turn, without a reactor."""

import gc
import socket
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionDone
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from rtservice.protocols.chat import ChatFactory
from rtservice.protocols.chat.member import INPUT_LIMIT
from rtservice.protocols.chat.turns import DELIVERIES_PER_TURN, LINES_PER_TURN
from tests.support.chat import Client, Transport, chat


@pytest.fixture(autouse=True)
def turns_without_time(monkeypatch) -> None:
    """Let the hub deliver in turns of the same size on slow machines."""
    monkeypatch.setattr("rtservice.hub.fanout.TURN_SECONDS", 60.0)


def test_a_message_is_sent_to_the_members_of_the_room_only() -> None:
    factory = chat()
    ann, bob, eve = (Client(factory, nick, room) for nick, room in (("ann", "tea"), ("bob", "tea"), ("eve", "den")))
    assert ann.received() == ["* bob has joined tea"]
    ann.send_and_settle("hello", "")
    assert ann.received() == bob.received() == ["ann: hello"]
    assert eve.received() == []
    bob.send_and_settle("/nick rob", "/who", "/rooms", "/leave", "into the void")
    assert bob.received() == [
        *("* bob is now rob", "* ann rob", "* den tea", "* rob has left tea"),
        "* you are in no room: /join ROOM",
    ]
    ann.disconnect()
    eve.disconnect()
    assert factory.rooms == {}
    assert factory.metrics() == {"members": 1, "rooms": 0, "messages_total": 1, "too_slow_total": 0, "skipped_total": 0}


def test_a_name_is_unique_and_released_on_disconnect() -> None:
    factory = chat(max_name=5)
    ann, other = Client(factory, "ann"), Client(factory)
    other.send_and_settle("ann", "a b", "toolong", "\x1b[2J", "")
    wrong = "* a name consists of up to 5 letters of one script, digits and . _ -"
    assert other.received() == ["* ann is taken", wrong, wrong, wrong, wrong]
    ann.disconnect()
    other.send_and_settle("ann")
    assert other.received()[0].startswith("* hello ann; ")


def test_terminal_control_characters_are_removed_from_messages() -> None:
    factory = chat()
    ann = Client(factory, "ann", "tea")
    ann.send_and_settle("a\x1b[2J\x07\u202eb")
    assert ann.received() == ["ann: a[2Jb"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"x" * 101, "the line is too long; the maximum is 100 bytes"),
        (b"\xff\n", "the line is not UTF-8"),
        (b"/quit\n", "goodbye"),
    ],
)
def test_a_closed_client_gets_the_reason_and_its_later_lines_are_ignored(data, words) -> None:
    factory = chat(max_line=100)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob", "tea")
    ann.received()
    bob.protocol.dataReceived(data)
    factory.clock.settle()
    assert words in bob.received()[-1]
    assert bob.closing
    assert bob.transport.producer is None
    bob.send_and_settle("still here")
    assert ann.received() == []
    assert factory.clock.calls == []


def test_the_numbers_of_members_and_rooms_are_limited() -> None:
    factory = chat(max_members=2, max_rooms=1)
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob")
    third = Client(factory)
    assert third.closing
    third.disconnect()
    bob.send_and_settle("/join den", "/join tea")
    assert bob.received() == ["* there is 1 room already", "* bob has joined tea"]
    assert not ann.closing
    bob.disconnect()
    assert not Client(factory, "eve").closing


def test_only_the_member_that_does_not_read_is_disconnected() -> None:
    factory = chat(max_unsent=1000)
    ann, slow = Client(factory, "ann", "tea"), Client(factory, "slow", "tea")
    ann.received()
    slow.received()
    slow.transport.unsent = 995
    ann.send_and_settle("hello")
    assert (ann.received(), slow.received()) == (["ann: hello"], [])
    assert slow.closing
    slow.disconnect()
    assert ann.received() == ["* slow has left tea"]
    assert factory.metrics()["too_slow_total"] == 1


def join_members(factory: ChatFactory, count: int, room: str = "den") -> list[Client]:
    """Return new members of a room; the server handles lines of the first one first."""
    members = [Client(factory) for _ in range(count)]
    for number, member in enumerate(members):
        member.send(f"member-{number}", f"/join {room}")
    factory.clock.settle()
    for member in members:
        member.received()
        member.transport.writes = 0
    return members


def maximum_writes_per_turn(factory: ChatFactory, clients: list[Client]) -> int:
    """Run turns until no call is scheduled; return the maximum number of writes in a turn."""
    maximum = 0
    for _ in range(100_000):
        if not factory.clock.calls:
            return maximum
        before = sum(client.transport.writes for client in clients)
        factory.clock.now = max(factory.clock.now, min(call.when for call in factory.clock.calls))
        factory.clock.turn()
        maximum = max(maximum, sum(client.transport.writes for client in clients) - before)
    raise AssertionError("the work has no end")


def one_member_sends_a_line(members: list[Client]) -> None:
    members[0].send("hello")


def one_member_sends_many_lines(members: list[Client]) -> None:
    members[0].send(*["a"] * 20_000)


def all_members_send_lines(members: list[Client]) -> None:
    for member in members:
        member.send("a", "b")


def one_member_changes_its_name(members: list[Client]) -> None:
    members[0].send(*["/nick flip", "/nick flop"] * 200)


def all_members_change_their_names(members: list[Client]) -> None:
    for number, member in enumerate(members):
        member.send(f"/nick flip-{number}", f"/nick flop-{number}")


def all_members_change_rooms(members: list[Client]) -> None:
    for member in members:
        member.send("/join out", "/join den", "/leave", "/join den")


def most_members_disconnect(members: list[Client]) -> None:
    for member in members[100:]:
        member.protocol.connectionLost(Failure(ConnectionDone()))


def all_members_list_members_and_rooms(members: list[Client]) -> None:
    for member in members:
        member.send("/who", "/rooms")


def the_service_drains(members: list[Client]) -> None:
    for member in members:
        member.protocol.drain()


@pytest.mark.parametrize(
    "activity",
    [
        *(
            one_member_sends_a_line,
            one_member_sends_many_lines,
            all_members_send_lines,
            one_member_changes_its_name,
            all_members_change_their_names,
        ),
        *(all_members_change_rooms, most_members_disconnect, all_members_list_members_and_rooms, the_service_drains),
    ],
)
def test_a_room_of_1000_members_has_a_limit_of_writes_per_reactor_turn(activity) -> None:
    factory = chat(max_members=1100)
    members = join_members(factory, 1000)
    activity(members)
    # dataReceived itself writes nothing.
    assert sum(member.transport.writes for member in members) == 0
    # A reply is a write too, together with the lines before it and the notice at the end.
    assert 0 < maximum_writes_per_turn(factory, members) <= DELIVERIES_PER_TURN + 2 * LINES_PER_TURN
    if activity is not the_service_drains and activity is not most_members_disconnect:
        assert not any(member.closing for member in members)


@pytest.mark.parametrize(
    "line", ["x", "", "\x07" * 1000, "x" * 1000, "/nick x y", "/who", "/rooms", "/join a b", "/help"]
)
def test_a_reactor_turn_handles_a_limited_number_of_lines(line) -> None:
    factory = chat()
    ann, *_ = join_members(factory, 100)
    handled = 0

    def count(text: str, handle: Callable[[str], Any] = ann.protocol._handle) -> Any:
        nonlocal handled
        handled += 1
        return handle(text)

    ann.protocol._handle = count
    ann.send(*[line] * 300)
    assert handled == 0
    maximum = 0
    while factory.clock.calls:
        before = handled
        factory.clock.now += 1
        factory.clock.turn()
        maximum = max(maximum, handled - before)
    assert handled == 300
    weight = 1 + (len(line.encode()) + 1) // 256 + (100 // 16 if line == "/who" else 0)
    assert maximum <= LINES_PER_TURN // weight + 1


def test_all_members_receive_lines_in_the_same_order() -> None:
    factory = chat(max_unsent=4000)  # limits a round to few lines
    members = join_members(factory, 300)
    lines_received: dict[Client, list[str]] = {member: [] for member in members}
    for number in range(60):
        for member in members[number::60]:
            member.send(f"line {number}", *(["/who"] if number % 7 == 0 else []))
        if number % 10 == 0:
            late = Client(factory)
            late.send(f"late-{number}", "/join den", "hello")
            lines_received[late] = []
            members[-1 - number].send("/leave", "/join den")
        factory.clock.now += 0.01
        factory.clock.turn()
    factory.clock.settle()
    for member, lines in lines_received.items():
        lines += [line for line in member.received() if ": " in line]
    expected = lines_received[members[1]]
    assert len(expected) == 300 + 6
    positions = {line: position for position, line in enumerate(expected)}
    assert len(positions) == len(expected)
    for member, lines in lines_received.items():
        order = [positions[line] for line in lines]
        assert order == sorted(order)
        if member.protocol.nick.startswith("late"):
            assert lines == expected[order[0] :]
        elif member in members[1:-60]:
            assert lines == expected


def test_a_reply_follows_earlier_messages() -> None:
    factory = chat()
    ann, bob = Client(factory, "ann", "tea"), Client(factory, "bob", "tea")
    ann.received()
    bob.send("before", "/who", "after")
    factory.clock.settle()
    assert bob.received() == ["bob: before", "* ann bob", "bob: after"]
    assert ann.received() == ["bob: before", "bob: after"]


def test_short_lines_are_combined_into_one_write_per_member() -> None:
    factory = chat()
    members = join_members(factory, 50)
    members[0].send(*["a"] * 100)
    factory.clock.settle()
    assert {member.transport.writes for member in members} == {1}
    assert members[7].received() == ["member-0: a"] * 100


def test_a_flood_in_one_room_does_not_delay_other_rooms() -> None:
    factory = chat(max_members=1100)
    members = join_members(factory, 1000)
    ann = Client(factory, "ann", "tea")
    for member in members:
        member.send(*["a"] * 1000)
    for _ in range(20):
        factory.clock.now += 0.005
        factory.clock.turn()
        ann.send("hello")
        # The lines are handled in the same turn, come back in the next one, and are sent then or in the one after.
        for _ in range(4):
            factory.clock.turn()
        assert ann.received() == ["ann: hello"]


def test_reading_is_paused_for_a_flooding_member_only() -> None:
    factory = chat()
    flooder, bob, eve = join_members(factory, 3)
    flooder.send(*["x" * 1000] * 60)
    assert flooder.transport.producerState == "paused"
    bob.send("and I")
    assert bob.transport.producerState == "producing"
    for _ in range(3):  # handled, come back, sent
        factory.clock.turn()
    lines_received = eve.received()
    assert "member-1: and I" in lines_received
    assert 1 < len(lines_received) < 30
    factory.clock.settle()
    assert eve.received().count("member-0: " + "x" * 1000) == 61 - len(lines_received)
    assert flooder.transport.producerState == "producing"


def test_queued_input_and_queued_lines_are_bounded() -> None:
    factory = chat(max_members=300)
    members = join_members(factory, 200)
    flooder = members[0]
    log = 0
    for _ in range(200):
        if flooder.transport.producerState == "producing":
            flooder.protocol.dataReceived(b"y" * 1000 + b"\n" * 64_535)
        factory.clock.turn()  # the clock stands still: the rate of the room is used up
        log = max(log, len(factory.rooms["den"]._log))
        assert len(flooder.protocol._input) <= INPUT_LIMIT + 65_535
    assert log < 2 * factory.limits.chunk + 2000


def test_short_lived_members_do_not_grow_the_queue_of_a_flooded_room() -> None:
    factory = chat(max_members=300)
    members = join_members(factory, 100)
    for member in members:
        member.send(*["x" * 1000] * 10)
    maximum = 0
    for _ in range(500):
        guest = Client.__new__(Client)  # without the turns that Client() runs
        guest.protocol, guest.transport = factory.buildProtocol(None), Transport()
        guest.protocol.makeConnection(guest.transport)
        guest.send("guest", "/join den")
        for _ in range(3):
            factory.clock.turn()
        guest.protocol.connectionLost(Failure(ConnectionDone()))
        room = factory.rooms["den"]
        maximum = max(maximum, len(room._log))
        assert len(room.speakers) <= 101
    assert maximum < 2 * factory.limits.chunk + 2000
    factory.clock.settle()
    assert not any(member.closing for member in members)


def test_a_member_that_leaves_a_flooded_room_does_not_wait_for_it() -> None:
    factory = chat(max_members=300)
    members = join_members(factory, 100)
    for member in members[1:]:
        member.send(*["x" * 1000] * 10)
    for _ in range(5):
        factory.clock.turn()
    members[0].send("/join tea", "peace")
    for _ in range(8):
        factory.clock.turn()
    assert members[0].received()[-2:] == ["* member-0 has joined tea", "member-0: peace"]


def test_a_member_that_reads_at_the_rate_of_the_room_is_not_disconnected() -> None:
    factory = chat(max_unsent=64_000, max_rate=10_000)
    members = join_members(factory, 20)
    reader = members[-1]
    reader.transport.stalled = True
    for member in members[:-1]:
        member.send(*["x" * 1000] * 60)
    lines_received = 0
    while factory.clock.calls:
        factory.clock.settle(0.1)
        lines_received += len(reader.received())
        assert not reader.closing
        reader.transport.unsent = max(0, reader.transport.unsent - 1000)
        if not reader.transport.unsent:
            reader.transport.read_all()
    assert lines_received == 19 * 60
    assert 100 < factory.clock.now - 1000 < 125  # 1.15 MB


def test_replies_are_paused_for_a_member_that_does_not_read() -> None:
    factory = chat(max_members=1100)
    members = join_members(factory, 1000)
    slow = members[0]
    slow.transport.stalled = True
    slow.send(*["/who"] * 1000)
    factory.clock.settle()
    assert 64 * 1024 < slow.transport.unsent < 80 * 1024
    assert slow.transport.producerState == "paused"
    assert not slow.closing
    assert factory.clock.calls == []
    answers = 0
    for _ in range(1000):
        answers += len(slow.received())
        slow.transport.read_all()
        factory.clock.settle()
    assert answers == 1000
    assert slow.transport.producerState == "producing"


def test_a_member_that_does_not_read_is_disconnected_on_other_transports_too() -> None:
    factory = chat()
    ann, slow = join_members(factory, 2)
    slow.transport.stalled = True
    type(slow.transport).unsent, unsent = 0, type(slow.transport).unsent
    for _ in range(500):
        ann.send_and_settle("x" * 1000)
        unsent_now, slow.transport.unsent = slow.transport.unsent, 0
        if slow.closing:
            break
        if unsent_now:
            slow.transport.producer.pauseProducing()
    type(slow.transport).unsent = unsent
    assert slow.closing
    assert factory.metrics()["too_slow_total"] == 1


def test_the_list_of_a_very_large_room_is_truncated() -> None:
    factory = chat(max_members=1100)
    members = join_members(factory, 1003)
    members[5].send_and_settle("/who")
    (line,) = members[5].received()
    assert line.startswith("* member-0 member-1 member-10 ")
    assert line.endswith(" and 3 more")
    assert line.count("member") == 1000


def test_queued_lines_of_a_disconnected_member_are_discarded() -> None:
    factory = chat()
    ann, bob = join_members(factory, 2)
    ann.send(*["x"] * 1000)
    factory.clock.turn()
    assert factory.messages == LINES_PER_TURN
    ann.disconnect()
    factory.clock.settle()
    assert bob.received() == ["member-0: x"] * LINES_PER_TURN + ["* member-0 has left den"]
    assert factory.clock.calls == []


def test_a_queued_join_creates_the_room_again_after_its_last_member_leaves() -> None:
    factory = chat()
    (flooder,) = join_members(factory, 1)
    bob = Client(factory, "bob")
    flooder.send(*["x" * 1000] * 60)
    for _ in range(10):
        factory.clock.turn()
    bob.send("/join den", "hello")
    factory.clock.turn()
    assert bob.received() == []
    flooder.protocol.connectionLost(Failure(ConnectionDone()))
    for _ in range(8):
        factory.clock.turn()
    assert bob.received() == ["* bob has joined den", "bob: hello"]
    factory.clock.settle()
    assert factory.rooms.keys() == {"den"}


def test_disconnected_members_are_freed_immediately() -> None:
    factory = chat()
    members = join_members(factory, 20)
    for member in members:
        member.send(*["x" * 1000] * 60)
    for _ in range(5):
        factory.clock.turn()
    gc.collect()
    gc.disable()
    try:
        references = []
        for member in members[10:]:
            member.transport.producer = None  # as every transport does when the connection is lost
            member.protocol.connectionLost(Failure(ConnectionDone()))
            references.append(weakref.ref(member.protocol))
        del members[10:], member
        for _ in range(50):
            factory.clock.turn()
        assert [reference() for reference in references] == [None] * 10
    finally:
        gc.enable()


def test_stopping_the_factory_leaves_no_delayed_calls() -> None:
    factory = chat()
    for member in join_members(factory, 3):
        member.send(*["x" * 1000] * 60)
    for _ in range(10):
        factory.clock.turn()
    assert any(call.when > factory.clock.now for call in factory.clock.calls)  # the room waits for its rate
    member.send("more")
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
def test_a_name_confusable_with_a_taken_one_is_rejected(taken, wanted, problem) -> None:
    factory = chat()
    Client(factory, taken, taken)
    other = Client(factory)
    other.send_and_settle(wanted)
    assert other.received() == [f"* {problem}"]
    other.send_and_settle("other")
    other.received()
    other.send_and_settle(f"/join {wanted}")
    assert other.received() == ["* other has joined ab" if taken == "ab" else f"* {problem}"]


def test_a_member_may_change_the_case_of_its_name() -> None:
    factory = chat()
    ann = Client(factory, "ann", "tea")
    ann.send_and_settle("/nick Ann", "/nick Ann", "/join tea")
    assert ann.received() == ["* ann is now Ann", "* Ann is taken", "* you are in tea already"]
    ann.disconnect()
    assert Client(factory, "ann").protocol.nick == "ann"


@pytest_twisted.inlineCallbacks
def test_every_reading_member_receives_all_lines_of_a_flood(serve):
    from twisted.internet import reactor

    address = ("127.0.0.1", serve(chat(clock=reactor, max_rate=1 << 30)).getHost().port)
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
            flooder = stack.enter_context(member("ж" * 20))
            flooder.sendall(b"x\n" * lines + b"last\n")
            return [read(client) for client in (*members, flooder)]

    assert (yield deferToThread(talk)) == [lines] * 3


def test_a_drain_sends_a_notice_and_disconnects_members() -> None:
    ann = Client(chat(), "ann", "tea")
    ann.send("the last words")
    ann.protocol.drain()
    ann.clock.settle()
    assert ann.closing
    assert "the chat shuts down" in ann.received()[-1]


@pytest.mark.parametrize("limit", ["max_line", "max_members", "max_rooms", "max_name", "max_unsent", "max_rate"])
def test_a_limit_below_one_is_rejected(limit) -> None:
    with pytest.raises(ValueError, match=f"{limit.replace('_', '-')} is 0"):
        chat(**{limit: 0})
