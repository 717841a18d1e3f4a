"""Which commands subscriptions of topics need, and when topics are active, without a Redis."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from rtservice.hub.redis_subscriptions import CHANNELS, Subscriptions


class FakeConnection:
    """Keeps commands until `confirm`."""

    def __init__(self) -> None:
        self.commands: list[tuple[bytes, list[bytes]]] = []
        self.unconfirmed: deque[Callable[[], object]] = deque()
        self.subscribed: set[bytes] = set()

    def change(self, command: bytes, channels: list[bytes], confirmed: Callable[[bytes], None], failed: Any) -> None:
        self.commands.append((command, channels))
        for channel in channels:
            self.unconfirmed.append(lambda channel=channel: self.execute(command, channel, confirmed))

    def execute(self, command: bytes, channel: bytes, confirmed: Callable[[bytes], None]) -> None:
        (self.subscribed.add if command == b"SUBSCRIBE" else self.subscribed.discard)(channel)
        confirmed(channel)

    def request(self, *command: bytes) -> Deferred[None]:
        deferred: Deferred[None] = Deferred()
        self.unconfirmed.append(lambda: deferred.callback(None))
        return deferred

    def confirm(self, most: int = 1 << 30) -> None:
        while self.unconfirmed and most:
            self.unconfirmed.popleft()()
            most -= 1


class World:
    """Subscriptions on a connection that is up."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.gaps: list[str] = []
        self.subscriptions = Subscriptions("p")
        self.subscriptions.start(self.clock, self)
        self.connect()

    def gap(self, topic: str) -> None:
        self.gaps.append(topic)

    def connect(self) -> None:
        self.connection = FakeConnection()
        Deferred.fromCoroutine(self.subscriptions.restore(self.connection))
        self.connection.confirm()
        self.subscriptions.open()

    def turn(self) -> list[tuple[bytes, list[bytes]]]:
        """Run a turn of the reactor, and return the commands of it."""
        self.connection.commands.clear()
        self.clock.advance(0)
        return self.connection.commands


@pytest.fixture
def world() -> World:
    return World()


def test_the_topics_of_a_turn_are_one_command(world: World) -> None:
    active = [world.subscriptions.subscribe(topic) for topic in "abc"]
    assert world.turn() == [(b"SUBSCRIBE", [b"p:t:a", b"p:t:b", b"p:t:c"])]
    world.connection.confirm(2)
    assert [deferred.called for deferred in active] == [True, True, False]
    assert world.subscriptions.active == {b"p:t:a": "a", b"p:t:b": "b"}


def test_a_topic_that_is_not_wanted_at_the_end_of_the_turn_needs_no_command(world: World) -> None:
    world.subscriptions.subscribe("a")
    world.subscriptions.unsubscribe("a")
    assert world.turn() == []


def test_an_active_topic_that_is_wanted_again_in_the_same_turn_is_active_at_once(world: World) -> None:
    world.subscriptions.subscribe("a")
    world.turn()
    world.connection.confirm()
    world.subscriptions.unsubscribe("a")
    assert world.subscriptions.active == {}
    assert world.subscriptions.subscribe("a").called
    assert world.subscriptions.active == {b"p:t:a": "a"}
    assert world.turn() == []
    assert not world.gaps


def test_an_earlier_confirmation_does_not_activate_a_later_subscription(world: World) -> None:
    world.subscriptions.subscribe("a")
    world.turn()
    world.subscriptions.unsubscribe("a")
    world.turn()
    active = world.subscriptions.subscribe("a")
    world.turn()
    for fired in (False, False, True):
        world.connection.confirm(1)
        assert active.called is fired
        assert bool(world.subscriptions.active) is fired


def test_a_new_connection_subscribes_in_batches_and_reports_gaps_of_topics_that_were_active(world: World) -> None:
    topics = [f"t{number}" for number in range(2 * CHANNELS + 1)]
    for topic in topics:
        world.subscriptions.subscribe(topic)
    world.turn()
    world.connection.confirm()
    world.subscriptions.end()
    waits = world.subscriptions.subscribe("new")
    world.subscriptions.unsubscribe("t7")
    world.connection = FakeConnection()
    restored = Deferred.fromCoroutine(world.subscriptions.restore(world.connection))
    assert [len(channels) for _, channels in world.connection.commands] == [CHANNELS]
    world.connection.confirm()
    assert restored.called
    assert [len(channels) for _, channels in world.connection.commands] == [CHANNELS, CHANNELS, 1]
    assert world.gaps == [topic for topic in topics if topic != "t7"]
    assert not waits.called
    world.subscriptions.open()
    assert waits.called


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_ends_as_wanted(world: World, seed: int) -> None:
    rng = random.Random(seed)
    wanted: dict[str, Deferred[None]] = {}
    for _ in range(400):
        action, topic = rng.randrange(8), rng.choice("abcd")
        if action < 3 and topic not in wanted:
            wanted[topic] = world.subscriptions.subscribe(topic)
        elif action < 5 and topic in wanted:
            del wanted[topic]
            world.subscriptions.unsubscribe(topic)
        elif action == 5:
            world.turn()
        elif action == 6:
            world.connection.confirm(rng.randrange(4))
        elif rng.random() < 0.2:
            world.subscriptions.end()
            if rng.random() < 0.5:
                world.clock.advance(0)
            world.connect()
        # What is active must be subscribed, and what has fired must be active.
        assert set(world.subscriptions.active) <= world.connection.subscribed
        fired = {b"p:t:" + topic.encode() for topic, deferred in wanted.items() if deferred.called}
        assert fired == set(world.subscriptions.active)
    for _ in range(4):
        world.turn()
        world.connection.confirm()
    assert {world.subscriptions.name(topic) for topic in wanted} == world.connection.subscribed
    assert set(world.subscriptions.active) == world.connection.subscribed
    assert set(world.subscriptions._channels) == set(wanted)
