"""Replacement of workers that die, after their remaining output is read."""

import signal

import pytest

from rtservice.pool.control import BEAT, CONTROL_IN, CONTROL_OUT
from rtservice.pool.rollout import backoff
from rtservice.pool.worker_process import WorkerPhase
from rtservice.process.counters import ENDED


def test_backoff_doubles_from_a_tenth_of_a_second_to_30_seconds() -> None:
    assert [round(backoff(deaths, 0.5), 1) for deaths in range(1, 12)] == [
        *(0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0)
    ]
    assert backoff(10**9, 0.5) == 30.0


def test_backoff_jitter_is_plus_or_minus_25_percent() -> None:
    assert backoff(1, 0) == pytest.approx(0.075)
    assert backoff(1, 1) == pytest.approx(0.125)
    assert backoff(50, 1) == pytest.approx(37.5)


def test_worker_that_dies_is_replaced_after_its_backoff(world) -> None:
    running = world()
    first, second = running.serve()
    waits = []
    for _ in range(4):
        running.processes[-1].dies(9)
        count = len(running.processes)
        waits.append(round(running.pool.slots[1].respawn.getTime() - running.reactor.seconds(), 3))
        running.reactor.advance(waits[-1] - 0.01)
        assert len(running.processes) == count
        running.reactor.advance(0.02)
        running.processes[-1].says("ready")
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert running.processes[-1].told[0] == ("start", {"slot": 1, "slots": 2, "generation": 1})
    assert running.pool.slots[1].ready
    assert first.signals == second.signals == []


def test_backoff_is_reset_after_a_minute_without_deaths(world) -> None:
    running = world()
    running.serve()
    for _ in range(3):
        running.processes[-1].dies(9)
        running.pass_time(1)
        running.processes[-1].says("ready")
    running.pass_time(60)
    running.processes[-1].dies(9)
    assert running.events[-1]["event"] == "worker.restarting"
    assert running.events[-1]["seconds"] == pytest.approx(0.1, rel=0.26)


def test_failed_respawn_is_retried(world) -> None:
    running = world()
    _, second = running.serve()
    running.reactor.refuse = OSError(12, "Cannot allocate memory")
    second.dies(9)
    running.pass_time(5)
    assert len(running.processes) == 2
    running.reactor.refuse = None
    running.pass_time(5)
    running.processes[-1].says("ready")
    assert [slot.ready for slot in running.pool.slots] == [True, True]


def test_worker_killed_by_a_signal_without_a_name_is_restarted(world) -> None:
    running = world()
    _, second = running.serve()
    second.exits(killed=signal.SIGRTMIN + 6)
    for descriptor in sorted(second.pipes):
        second.loses(descriptor)
    assert running.service.overview()["exits"] == {1: {f"signal {signal.SIGRTMIN + 6}": 1}}
    assert running.recorded("worker.restarting", slot=1)


def test_nothing_is_sent_to_a_dead_worker_whose_output_is_still_read(world) -> None:
    running = world()
    first, second = running.serve()
    second.loses(CONTROL_IN)
    second.exits(9)
    running.reactor.advance(BEAT)
    running.send(signal.SIGTTIN)  # which all workers are notified of
    assert first.words() == ["start", "share"]
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    running.send(signal.SIGTERM)
    for process in running.alive():
        for descriptor in sorted(process.pipes):
            process.loses(descriptor)
        if process.pid is not None:
            process.exits()
    assert running.done == [None]


def test_last_output_of_a_dead_worker_is_read_before_it_is_replaced(world) -> None:
    running = world()
    _, second = running.serve()
    second.exits(11)
    second.writes(b"Fatal Python error\n", 2)
    second.says("beat", {"ended": 3})
    for descriptor in sorted(second.pipes):
        second.loses(descriptor)
    assert running.recorded("worker.printed_error", pid=1001, line="Fatal Python error")
    assert running.pool.totals.ended() == {ENDED: 3}


def test_pipes_held_by_a_child_of_a_dead_worker_do_not_prevent_its_replacement(world) -> None:
    running = world()
    _, second = running.serve()
    second.exits(9)
    second.loses(CONTROL_IN)
    second.loses(CONTROL_OUT)
    running.reactor.advance(0.9)
    assert second.protocol.phase is WorkerPhase.READY
    running.reactor.advance(0.2)
    assert second.protocol.phase is WorkerPhase.GONE
    running.reactor.advance(0.2)
    assert len(running.processes) == 3


def test_worker_that_closes_its_channel_and_keeps_running_is_killed(world) -> None:
    running = world(hang_timeout=0.0)
    _, second = running.serve()
    second.loses(CONTROL_OUT)
    running.reactor.advance(4.9)
    assert second.signals == []
    running.reactor.advance(0.2)
    assert second.signals == [signal.SIGKILL]
