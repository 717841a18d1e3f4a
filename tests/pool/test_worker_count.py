"""A reload changes the number of workers."""

import signal
from typing import Any

from rtservice.net.description import ListenError
from rtservice.pool.control import FIRST_SOCKET
from tests.support.fake_listener import Slots
from tests.support.pool_world import roll


def test_added_slot_gets_a_socket_and_all_workers_receive_their_share(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGTTIN)
    third = one.processes[2]
    assert one.listener.done == ["add"]
    assert third.descriptors[FIRST_SOCKET] == 102
    assert third.told[0] == ("start", {"slot": 2, "slots": 3, "generation": 1})
    assert first.told[1:] == second.told[1:] == [("share", 3)]
    third.says("ready")
    assert one.pool.status.startswith("serving: 3 of 3 workers ready")


def test_several_slots_are_added_in_sequence(world) -> None:
    one = world()
    one.serve()
    for _ in range(3):
        one.send(signal.SIGTTIN)
    assert [process.descriptors[FIRST_SOCKET] for process in one.processes] == [100, 101, 102, 103, 104]
    roll(one)
    assert one.pool.status.startswith("serving: 5 of 5 workers ready")


def test_slot_requested_during_the_start_is_added_when_all_workers_are_ready(world) -> None:
    one = world()
    one.service.startService()
    one.send(signal.SIGTTIN)
    assert len(one.processes) == 2
    roll(one)
    assert one.pool.status.startswith("serving: 3 of 3 workers ready")


def test_slot_is_not_added_if_one_of_its_sockets_cannot_be_opened(world) -> None:
    one = world()
    another: Any = Slots(2)
    another.problem = ListenError("cannot listen on 127.0.0.1:1: permission denied")
    one.pool.listeners.append(another)
    one.serve()
    one.send(signal.SIGTTIN)
    assert one.listener.done == ["add", "drop"]
    assert len(one.processes) == 2
    assert one.recorded("slot.not_added", problem="cannot listen on 127.0.0.1:1: permission denied")
    another.problem = None
    one.send(signal.SIGTTIN)
    roll(one)
    assert one.pool.status.startswith("serving: 3 of 3")


def test_removed_slot_serves_its_backlog_before_its_socket_is_closed(world) -> None:
    one = world(3)
    first, second, third = one.serve()
    one.send(signal.SIGTTOU)
    assert one.listener.done == ["leave out"]
    assert third.told[1:] == [("drain", ["slot"])]
    assert first.words() == ["start"]
    one.pass_time(5)
    assert one.listener.done == ["leave out"]
    third.dies()
    assert one.listener.done == ["leave out", "drop"]
    assert first.told[1:] == second.told[1:] == [("share", 2)]
    assert len(one.processes) == 3
    assert one.pool.status.startswith("serving: 2 of 2")


def test_several_slots_are_removed_in_sequence_except_the_last_one(world) -> None:
    one = world(3)
    one.serve()
    for _ in range(5):
        one.send(signal.SIGTTOU)
    roll(one)
    assert one.listener.done == ["leave out", "drop"] * 2
    assert one.recorded("slot.not_removed")
    assert one.pool.status == "serving: 1 of 1 worker ready, 0 connections open"
    assert one.alive() == [one.processes[0]]


def test_removed_slot_without_a_worker_gets_one_for_its_backlog(world) -> None:
    one = world()
    _, second = one.serve()
    second.dies(9)
    assert one.listener.done == ["leave out"]  # new clients go where one is served at once
    one.send(signal.SIGTTOU)
    one.pass_time(1)
    third = one.processes[-1]
    third.says("ready")
    assert third.told[1:] == [("drain", ["slot"])]
    third.dies()
    assert one.listener.done[-1] == "drop"


def test_slot_removed_and_added_again_is_removed_first(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTTOU)
    one.send(signal.SIGTTIN)
    roll(one)
    assert one.listener.done == ["leave out", "drop", "add"]
    assert one.pool.status.startswith("serving: 2 of 2")


def test_added_slot_waits_for_a_reload_that_skips_a_slot_being_removed(world) -> None:
    one = world(3)
    one.serve()
    one.send(signal.SIGTTOU)
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    one.send(signal.SIGTTIN)
    assert one.listener.done == ["leave out"]
    roll(one)
    assert one.listener.done == ["leave out", "drop", "add"]
    assert [process.told[0][1]["generation"] for process in one.alive()] == [2, 2, 2]
