"""The stop of a pool: drain, deadlines and repeated signals."""

import os
import signal
from typing import Any

from tests.support.recorded import recorded


def test_stop_drains_all_workers_and_ends_with_the_last_one(world) -> None:
    running = world()
    first, second = running.serve()
    first.says("beat", {"drain_ended": 0})
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.listener.done == ["remove file", "close"]  # the workers have its sockets
    assert first.told[1:] == second.told[1:] == [("drain", ["slot", "own"])]
    first.says("beat", {"drain_ended": 40, "drain_aborted": 1})
    first.dies()
    assert running.done == []
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    running.pass_time(3)
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    second.dies()
    assert running.done == [None]
    assert recorded(running.events[-1:], "drain.done", ended=41, aborted=2, seconds=3.0)
    assert running.notifier.said[:3] == ["READY", "STOPPING", "EXTEND"]
    assert running.service.exit_status == 0
    assert len(running.processes) == 2


def test_sockets_of_the_service_manager_are_kept_until_the_drain_ends(world) -> None:
    running = world(1)
    running.listener.shared = True
    [only] = running.serve()
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.listener.done == ["remove file"]
    only.dies()
    assert running.listener.done == ["remove file", "close"]


def test_connections_drained_by_an_earlier_reload_are_not_counted_at_the_stop(world) -> None:
    running = world(1)
    [first] = running.serve()
    running.send(signal.SIGHUP)
    running.processes[-1].says("ready")
    first.says("beat", {"drain_ended": 100})
    first.dies()
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    running.processes[-1].says("beat", {"drain_ended": 1})
    running.processes[-1].dies()
    assert recorded(running.events[-1:], "drain.done", ended=1, aborted=0)


def test_workers_that_do_not_end_are_killed_after_a_common_deadline(world) -> None:
    running = world()
    running.serve()
    running.send(signal.SIGTERM)
    running.pass_time(49)
    assert not any(process.killed for process in running.processes)
    running.pass_time(2)
    assert all(process.killed for process in running.processes)


def test_second_signal_aborts_the_drain_and_kills_workers_that_do_not_end(world) -> None:
    running = world()
    first, second = running.serve()
    running.send(signal.SIGINT)
    running.reactor.advance(1)
    running.send(signal.SIGTERM)
    assert first.words() == second.words() == ["start", "drain", "abort_drain"]
    first.dies()
    running.pass_time(6)
    assert second.killed
    second.dies(9)
    assert running.done == [None]
    assert running.service.exit_status == 128 + signal.SIGTERM


def test_two_different_signals_in_one_reactor_turn_count_separately(world) -> None:
    running = world(1)
    [only] = running.serve()
    running.send(signal.SIGTERM)
    running.send(signal.SIGINT)
    running.reactor.advance(0)
    assert sorted(only.words()) == ["abort_drain", "drain", "start"]
    running.pass_time(6)
    assert only.killed


def test_signal_repeated_at_once_counts_once(world) -> None:
    running = world(1)
    [only] = running.serve()
    for _ in range(4):
        running.send(signal.SIGTERM)
        running.reactor.advance(0.125)
    assert only.words() == ["start", "drain"]
    running.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "abort_drain"]


def test_stop_of_the_reactor_drains_the_workers(world) -> None:
    running = world(1)
    [only] = running.serve()
    running.reactor.stop()
    running.reactor.advance(0)
    assert only.words() == ["start", "drain"]
    running.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "abort_drain"]
    only.dies()
    assert running.done == [None]


def test_stop_also_ends_starting_successors_and_draining_workers(world) -> None:
    running = world()
    first, second = running.serve()
    running.send(signal.SIGHUP)
    running.processes[2].says("ready")
    assert len(running.processes) == 4
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert first.told[1:] == [("drain", [])]
    assert all(process.words() == ["start", "drain"] for process in running.processes)
    running.processes[3].says("ready")  # it has not read the drain message yet
    assert second.words() == ["start", "drain"]
    for process in running.alive():
        process.dies()
    assert running.done == [None]
    assert len(running.processes) == 4


def test_worker_that_dies_while_draining_is_not_replaced(world) -> None:
    running = world()
    first, second = running.serve()
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    first.dies(9)
    running.pass_time(5)
    second.dies(9)
    assert running.done == [None]
    assert len(running.processes) == 2


def test_stop_starts_a_worker_for_the_backlog_of_an_empty_slot(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.dies(9)
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    [_, last] = running.processes
    assert last.told[1:] == [("drain", ["slot", "own"])]
    assert running.listener.done[-1] == "close"
    assert running.done == []
    last.dies()
    assert running.done == [None]


def test_signals_after_the_stop_have_no_effect(world) -> None:
    running = world()
    running.serve()
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        running.send(number)
    running.processes[0].says("leave")
    assert running.reloads == 0
    assert len(running.processes) == 2
    for process in running.processes:
        process.dies()
    assert running.done == [None]


def test_second_stop_waits_for_the_first_one(world) -> None:
    running = world(1)
    [only] = running.serve()
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    again: list[Any] = []
    running.service.stopService().addBoth(again.append)
    only.dies()
    assert running.done == again == [None]
    assert only.words() == ["start", "drain"]


def test_workers_have_the_module_search_path_of_the_supervisor(world, monkeypatch) -> None:
    monkeypatch.setattr("sys.path", ["", "/one", "/two"])
    running = world(1)
    running.service.startService()
    assert running.processes[0].environment["PYTHONPATH"] == os.pathsep.join(["/one", "/two"])
