"""A key has one holder, whatever dies: simulated processes, with links that deliver in any order."""

import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from rtservice.hub.claims import Claims
from rtservice.hub.frames import Frame, FrameKind

KEYS = ("ann", "bob", "eve")


class Process:
    """A process with its Claims. `link` is called with each other process when the socket has arrived."""

    def __init__(self, world: "World", incarnation: int, others: set[int]) -> None:
        self.world = world
        self.incarnation = incarnation
        self.claims = Claims(incarnation, send=self.send, answer=self.answered)
        self.sockets = deque(sorted(others))  # under way
        self.linked: set[int] = set()
        self.exchanging = set(others)  # until `begin`
        self.halves = dict.fromkeys(others, 2)  # of an exchange
        self.requests: dict[int, str] = {}
        self.held: dict[int, str] = {}
        if not others:
            self.claims.begin()

    def send(self, peer: int, kind: FrameKind, number: int = 0, key: str = "") -> None:
        assert peer in self.linked
        queue = self.world.queues.get((self.incarnation, peer))
        if queue is not None:
            queue.append(Frame(kind, number, key, b""))

    def answered(self, number: int, granted: bool) -> None:
        key = self.requests.pop(number)
        if granted:
            self.held[number] = key
        self.world.check()

    def take_socket(self) -> None:
        peer = self.sockets.popleft()
        self.linked.add(peer)
        self.claims.add_peer(peer)
        self.send(peer, FrameKind.SNAPSHOT)

    def received(self, peer: int, frame: Frame) -> None:
        if frame.kind is FrameKind.SNAPSHOT:
            self.send(peer, FrameKind.SNAPSHOT_READ)
            self.exchange(peer)
        elif frame.kind is FrameKind.SNAPSHOT_READ:
            self.exchange(peer)
        else:
            self.claims.received(peer, frame)

    def exchange(self, peer: int) -> None:
        if peer in self.halves:
            self.halves[peer] -= 1
            if not self.halves[peer]:
                self.exchanged(peer)

    def exchanged(self, peer: int) -> None:
        if peer in self.exchanging:
            self.exchanging.discard(peer)
            if not self.exchanging:
                self.claims.begin()

    def ended(self, peer: int) -> None:
        self.linked.discard(peer)
        self.claims.remove_peer(peer)
        self.exchanged(peer)

    def request(self) -> None:
        number = self.world.next_number()
        self.requests[number] = self.world.random.choice(KEYS)
        self.claims.request(number, self.requests[number])

    def release(self) -> None:
        number = self.world.random.choice([*self.held, *self.requests])
        del (self.held if number in self.held else self.requests)[number]
        self.claims.release(number)


class World:
    """Processes and the queues between them. A queue ends with None, the end of its process."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.incarnation = self.number = 0
        self.processes: dict[int, Process] = {}
        self.queues: dict[tuple[int, int], deque[Frame | None]] = {}
        self.speeds: dict[tuple[int, int], float] = {}

    def next_number(self) -> int:
        self.number += 1
        return self.number

    def join(self) -> None:
        self.incarnation += 1
        joined = self.incarnation
        for other, process in self.processes.items():
            for ends in ((other, joined), (joined, other)):
                self.queues[ends] = deque()
                self.speeds[ends] = 1.0
            process.sockets.append(joined)
        self.processes[joined] = Process(self, joined, set(self.processes))

    def kill(self, incarnation: int) -> None:
        """End a process; for each other one, a random part of its last frames is not sent."""
        del self.processes[incarnation]
        for other in self.processes:
            self.queues.pop((other, incarnation), None)
            queue = self.queues.get((incarnation, other))
            if queue is not None:
                for _ in range(self.random.randint(0, len(queue)) if self.random.random() < 0.5 else 0):
                    queue.pop()
                queue.append(None)

    def stop(self, incarnation: int) -> None:
        """End a process after its frames are sent: its last one, BYE, is the end of the link."""
        del self.processes[incarnation]
        for other in self.processes:
            self.queues.pop((other, incarnation), None)
            if (incarnation, other) in self.queues:
                self.queues[incarnation, other].append(None)

    def deliverable(self) -> list[tuple[int, int]]:
        return [
            ends
            for ends, queue in self.queues.items()
            if queue and ends[1] in self.processes and ends[0] in self.processes[ends[1]].linked
        ]

    def deliver(self, ends: tuple[int, int]) -> None:
        sender, receiver = ends
        frame = self.queues[ends].popleft()
        if frame is None:
            del self.queues[ends]
            self.processes[receiver].ended(sender)
        else:
            self.processes[receiver].received(sender, frame)

    def step(self, weights: dict[str, int]) -> None:
        processes = list(self.processes.values())
        if self.queues and self.random.random() < 0.3:
            self.speeds[self.random.choice(list(self.queues))] = self.random.choice((1.0, 0.001))
        action = self.random.choices(list(weights), list(weights.values()))[0]
        if action == "deliver":
            ready = self.deliverable()
            if ready:
                self.deliver(self.random.choices(ready, [self.speeds[ends] for ends in ready])[0])
        elif action == "socket":
            waiting = [process for process in processes if process.sockets]
            if waiting:
                self.random.choice(waiting).take_socket()
        elif action == "join" and len(processes) < 6:
            self.join()
        elif action in ("kill", "stop") and len(processes) > 1:
            lowest = self.random.random() < 0.6
            getattr(self, action)(min(self.processes) if lowest else self.random.choice(list(self.processes)))
        elif action == "request":
            self.random.choice(processes).request()
        elif action == "release":
            users = [process for process in processes if process.held or process.requests]
            if users:
                self.random.choice(users).release()
        self.check()

    def settle(self) -> None:
        """Deliver everything."""
        while True:
            waiting = [process for process in self.processes.values() if process.sockets]
            ready = self.deliverable()
            if waiting:
                self.random.choice(waiting).take_socket()
            elif ready:
                self.deliver(self.random.choice(ready))
            else:
                return

    def holders(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for process in self.processes.values():
            for number, key in process.held.items():
                yield key, (process.incarnation, number)

    def check(self) -> None:
        keys = [key for key, _ in self.holders()]
        assert len(keys) == len(set(keys))


@pytest.mark.parametrize("seed", range(300))
def test_no_key_has_two_holders_and_no_request_hangs(seed) -> None:
    world = World(seed)
    weights: dict[str, Any] = {"deliver": 60, "socket": 12, "join": 2, "kill": 1, "stop": 1, "request": 8, "release": 8}
    if seed % 4 == 0:  # slow links
        weights["deliver"] = 20
    if seed % 4 == 1:  # slow sockets
        weights["socket"] = 3
    for _ in range(3):
        world.join()
    for _ in range(600):
        world.step(weights)
    world.settle()
    world.check()
    assert not any(process.requests for process in world.processes.values())
    # The arbiter knows exactly the claims that are held: those of dead processes are free.
    arbiter = world.processes[min(world.processes)].claims
    assert arbiter.leading
    assert dict(world.holders()) == arbiter._claimed
    assert [process.claims.leading for process in world.processes.values()].count(True) == 1


def joined(count: int) -> World:
    world = World(0)
    for _ in range(count):
        world.join()
        world.settle()
    return world


def claim(world: World, incarnation: int, key: str) -> int:
    number = world.next_number()
    process = world.processes[incarnation]
    process.requests[number] = key
    process.claims.request(number, key)
    return number


def test_a_claim_is_answered_at_once_in_a_process_alone() -> None:
    world = joined(1)
    first, second = claim(world, 1, "ann"), claim(world, 1, "ann")
    process = world.processes[1]
    assert process.held == {first: "ann"}
    assert second not in process.requests


def test_a_key_of_another_process_is_denied_until_it_is_released() -> None:
    world = joined(3)
    held = claim(world, 2, "ann")
    world.settle()
    claim(world, 3, "ann")
    world.settle()
    assert dict(world.holders()) == {"ann": (2, held)}
    world.processes[2].release()
    world.settle()
    granted = claim(world, 3, "ann")
    world.settle()
    assert dict(world.holders()) == {"ann": (3, granted)}


def test_the_claims_of_a_dead_process_are_free_at_once() -> None:
    world = joined(3)
    claim(world, 3, "ann")
    world.settle()
    world.kill(3)
    world.settle()
    granted = claim(world, 2, "ann")
    world.settle()
    assert dict(world.holders()) == {"ann": (2, granted)}


def test_claims_survive_the_death_of_the_process_that_decides() -> None:
    world = joined(3)
    held = claim(world, 3, "ann")
    world.settle()
    world.kill(1)
    claim(world, 2, "ann")
    world.settle()
    assert dict(world.holders()) == {"ann": (3, held)}


def test_a_grant_that_is_not_received_yet_counts_after_the_death_of_the_process_that_decides() -> None:
    world = joined(3)
    held = claim(world, 3, "ann")
    world.deliver((3, 1))  # granted
    world.stop(1)
    world.deliver((1, 2))
    claim(world, 2, "ann")
    assert (1, 3) in world.deliverable()
    while world.queues[2, 3]:
        world.deliver((2, 3))  # LEAD, before the grant
    assert not world.queues[3, 2]
    world.settle()
    assert dict(world.holders()) == {"ann": (3, held)}


def test_a_withdrawn_request_leaves_the_key_free() -> None:
    world = joined(2)
    claim(world, 2, "ann")
    world.processes[2].release()
    granted = claim(world, 1, "bob")
    world.settle()
    again = claim(world, 1, "ann")
    assert dict(world.holders()) == {"bob": (1, granted), "ann": (1, again)}


def test_a_request_waits_until_a_process_that_joins_is_linked() -> None:
    world = joined(1)
    world.join()
    number = claim(world, 2, "ann")
    assert world.processes[2].requests == {number: "ann"}
    world.settle()
    assert dict(world.holders()) == {"ann": (2, number)}
