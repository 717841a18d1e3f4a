"""The chat in several processes that share an engine: rooms, nicknames, presence, and an engine that fails."""

import itertools
from collections.abc import Callable

import pytest

from rtservice.protocols.chat import ChatFactory
from rtservice.protocols.chat.member import ANSWER_SECONDS, INPUT_LIMIT
from rtservice.protocols.chat.room import RETURN_SECONDS
from tests.support.chat import Client, ManualReactor, chat
from tests.support.hub_engine import Engine, EngineCarrier

UNAVAILABLE = "the chat is not available"


class Processes:
    """Three processes with a chat, and their engine."""

    def __init__(self, latency: float, **limits: int) -> None:
        self.clock = ManualReactor()
        self.engine = Engine(self.clock, latency)
        self.carriers = [EngineCarrier(self.engine) for _ in range(3)]
        self.factories = [chat(carrier=carrier, clock=self.clock, **limits) for carrier in self.carriers]

    def __getitem__(self, number: int) -> ChatFactory:
        return self.factories[number]

    def settle(self, seconds: float = 1000.0) -> None:
        self.clock.settle(seconds)


@pytest.fixture(autouse=True)
def turns_without_time(monkeypatch) -> None:
    """Let the hub deliver in turns of the same size on slow machines."""
    monkeypatch.setattr("rtservice.hub.fanout.TURN_SECONDS", 60.0)


@pytest.fixture(params=[0.0, 0.01], ids=["without latency", "with latency"])
def processes(request) -> Callable[..., Processes]:
    return lambda **limits: Processes(request.param, **limits)


def test_a_room_spans_all_processes(processes) -> None:
    world = processes()
    ann, bob, eve = (Client(world[number], nick, "tea") for number, nick in enumerate(("ann", "bob", "eve")))
    assert ann.received() == ["* bob has joined tea", "* eve has joined tea"]
    bob.received()
    ann.send_and_settle("hello")
    bob.send_and_settle("/nick rob", "and you?")
    expected = ["ann: hello", "* bob is now rob", "rob: and you?"]
    assert ann.received() == bob.received() == eve.received() == expected
    bob.send_and_settle("/leave")
    ann.disconnect()
    assert eve.received() == ["* rob has left tea", "* ann has left tea"]
    assert world[0].rooms == world[1].rooms == {}
    eve.disconnect()
    assert world[2].rooms == {}
    assert world.clock.calls == []


def test_a_new_member_first_sees_that_it_has_joined(processes) -> None:
    world = processes()
    ann = Client(world[0], "ann", "tea")
    bob = Client(world[1], "bob")
    for number in range(20):
        ann.send(f"line {number}")
        if number == 10:
            bob.send("/join tea", "/who", "hello")
        world.settle(0.003)
    world.settle()
    lines = bob.received()
    assert lines[0] == "* bob has joined tea"
    assert lines.index("* ann bob") < lines.index("bob: hello")
    # From its own line on, it has all lines, in the same order.
    everything = ann.received()
    assert [line for line in lines if line != "* ann bob"] == everything[everything.index(lines[0]) :]


@pytest.mark.parametrize(
    ("taken", "wanted"), [("ann", "ann"), ("anna", "Anna"), ("coco", "сосо"), ("bob", "b0b"), ("modern", "modem")]
)
def test_nicknames_exclude_each_other_across_processes(processes, taken, wanted) -> None:
    world = processes()
    ann, other = Client(world[0], taken), Client(world[1])
    other.send_and_settle(wanted)
    assert other.received() == [f"* {wanted} is taken, or looks like a name that is taken"]
    ann.send_and_settle("/nick xenia")
    other.send_and_settle(wanted)
    assert other.received()[0].startswith(f"* hello {wanted}; ")
    ann.send_and_settle(f"/nick {taken}")
    assert "is taken" in ann.received()[-1]
    other.disconnect()
    ann.send_and_settle(f"/nick {taken}")
    assert ann.received() == [f"* you are {taken} now"]


def test_a_member_may_change_the_case_of_its_name_and_keeps_it_claimed(processes) -> None:
    world = processes()
    ann = Client(world[0], "ann")
    ann.send_and_settle("/nick ANN", "/nick Ann")
    assert ann.received() == ["* you are ANN now", "* you are Ann now"]
    other = Client(world[1])
    other.send_and_settle("ann")
    assert "is taken" in other.received()[0]
    ann.disconnect()
    assert world.engine.claimed == {}


def test_only_one_of_two_simultaneous_claims_succeeds() -> None:
    world = Processes(0.01)
    clients = [Client(world[number]) for number in (0, 0, 1, 2)]
    for client in clients:
        client.send("mary")
    world.settle()
    greeted = [client for client in clients if "hello" in client.received()[-1]]
    assert len(greeted) == 1
    greeted[0].disconnect()
    assert world.engine.claimed == {}


def test_a_claim_ends_if_the_connection_ends_before_it_is_granted() -> None:
    world = Processes(0.01)
    for seconds in (0.0, 0.005, 0.015, 0.02, 0.025, 0.03, 0.1):
        client = Client(world[0])
        client.send("mary")  # two claims, one after the other
        world.settle(seconds)
        client.disconnect()
        assert world.engine.claimed == {}
        assert "mary" not in world[0].nicks
    assert world.clock.calls == []


def test_a_claim_ends_if_the_connection_ends_between_the_grant_and_the_turn_that_handles_it() -> None:
    world = Processes(0.01)
    client = Client(world[0])
    client.send("mary")
    while not world.engine.claimed:  # a turn of the factory is scheduled when it is granted
        world.clock.now = min(call.when for call in world.clock.calls)
        world.clock.turn()
    client.disconnect()
    assert world.engine.claimed == {}


def test_lines_wait_while_a_nickname_is_claimed() -> None:
    world = Processes(1.0)
    ann = Client(world[0])
    ann.send("ann", "/join tea", "hello", "/nick anna", "again")
    world.settle(0.1)
    assert ann.received() == []
    world.settle()
    lines = ann.received()
    assert lines[0].startswith("* hello ann; ")
    assert lines[1:] == ["* ann has joined tea", "ann: hello", "* ann is now anna", "anna: again"]


def test_members_and_rooms_are_listed_across_processes(processes) -> None:
    world = processes()
    ann, bob, eve = (
        Client(world[number], nick, room)
        for number, nick, room in ((0, "ann", "tea"), (1, "bob", "tea"), (2, "eve", "den"))
    )
    bob.received()
    ann.received()
    bob.send_and_settle("/who", "/rooms", "/nick rob", "/who")
    assert bob.received() == ["* ann bob", "* den tea", "* bob is now rob", "* ann rob"]
    eve.send_and_settle("/leave", "/who", "/rooms")
    assert eve.received() == ["* eve has left den", "* you are in no room", "* tea"]
    bob.disconnect()
    ann.received()
    ann.send_and_settle("/who")
    assert ann.received() == ["* ann"]
    ann.disconnect()
    eve.send_and_settle("/rooms")
    assert eve.received() == ["* there is no room yet"]


def test_the_members_of_a_killed_process_are_no_longer_listed(processes) -> None:
    world = processes()
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    ann.received()
    world.carriers[1].kill()
    ann.send_and_settle("/who", "/nick bob")
    assert ann.received() == ["* ann", "* ann is now bob"]
    assert bob.received() == []


def test_a_room_name_similar_to_one_in_another_process_is_rejected(processes) -> None:
    world = processes()
    Client(world[0], "ann", "coco")
    bob = Client(world[1], "bob")
    bob.send_and_settle("/join сосо", "/join Coco", "/join coco")
    assert bob.received() == [
        "* сосо looks like coco, which is taken",
        "* Coco looks like coco, which is taken",
        "* bob has joined coco",
    ]


def test_two_members_of_a_process_that_create_a_room_simultaneously_share_it() -> None:
    world = Processes(0.01)
    ann, bob = Client(world[0], "ann"), Client(world[0], "bob")
    ann.send("/join tea", "hello")
    bob.send("/join tea")
    world.settle()
    assert ann.received() == ["* ann has joined tea", "* bob has joined tea", "ann: hello"]
    assert bob.received() == ["* bob has joined tea", "ann: hello"]
    assert len(world[0].rooms) == 1


def test_lines_of_other_processes_are_skipped_with_a_notice_while_the_log_is_full(processes) -> None:
    world = processes(max_unsent=400, max_rate=1000)  # chunks of 100 bytes, and a log of 1,600
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    ann.received()
    world.settle(10)
    topic = world[1].rooms["tea"].topic
    for number in range(1000):
        world.carriers[1].deliver(topic, b"other 1 eve: %04d xxxxxxxxx\r\n" % number)
    bob.send_and_settle("hello")
    world.carriers[1].deliver(topic, b"other 1 eve: the last one\r\n")
    world.settle()
    lines = bob.received()
    assert ann.received() == ["bob: hello"]
    first = next(position for position, line in enumerate(lines) if "skipped" in line)
    assert lines[:first] == [f"eve: {number:04d} xxxxxxxxx" for number in range(first)]
    skipped = [int(line.split()[1]) for line in lines if "skipped" in line]
    assert len(skipped) <= 2
    assert sum(skipped) + len([line for line in lines if "xxx" in line]) == 1000
    assert "bob: hello" in lines
    assert lines[-1] == "eve: the last one"
    assert world[1].metrics()["skipped_total"] == sum(skipped)


def test_the_log_of_a_room_is_bounded_whatever_other_processes_publish(processes) -> None:
    world = processes()
    bob = Client(world[1], "bob", "tea")
    world.settle(10)
    room = world[1].rooms["tea"]
    for _ in range(20):
        for _ in range(100):
            world.carriers[1].deliver(room.topic, b"other 1 eve: " + b"x" * 10_000 + b"\r\n")
        world.carriers[1].gap(room.topic)
        bob.send("x" * 1000)
        for _ in range(5):
            world.clock.turn()
        assert len(room._log) < world[1].limits.log + world[1].limits.chunk + 20_000


def test_the_speakers_of_all_processes_wait_before_lines_are_skipped(processes) -> None:
    world = processes(max_rate=10_000)
    clients = [Client(world[number % 3], f"member-{number}", "tea") for number in range(9)]
    for client in clients:
        client.send(*["x" * 1000] * 40)
    world.settle()
    for client in clients:
        lines = client.received()
        assert [line for line in lines if "skipped" in line] == []
        assert len([line for line in lines if "xxx" in line]) == 9 * 40
    assert [factory.metrics()["skipped_total"] for factory in world.factories] == [0, 0, 0]


def test_a_gap_shows_a_notice_in_its_place(processes) -> None:
    world = processes()
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    bob.received()
    topic = world[1].rooms["tea"].topic
    ann.send_and_settle("before")
    world.carriers[1].gap(topic)
    world.settle()
    world.carriers[1].gap(topic)
    world.settle()
    ann.send_and_settle("after")
    assert bob.received() == ["ann: before", "* lines may be missing", "ann: after"]
    assert "* lines may be missing" not in ann.received()


# --- an engine that fails ---


def test_a_line_that_cannot_be_published_is_answered_with_a_notice(processes) -> None:
    world = processes()
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    ann.received()
    world.engine.disconnect()
    ann.send_and_settle("hello", "/nick anna", "/who", "/rooms", "/join den")
    assert ann.received() == [
        f"* {UNAVAILABLE}: your line was not sent",
        f"* {UNAVAILABLE}: your nickname was not set; try again later",
        *[f"* {UNAVAILABLE}: try again later"] * 2,
        f"* {UNAVAILABLE}: you have not joined den; try again later",
    ]
    world.engine.connect()
    world.settle()
    ann.send_and_settle("again", "/nick anna")
    expected = ["* lines may be missing", "ann: again", "* ann is now anna"]
    assert ann.received() == bob.received() == expected
    assert world[0].metrics()["messages_total"] == 1


def test_a_nickname_can_be_chosen_after_the_engine_is_connected(processes) -> None:
    world = processes()
    world.engine.disconnect()
    ann = Client(world[0])
    ann.send_and_settle("ann")
    assert ann.received() == [f"* {UNAVAILABLE}: your nickname was not set; try again later"]
    world.engine.connect()
    ann.send_and_settle("ann")
    assert ann.received()[0].startswith("* hello ann; ")


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.015, 0.025, 0.035, 0.045, 0.055, 0.065])
def test_a_join_that_is_interrupted_is_answered_in_time(seconds) -> None:
    world = Processes(0.01)
    ann = Client(world[0], "ann")
    ann.send("/join tea")
    world.settle(seconds)
    world.engine.disconnect()
    world.settle(3 * ANSWER_SECONDS)
    lines = ann.received()
    assert lines in (
        [f"* {UNAVAILABLE}: you have not joined tea; try again later"],
        ["* you have joined tea; lines may be missing"],
        ["* ann has joined tea"],
    )
    if "not joined" in lines[0]:
        assert world[0].rooms == {}
    world.engine.connect()
    world.settle()
    ann.received()
    ann.send_and_settle("/leave", "/join tea", "hello")
    assert ann.received()[-2:] == ["* ann has joined tea", "ann: hello"]
    ann.disconnect()
    assert world[0].rooms == {}
    assert world.engine.claimed == {}
    assert len(world.engine.presence) == 0
    assert world.clock.calls == []


def test_lines_that_never_come_back_do_not_block_the_room() -> None:
    world = Processes(0.01)
    ann = Client(world[0], "ann", "tea")
    room = world[0].rooms["tea"]
    world.carriers[0].unsubscribe(room.topic)  # the engine accepts lines, and delivers none
    ann.send(*["x" * 1000] * 30, "/who")
    world.settle(RETURN_SECONDS / 2)
    assert room.full
    world.settle(20 * RETURN_SECONDS)
    assert ann.received() == ["* ann"]
    assert not room.full


@pytest.mark.parametrize("latency", [1.0, 2.4, 2.6, 4.0, 6.0, 11.0])
def test_each_command_is_answered_whatever_the_latency_of_the_engine(latency) -> None:
    world = Processes(0.01)
    ann = Client(world[0], "ann", "tea")
    world.engine.latency = latency
    commands = ["hello", "/who", "/help", "/nick anna", "/rooms", "/join den", "/who", "/leave", "/join tea", "/help"]
    for command in commands:
        ann.send(command)
        world.settle(30)
        assert ann.received() != []
        assert not ann.closing
    ann.send(*commands * 5)
    world.settle()
    assert not ann.closing
    assert len(ann.received()) >= 5 * len(commands)
    world.engine.latency = 0.01
    ann.disconnect()
    world.settle()
    assert world[0].rooms == {}
    assert world.engine.claimed == {}
    assert len(world.engine.presence) == 0
    assert world.clock.calls == []


def test_a_member_leaves_while_the_engine_is_disconnected(processes) -> None:
    world = processes()
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    ann.received()
    world.engine.disconnect()
    ann.send_and_settle("/leave")
    assert ann.received() == ["* you have left tea"]
    bob.disconnect()
    assert world[0].rooms == world[1].rooms == {}
    world.engine.connect()
    ann.send_and_settle("/join tea", "/who")
    assert ann.received() == ["* ann has joined tea", "* ann"]


def test_a_lost_nickname_is_claimed_again(processes) -> None:
    world = processes()
    ann = Client(world[0], "ann", "tea")
    world.carriers[0].lose_claims()
    world.settle()
    assert ann.received() == []
    assert world.engine.claimed.keys() == {"chat/nick/ann"}
    ann.send_and_settle("hello")
    assert ann.received() == ["ann: hello"]


def test_a_member_whose_lost_nickname_is_taken_chooses_another_one(processes) -> None:
    world = processes()
    ann, other = Client(world[0], "ann", "tea"), Client(world[1])
    engine = world.engine
    engine.disconnect()
    world.carriers[0].lose_claims()
    world.settle()
    assert ann.received() == [f"* {UNAVAILABLE}: your nickname is not confirmed"]
    engine.connect()
    other.send_and_settle("ann", "/join tea")
    ann.received()
    ann.send_and_settle("is it me?", "/join den", "/who")
    taken = "* another member has the nickname ann now: choose another one with /nick NAME"
    assert ann.received() == [taken, taken, "* ann"]
    ann.send_and_settle("/nick anna", "it is me")
    assert ann.received() == ["* ann is now anna", "anna: it is me"]
    assert world.engine.presence.members("chat/room/tea").total == 2


def test_members_are_closed_when_the_service_stops_and_others_see_it(processes) -> None:
    world = processes()
    ann, bob = Client(world[0], "ann", "tea"), Client(world[1], "bob", "tea")
    bob.received()
    ann.protocol.drain()
    world.settle()
    assert ann.received()[-1] == "* the chat shuts down"
    ann.disconnect()
    assert bob.received() == ["* ann has left tea"]


# --- hostile clients ---


@pytest.mark.parametrize("latency", [0.0, 0.5])
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
@pytest.mark.parametrize(
    "lines",
    [
        ["/nick flip", "/nick flop"],
        ["/join den", "/leave"],
        ["/join one", "/join two"],
        ["x" * 40],
        ["/who", "/rooms"],
    ],
    ids=" ".join,
)
def test_a_pipeline_of_commands_costs_bounded_memory_and_does_not_delay_others(latency, up, lines) -> None:
    world = Processes(latency)
    flooder, ann = Client(world[0], "flooder", "tea"), Client(world[0], "ann", "den")
    if not up:
        world.engine.disconnect()
    most = 0
    for _ in range(100):
        if flooder.transport.producerState == "producing":
            flooder.send(*lines * 500)
        assert len(flooder.protocol._input) <= INPUT_LIMIT + 21_000
        world.clock.now += 0.01
        world.clock.turn()
        most = max(most, len(world.engine.pending))
        assert len(world.clock.calls) < 20
    assert flooder.transport.producerState == "paused"
    assert most <= 1
    ann.received()
    ann.send("hello")
    world.settle(4 * latency + 1)
    expected = "ann: hello" if up else f"* {UNAVAILABLE}: your line was not sent"
    assert expected in ann.received()
    flooder.disconnect()
    ann.disconnect()
    world.engine.connect()
    world.settle()
    assert world[0].rooms == {}
    assert world.engine.claimed == {}
    assert len(world.engine.presence) == 0
    assert world.clock.calls == []


def test_many_answers_at_once_are_handled_in_several_turns() -> None:
    world = Processes(1.0, max_members=2000)
    clients = [Client(world[0]) for _ in range(1000)]
    for number, client in enumerate(clients):
        client.send(f"member-{number}")
    handled = []
    for _ in range(200):
        world.clock.now += 0.1
        for _ in range(5):
            world.clock.turn()
            handled.append(sum(client.transport.value().endswith(b"room\r\n") for client in clients))
    assert handled[-1] == 1000
    assert max(after - before for before, after in itertools.pairwise(handled)) <= 128
