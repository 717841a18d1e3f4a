"""The start of a pool: each slot gets a worker, and the first failure is reported as the reason."""

import signal

import pytest

from rtservice.pool.control import BEAT, FIRST_SOCKET, LINK_CHANNEL
from rtservice.process.start_errors import StartError


def test_each_slot_gets_a_process_with_its_sockets_and_a_start_message(world) -> None:
    running = world(3)
    running.service.startService()
    assert [process.descriptors[FIRST_SOCKET] for process in running.processes] == [100, 101, 102]
    for number, process in enumerate(running.processes):
        assert process.told == [("start", {"slot": number, "slots": 3, "generation": 1})]
        assert {key: process.descriptors[key] for key in (1, 2, 3, 4)} == {1: "r", 2: "r", 3: "w", 4: "r"}
        assert set(process.descriptors) == {0, 1, 2, 3, 4, LINK_CHANNEL, FIRST_SOCKET}


def test_service_is_reported_ready_once_when_all_workers_are_ready(world) -> None:
    running = world()
    running.service.startService()
    running.processes[1].says("ready")
    assert running.reports == []
    assert running.notifier.said == []
    running.processes[0].says("ready")
    running.processes[0].says("ready")
    assert running.reports == [None]
    assert running.notifier.said == ["READY"]
    assert running.recorded("listener.listening", listener="tcp:127.0.0.1:1")
    assert running.pool.status == "serving: 2 of 2 workers ready, 0 connections open"


def test_status_shows_the_number_of_workers_and_connections(world) -> None:
    running = world(3)
    running.service.startService()
    assert running.pool.status == "starting: 0 of 3 workers ready, 0 connections open"
    first, second, third = running.processes
    for process in running.processes:
        process.says("ready")
    first.says("beat", {"open": 2})
    second.says("beat", {"open": 3, "memory": 7})
    third.dies(1)
    running.reactor.advance(BEAT)
    assert running.notifier.statuses[-1] == "serving: 2 of 3 workers ready, 5 connections open"
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.pool.status == "draining: 0 of 3 workers ready, 5 connections open"


def test_worker_that_cannot_start_fails_the_start_with_its_reason(world) -> None:
    running = world()
    running.service.startService()
    running.processes[0].says("ready")
    running.processes[1].says("failed", "the greeting is a secret")
    running.processes[1].dies(1)
    assert running.reports == ["the greeting is a secret"]
    assert running.service.exit_status == 1
    assert running.reactor.stopped
    running.reactor.advance(0)
    assert running.processes[0].words() == ["start", "abort_drain", "drain"]
    running.processes[0].dies()
    assert running.done == [None]


def test_other_workers_are_killed_five_seconds_after_a_failed_start(world) -> None:
    running = world()
    running.service.startService()
    running.processes[1].dies(1)
    running.reactor.pump([0, 4.9])
    assert not running.processes[0].killed
    running.reactor.advance(0.2)
    assert running.processes[0].killed
    running.processes[0].dies(9)
    assert running.done == [None]


def test_worker_that_dies_during_the_start_fails_the_start(world) -> None:
    running = world()
    running.service.startService()
    running.processes[1].dies(3)
    running.processes[0].dies(3)
    assert running.reports == ["worker 1 (pid 1001) ended with status 3"]
    assert running.service.exit_status == 1
    assert len(running.processes) == 2


def test_worker_that_cannot_start_does_not_stop_a_serving_service(world) -> None:
    running = world()
    _, second = running.serve()
    second.dies(9)
    for _ in range(10):
        running.pass_time(40)
        running.processes[-1].says("failed", "no certificate")
        running.processes[-1].dies(1)
    assert not running.reactor.stopped
    assert running.service.exit_status == 0
    assert running.reports == [None]
    assert running.recorded("worker.restarting", slot=1, seconds=30.0, problem="no certificate")


def test_failed_spawn_during_the_start_is_reported_in_one_line(world) -> None:
    running = world()
    running.reactor.refuse = BlockingIOError(11, "Resource temporarily unavailable")
    running.service.startService()
    assert running.reports == ["no worker can be spawned: python: Resource temporarily unavailable"]
    running.reactor.advance(0)
    assert running.done == [None]
    assert running.service.exit_status == 1


@pytest.mark.parametrize("error", [LookupError("no page"), SystemExit(0), ValueError("embedded\nnull byte")], ids=repr)
def test_unexpected_error_while_starting_workers_is_reported_in_one_line(world, monkeypatch, error) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise error

    running = world()
    monkeypatch.setattr(running.reactor, "spawnProcess", refuse)
    running.service.startService()
    text = str(error).replace("\n", " ")
    assert running.reports == [f"the workers cannot be started: {type(error).__name__}: {text}"]
    assert running.service.exit_status == 1
    assert [event["log_level"].name for event in running.events if "log_failure" in event] == ["error"]
    running.events.clear()  # expected
    running.reactor.advance(0)
    assert running.done == [None]


def test_abandoned_start_leaves_no_socket_and_no_file(world) -> None:
    running = world()
    running.service.abandon()
    assert running.listener.done == ["remove file", "close"]


def test_failed_check_is_reported_before_any_worker_is_spawned(world) -> None:
    running = world(problem="the process still runs as root")
    with pytest.raises(StartError, match="still runs as root"):
        running.service.startService()
    assert running.reports == ["the process still runs as root"]
    assert running.processes == []
    assert running.handlers == {}
    assert running.listener.done == ["remove file", "close"]


def test_stop_before_all_workers_are_ready_is_reported_as_a_failed_start(world) -> None:
    running = world()
    running.service.startService()
    running.processes[0].says("ready")
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.reports == ["stopped before every worker was ready"]
    for process in running.processes:
        process.dies()
    assert running.done == [None]
    assert running.service.exit_status == 0


def test_worker_that_is_not_ready_within_a_minute_is_killed(world) -> None:
    running = world()
    first, _ = running.serve()
    first.dies(9)
    running.pass_time(1)
    late = running.processes[-1]
    for _ in range(59):
        late.logs("still busy")  # log records do not extend the start timeout
        running.pass_time(1)
    assert late.signals == []
    running.pass_time(1)
    assert late.signals == [signal.SIGKILL]
    assert running.recorded("worker.start_timed_out", seconds=60)
