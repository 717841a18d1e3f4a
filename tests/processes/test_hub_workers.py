"""The hub between worker processes: messages, members and claims, while workers are replaced, killed and stopped."""

import contextlib
import os
import random
import signal
import threading
from typing import Any

import pytest

from tests.support.deadline import DEADLINE
from tests.support.guests import GuestClient, guests_of
from tests.support.listen_options import TCP
from tests.support.processes import freeze

ROOMS = "--protocol=tests.hosted.rooms:Rooms"


@pytest.fixture
def hub_workers(workers) -> Any:
    """Start workers that serve Rooms."""

    def start(count: int = 2, *arguments: str) -> Any:
        return workers(f"--workers={count}", ROOMS, TCP, *arguments, PYTHONPATH=os.getcwd())

    return start


def close_all(guests: Any) -> None:
    for guest in guests:
        guest.close()
        assert guest.problems == []


def test_each_worker_gets_the_messages_members_and_claims_of_all(hub_workers) -> None:
    running = hub_workers(3)
    guests = list(guests_of(running.service.port, running.settled(3)).values())
    names = {guest.name for guest in guests}
    for guest in guests:
        assert guest.who() == names
        for other in guests:
            other.expect(guest)
        for _ in range(100):
            guest.say()
    for guest in guests:
        for other in guests:
            other.wait_for(guest, 100)
    answers = [guest.ask("claim nick", "granted", "denied") for guest in guests]
    assert sorted(answers) == ["denied", "denied", "granted"]
    assert [guest.gaps for guest in guests] == [0, 0, 0]
    close_all(guests)
    assert running.stop() == 0


def test_a_killed_worker_loses_its_members_and_claims_at_once(hub_workers, wait_for) -> None:
    running = hub_workers(3)
    pids = running.settled(3)
    guests = guests_of(running.service.port, pids)
    # The worker that joined first decides about claims: it dies first, and the holder of a claim after it.
    first, second, third = (guests[pid] for pid in pids)
    assert second.ask("claim nick", "granted", "denied") == "granted"
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: third.who() == {second.name, third.name} and second.who() == {second.name, third.name})
    assert third.ask("claim nick", "granted", "denied") == "denied"
    os.kill(second.pid, signal.SIGKILL)
    wait_for(lambda: third.who() == {third.name})
    assert third.ask("claim nick", "granted", "denied") == "granted"
    wait_for(lambda: third.gaps >= 1)
    close_all(guests.values())


def test_a_reload_causes_no_gap(hub_workers, wait_for) -> None:
    running = hub_workers(2, "--drain-timeout=2")
    port = running.service.port
    old = list(guests_of(port, running.settled(2)).values())
    running.send(signal.SIGHUP)
    running.wait_event("worker.ready", 4)
    new = list(guests_of(port, [running.of_slot(0), running.of_slot(1)]).values())
    for guest in new:
        for other in (*old, *new):
            guest.expect(other)
    for _ in range(20):
        for guest in (*old, *new):
            with contextlib.suppress(OSError):  # its worker may have drained
                guest.say()
    running.wait_event("worker.ended", 2, exit_status=0)
    for guest in new:
        for other in old:
            other.lost.wait(DEADLINE)
            guest.wait_for(other, other.accepted)
        for other in new:
            guest.wait_for(other, 20)
        # The end of a worker reaches the log and the other workers in any order.
        wait_for(lambda guest=guest: guest.who() == {other.name for other in new})
    assert [guest.gaps for guest in (*old, *new)] == [0, 0, 0, 0]
    close_all((*old, *new))
    assert running.stop() == 0


def test_an_added_and_a_removed_worker_cause_no_gap(hub_workers, wait_for) -> None:
    running = hub_workers(2, "--drain-timeout=1")
    port = running.service.port
    stayed = list(guests_of(port, running.settled(2)).values())
    running.send(signal.SIGTTIN)
    running.wait_event("worker.ready", slot=2)
    added = guests_of(port, [running.of_slot(2)])[running.of_slot(2)]
    for guest in stayed:
        guest.expect(added)
        added.expect(guest)
    for guest in (*stayed, added):
        for _ in range(50):
            guest.say()
    for guest in stayed:
        guest.wait_for(added, 50)
        added.wait_for(guest, 50)
    running.send(signal.SIGTTOU)
    running.wait_event("slot.removed", slot=2)
    wait_for(lambda: all(guest.who() == {guest.name for guest in stayed} for guest in stayed))
    assert [guest.gaps for guest in (*stayed, added)] == [0, 0, 0]
    close_all((*stayed, added))
    assert running.stop() == 0


def test_a_stopped_worker_gets_a_gap_for_messages_that_it_cannot_read(hub_workers, wait_for) -> None:
    running = hub_workers(2, "--hang-timeout=0")
    speaker, stopped = guests_of(running.service.port, running.settled(2)).values()
    stopped.expect(speaker)
    freeze(stopped.pid, wait_for)
    # 6 MB: more than the mesh keeps for a worker.
    speaker.expect(speaker)
    for number in range(1, 101):
        speaker.say(60_000)
        speaker.wait_for(speaker, number)
    assert speaker.ask("enter other", "entered") == "entered"  # a subscription does not wait for the stopped worker
    running.wait_event("hub.link_full")
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.wait_for(speaker, 100)
    wait_for(lambda: stopped.gaps > 0)
    assert 0 < stopped.seen[speaker.name] < 100
    last = speaker.said + 1
    speaker.say()
    wait_for(lambda: stopped.seen[speaker.name] == last)
    close_all((speaker, stopped))
    assert running.stop() == 0


def test_a_worker_killed_because_it_hangs_causes_a_gap(hub_workers, wait_for) -> None:
    running = hub_workers(2, "--hang-timeout=2")
    first, hung = guests_of(running.service.port, running.settled(2)).values()
    freeze(hung.pid, wait_for)
    running.wait_event("worker.killed", pid=hung.pid)
    wait_for(lambda: first.gaps > 0)
    assert first.who() == {first.name}
    close_all((first, hung))


class Talker:
    """A client that publishes until its worker dies, and then connects again."""

    def __init__(self, room: "Chaos") -> None:
        self.room = room
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while not self.room.over.is_set():
            try:
                guest = GuestClient(self.room.port)
            except OSError:  # of a worker that has died
                self.room.over.wait(0.01)
                continue
            self.room.add(guest)
            with contextlib.suppress(OSError):
                while not self.room.over.is_set() and not guest.lost.is_set():
                    guest.say()
                    guest.lost.wait(0.02)


class Chaos:
    """Talkers, and all clients that they were."""

    def __init__(self, port: int, count: int) -> None:
        self.port = port
        self.over = threading.Event()
        self.guests: list[GuestClient] = []
        self._lock = threading.Lock()
        self.talkers = [Talker(self) for _ in range(count)]

    def add(self, guest: GuestClient) -> None:
        """Add a client that is ready and has not published: the others expect all its messages."""
        with self._lock:
            for other in self.guests:
                other.expect(guest)
            guest.expect(guest)
            self.guests.append(guest)

    def accepted(self) -> int:
        """Return the number of messages that workers have accepted."""
        return sum(guest.accepted for guest in list(self.guests))

    def stop(self) -> None:
        """Stop publishing. After this, `guests` does not change."""
        self.over.set()
        for talker in self.talkers:
            talker.thread.join(DEADLINE)
            assert not talker.thread.is_alive()


def test_workers_killed_under_load_lose_no_message_without_a_gap(hub_workers, wait_for) -> None:
    running = hub_workers(4)
    survivor = running.settled(4)[0]
    chaos = Chaos(running.service.port, 12)
    chooser = random.Random(1)
    wait_for(lambda: len(chaos.guests) == 12)
    killed: set[int] = set()
    while len(killed) < 15:
        goal = chaos.accepted() + 100
        wait_for(lambda goal=goal: chaos.accepted() >= goal)
        # With many deaths in a row, the supervisor waits before it spawns the next worker.
        victims = wait_for(lambda: [pid for pid in running.ready() if pid not in (survivor, *killed)])
        killed.add(victim := chooser.choice(victims))
        os.kill(victim, signal.SIGKILL)
    chaos.stop()
    wait_for(lambda: all(guest.lost.is_set() for guest in chaos.guests if guest.pid in killed))
    alive = [guest for guest in chaos.guests if guest.pid not in killed]
    assert any(guest.pid == survivor for guest in alive)
    for guest in alive:
        for other in chaos.guests:
            if other.name in guest.seen:
                guest.wait_for(other, other.accepted)
    names = {guest.name for guest in alive}
    wait_for(lambda: all(guest.who() == names for guest in alive))
    for guest in chaos.guests:
        assert guest.problems == []
    assert any(guest.gaps for guest in alive)
    close_all(chaos.guests)
