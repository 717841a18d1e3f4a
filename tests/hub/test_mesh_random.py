"""Workers that join, stop and die at random points lose no message without a gap, and get none twice."""

from collections import defaultdict
from functools import partial
from typing import Any

import pytest

from rtservice.hub import link as link_module
from rtservice.hub.outbox import Outbox
from rtservice.interfaces import HubFull, HubUnavailable
from tests.support.mesh_world import MeshWorker, MeshWorld

TOPICS = ("red", "green")


class Publishers:
    """The messages that were accepted: the last sequence number by worker and topic."""

    def __init__(self) -> None:
        self.last: dict[tuple[int, str], int] = defaultdict(int)
        self.accepted: dict[tuple[int, str], int] = defaultdict(int)

    def publish(self, worker: MeshWorker, topic: str, size: int) -> None:
        key = worker.name, topic
        self.last[key] += 1
        number = self.last[key]

        def accepted(result: Any) -> None:
            self.accepted[key] = number

        message = b"%d %d %b" % (worker.name, number, bytes(size))
        worker.hub.publish(topic, message).addCallbacks(accepted, lambda failure: failure.trap(HubUnavailable, HubFull))


class Receiver:
    """Checks each message that it receives."""

    def __init__(self, publishers: Publishers, worker: MeshWorker, topic: str) -> None:
        self.publishers = publishers
        self.topic = topic
        self.expected: dict[int, int] = {}  # the next number by publisher, once active
        self.seen: dict[int, int] = defaultdict(int)
        self.gapped: set[int] | None = None  # publishers since whose last message there was a gap; None is all
        self.active = False
        self.had_gap: dict[int, bool] = defaultdict(bool)
        worker.hub.subscribe(topic, self).addCallbacks(self.subscribed, lambda failure: failure.trap(HubUnavailable))

    def subscribed(self, subscription: Any) -> None:
        self.active = True
        for (name, topic), number in self.publishers.accepted.items():
            if topic == self.topic:
                self.expected[name] = number + 1

    def received(self, topic: str, message: bytes) -> None:
        assert topic == self.topic
        name, number = map(int, message.split()[:2])
        assert number > self.seen[name], "twice or out of order"
        expected = max(self.expected.get(name, 1), self.seen[name] + 1)
        if self.active and number > expected:
            assert self.had_gap[name], f"{number} instead of {expected} of {name}"
        self.seen[name] = number
        self.had_gap[name] = False

    def gap(self, topic: str) -> None:
        assert topic == self.topic
        for name, _ in list(self.publishers.last):
            self.had_gap[name] = True

    def check_end(self) -> None:
        assert self.active
        for (name, topic), number in self.publishers.accepted.items():
            if topic == self.topic and number >= self.expected.get(name, 1) and not self.had_gap[name]:
                assert self.seen[name] == number, f"lost the end of {name}"


@pytest.mark.parametrize("seed", range(60))
def test_no_message_is_lost_without_a_gap_or_received_twice(seed, monkeypatch) -> None:
    if seed % 3 == 0:  # messages are dropped
        monkeypatch.setattr(link_module, "Outbox", partial(Outbox, 3000))
    if seed % 4 == 0:
        monkeypatch.setattr(link_module, "_READ", 100)  # frames in pieces
    world = MeshWorld(seed)
    publishers = Publishers()
    receivers: list[tuple[MeshWorker, Receiver]] = []
    members: dict[int, list[Any]] = defaultdict(list)
    for _ in range(3):
        world.spawn()
    choose = world.random
    for _ in range(1500):
        worker = choose.choice(world.workers)
        action = choose.random()
        if action < 0.15:
            publishers.publish(worker, choose.choice(TOPICS), choose.choice((0, 10, 900)))
        elif action < 0.17:
            receivers.append((worker, Receiver(publishers, worker, choose.choice(TOPICS))))
        elif action < 0.19:
            worker.hub.join("room", b"%d" % worker.name).addCallbacks(
                members[worker.name].append, lambda failure: failure.trap(HubUnavailable)
            )
        elif action < 0.20 and members[worker.name]:
            members[worker.name].pop().leave()
        elif action < 0.205 and len(world.workers) < 5:
            world.spawn()
        elif action < 0.21 and len(world.workers) > 1:
            (world.kill if choose.random() < 0.5 else world.stop)(worker)
        elif action < 0.9:
            world.step()
        else:
            world.reactor.turn()
    monkeypatch.undo()
    world.settle()
    alive = list(world.workers)
    for worker in alive:
        assert worker.carrier.up
        assert not worker.failures
        assert not worker.reports
        found = world_members(world, worker)
        expected = sorted(b"%d" % other.name for other in alive for _ in members[other.name])
        assert sorted(found.members) == expected
        assert found.total == len(expected)
    for worker, receiver in receivers:
        if worker in alive:
            receiver.check_end()
    world.close()


def world_members(world: MeshWorld, worker: MeshWorker) -> Any:
    found: list[Any] = []
    worker.hub.members("room").addCallback(found.append)
    [members] = found
    return members
