"""The stop of a pool: drain, deadlines and repeated signals."""

import os
import signal
from typing import Any

from tests.support.recorded import recorded


def test_stop_drains_all_workers_and_ends_with_the_last_one(world) -> None:
    one = world()
    first, second = one.serve()
    first.says("beat", {"drain_ended": 0})
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.listener.done == ["remove file", "close"]  # the workers have its sockets
    assert first.told[1:] == second.told[1:] == [("drain", ["slot", "own"])]
    first.says("beat", {"drain_ended": 40, "drain_aborted": 1})
    first.dies()
    assert one.done == []
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    one.pass_time(3)
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    second.dies()
    assert one.done == [None]
    assert recorded(one.events[-1:], "drain.done", ended=41, aborted=2, seconds=3.0)
    assert one.notifier.said[:3] == ["READY", "STOPPING", "EXTEND"]
    assert one.service.exit_status == 0
    assert len(one.processes) == 2


def test_sockets_of_the_service_manager_are_kept_until_the_drain_ends(world) -> None:
    one = world(1)
    one.listener.shared = True
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.listener.done == ["remove file"]
    only.dies()
    assert one.listener.done == ["remove file", "close"]


def test_connections_drained_by_an_earlier_reload_are_not_counted_at_the_stop(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    first.says("beat", {"drain_ended": 100})
    first.dies()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    one.processes[-1].says("beat", {"drain_ended": 1})
    one.processes[-1].dies()
    assert recorded(one.events[-1:], "drain.done", ended=1, aborted=0)


def test_workers_that_do_not_end_are_killed_after_a_common_deadline(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTERM)
    one.pass_time(49)
    assert not any(process.killed for process in one.processes)
    one.pass_time(2)
    assert all(process.killed for process in one.processes)


def test_second_signal_aborts_the_drain_and_kills_workers_that_do_not_end(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGINT)
    one.reactor.advance(1)
    one.send(signal.SIGTERM)
    assert first.words() == second.words() == ["start", "drain", "abort_drain"]
    first.dies()
    one.pass_time(6)
    assert second.killed
    second.dies(9)
    assert one.done == [None]
    assert one.service.exit_status == 128 + signal.SIGTERM


def test_two_different_signals_in_one_reactor_turn_count_separately(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.send(signal.SIGINT)
    one.reactor.advance(0)
    assert sorted(only.words()) == ["abort_drain", "drain", "start"]
    one.pass_time(6)
    assert only.killed


def test_signal_repeated_at_once_counts_once(world) -> None:
    one = world(1)
    [only] = one.serve()
    for _ in range(4):
        one.send(signal.SIGTERM)
        one.reactor.advance(0.125)
    assert only.words() == ["start", "drain"]
    one.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "abort_drain"]


def test_stop_of_the_reactor_drains_the_workers(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.reactor.stop()
    one.reactor.advance(0)
    assert only.words() == ["start", "drain"]
    one.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "abort_drain"]
    only.dies()
    assert one.done == [None]


def test_stop_also_ends_starting_successors_and_draining_workers(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGHUP)
    one.processes[2].says("ready")
    assert len(one.processes) == 4
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert first.told[1:] == [("drain", [])]
    assert all(process.words() == ["start", "drain"] for process in one.processes)
    one.processes[3].says("ready")  # it had no time to hear of the drain
    assert second.words() == ["start", "drain"]
    for process in one.alive():
        process.dies()
    assert one.done == [None]
    assert len(one.processes) == 4


def test_worker_that_dies_while_draining_is_not_replaced(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    first.dies(9)
    one.pass_time(5)
    second.dies(9)
    assert one.done == [None]
    assert len(one.processes) == 2


def test_stop_starts_a_worker_for_the_backlog_of_an_empty_slot(world) -> None:
    one = world(1)
    [only] = one.serve()
    only.dies(9)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    [_, last] = one.processes
    assert last.told[1:] == [("drain", ["slot", "own"])]
    assert one.listener.done[-1] == "close"
    assert one.done == []
    last.dies()
    assert one.done == [None]


def test_signals_after_the_stop_have_no_effect(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        one.send(number)
    one.processes[0].says("leave")
    assert one.reloads == 0
    assert len(one.processes) == 2
    for process in one.processes:
        process.dies()
    assert one.done == [None]


def test_second_stop_waits_for_the_first_one(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    again: list[Any] = []
    one.service.stopService().addBoth(again.append)
    only.dies()
    assert one.done == again == [None]
    assert only.words() == ["start", "drain"]


def test_workers_have_the_module_search_path_of_the_supervisor(world, monkeypatch) -> None:
    monkeypatch.setattr("sys.path", ["", "/one", "/two"])
    one = world(1)
    one.service.startService()
    assert one.processes[0].environment["PYTHONPATH"] == os.pathsep.join(["/one", "/two"])
