"""SIGTTIN and SIGTTOU change the number of workers."""

import signal
from typing import Any

from rtservice.net.description import ListenError
from rtservice.pool.control import FIRST_SOCKET
from tests.support.fake_listener import Slots
from tests.support.pool_world import roll


def test_added_slot_gets_a_socket_and_all_workers_receive_their_share(world) -> None:
    running = world()
    first, second = running.serve()
    running.send(signal.SIGTTIN)
    third = running.processes[2]
    assert running.listener.done == ["add"]
    assert third.descriptors[FIRST_SOCKET] == 102
    assert third.told[0] == ("start", {"slot": 2, "slots": 3, "generation": 1})
    assert first.told[1:] == second.told[1:] == [("share", 3)]
    third.says("ready")
    assert running.pool.status.startswith("serving: 3 of 3 workers ready")


def test_several_slots_are_added_in_sequence(world) -> None:
    running = world()
    running.serve()
    for _ in range(3):
        running.send(signal.SIGTTIN)
    assert [process.descriptors[FIRST_SOCKET] for process in running.processes] == [100, 101, 102, 103, 104]
    roll(running)
    assert running.pool.status.startswith("serving: 5 of 5 workers ready")


def test_slot_requested_during_the_start_is_added_when_all_workers_are_ready(world) -> None:
    running = world()
    running.service.startService()
    running.send(signal.SIGTTIN)
    assert len(running.processes) == 2
    roll(running)
    assert running.pool.status.startswith("serving: 3 of 3 workers ready")


def test_slot_is_not_added_if_one_of_its_sockets_cannot_be_opened(world) -> None:
    running = world()
    another: Any = Slots(2)
    another.problem = ListenError("cannot listen on 127.0.0.1:1: permission denied")
    running.pool.listeners.append(another)
    running.serve()
    running.send(signal.SIGTTIN)
    assert running.listener.done == ["add", "drop"]
    assert len(running.processes) == 2
    assert running.recorded("slot.not_added", problem="cannot listen on 127.0.0.1:1: permission denied")
    another.problem = None
    running.send(signal.SIGTTIN)
    roll(running)
    assert running.pool.status.startswith("serving: 3 of 3")


def test_removed_slot_serves_its_backlog_before_its_socket_is_closed(world) -> None:
    running = world(3)
    first, second, third = running.serve()
    running.send(signal.SIGTTOU)
    assert running.listener.done == ["leave out"]
    assert third.told[1:] == [("drain", ["slot"])]
    assert first.words() == ["start"]
    running.pass_time(5)
    assert running.listener.done == ["leave out"]
    third.dies()
    assert running.listener.done == ["leave out", "drop"]
    assert first.told[1:] == second.told[1:] == [("share", 2)]
    assert len(running.processes) == 3
    assert running.pool.status.startswith("serving: 2 of 2")


def test_several_slots_are_removed_in_sequence_except_the_last_one(world) -> None:
    running = world(3)
    running.serve()
    for _ in range(5):
        running.send(signal.SIGTTOU)
    roll(running)
    assert running.listener.done == ["leave out", "drop"] * 2
    assert running.recorded("slot.not_removed")
    assert running.pool.status == "serving: 1 of 1 worker ready, 0 connections open"
    assert running.alive() == [running.processes[0]]


def test_removed_slot_without_a_worker_gets_one_for_its_backlog(world) -> None:
    running = world()
    _, second = running.serve()
    second.dies(9)
    assert running.listener.done == ["leave out"]  # new clients go to a slot with a running worker
    running.send(signal.SIGTTOU)
    running.pass_time(1)
    third = running.processes[-1]
    third.says("ready")
    assert third.told[1:] == [("drain", ["slot"])]
    third.dies()
    assert running.listener.done[-1] == "drop"


def test_slot_removed_and_added_again_is_removed_first(world) -> None:
    running = world()
    running.serve()
    running.send(signal.SIGTTOU)
    running.send(signal.SIGTTIN)
    roll(running)
    assert running.listener.done == ["leave out", "drop", "add"]
    assert running.pool.status.startswith("serving: 2 of 2")


def test_added_slot_waits_for_a_reload_that_skips_a_slot_being_removed(world) -> None:
    running = world(3)
    running.serve()
    running.send(signal.SIGTTOU)
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    running.send(signal.SIGTTIN)
    assert running.listener.done == ["leave out"]
    roll(running)
    assert running.listener.done == ["leave out", "drop", "add"]
    assert [process.told[0][1]["generation"] for process in running.alive()] == [2, 2, 2]
