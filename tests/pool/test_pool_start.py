"""The start of a pool: every slot gets a worker, and the first failure is the reason."""

import signal

import pytest

from rtservice.pool.control import BEAT, FIRST_SOCKET
from rtservice.process.start_errors import StartError


def test_each_slot_gets_a_process_with_its_sockets_and_a_start_message(world) -> None:
    one = world(3)
    one.service.startService()
    assert [process.descriptors[FIRST_SOCKET] for process in one.processes] == [100, 101, 102]
    for number, process in enumerate(one.processes):
        assert process.told == [("start", {"slot": number, "slots": 3, "generation": 1})]
        assert {key: process.descriptors[key] for key in (1, 2, 3, 4)} == {1: "r", 2: "r", 3: "w", 4: "r"}
        assert set(process.descriptors) == {0, 1, 2, 3, 4, FIRST_SOCKET}


def test_service_is_reported_ready_once_when_all_workers_are_ready(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].says("ready")
    assert one.reports == []
    assert one.notifier.said == []
    one.processes[0].says("ready")
    one.processes[0].says("ready")
    assert one.reports == [None]
    assert one.notifier.said == ["READY"]
    assert one.recorded("listener.listening", listener="tcp:127.0.0.1:1")
    assert one.pool.status == "serving: 2 of 2 workers ready, 0 connections open"


def test_status_shows_the_number_of_workers_and_connections(world) -> None:
    one = world(3)
    one.service.startService()
    assert one.pool.status == "starting: 0 of 3 workers ready, 0 connections open"
    first, second, third = one.processes
    for process in one.processes:
        process.says("ready")
    first.says("beat", {"open": 2})
    second.says("beat", {"open": 3, "memory": 7})
    third.dies(1)
    one.reactor.advance(BEAT)
    assert one.notifier.statuses[-1] == "serving: 2 of 3 workers ready, 5 connections open"
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.pool.status == "draining: 0 of 3 workers ready, 5 connections open"


def test_worker_that_cannot_start_fails_the_start_with_its_reason(world) -> None:
    one = world()
    one.service.startService()
    one.processes[0].says("ready")
    one.processes[1].says("failed", "the greeting is a secret")
    one.processes[1].dies(1)
    assert one.reports == ["the greeting is a secret"]
    assert one.service.exit_status == 1
    assert one.reactor.stopped
    one.reactor.advance(0)
    assert one.processes[0].words() == ["start", "abort_drain", "drain"]
    one.processes[0].dies()
    assert one.done == [None]


def test_other_workers_are_killed_five_seconds_after_a_failed_start(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].dies(1)
    one.reactor.pump([0, 4.9])
    assert not one.processes[0].killed
    one.reactor.advance(0.2)
    assert one.processes[0].killed
    one.processes[0].dies(9)
    assert one.done == [None]


def test_worker_that_dies_during_the_start_fails_the_start(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].dies(3)
    one.processes[0].dies(3)
    assert one.reports == ["worker 1 (pid 1001) ended with status 3"]
    assert one.service.exit_status == 1
    assert len(one.processes) == 2


def test_worker_that_cannot_start_does_not_stop_a_serving_service(world) -> None:
    one = world()
    _, second = one.serve()
    second.dies(9)
    for _ in range(10):
        one.pass_time(40)
        one.processes[-1].says("failed", "no certificate")
        one.processes[-1].dies(1)
    assert not one.reactor.stopped
    assert one.service.exit_status == 0
    assert one.reports == [None]
    assert one.recorded("worker.restarting", slot=1, seconds=30.0, problem="no certificate")


def test_failed_spawn_during_the_start_is_reported_in_one_line(world) -> None:
    one = world()
    one.reactor.refuse = BlockingIOError(11, "Resource temporarily unavailable")
    one.service.startService()
    assert one.reports == ["no worker can be spawned: python: Resource temporarily unavailable"]
    one.reactor.advance(0)
    assert one.done == [None]
    assert one.service.exit_status == 1


@pytest.mark.parametrize("error", [LookupError("no page"), SystemExit(0), ValueError("embedded\nnull byte")], ids=repr)
def test_unexpected_error_while_starting_workers_is_reported_in_one_line(world, monkeypatch, error) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise error

    one = world()
    monkeypatch.setattr(one.reactor, "spawnProcess", refuse)
    one.service.startService()
    text = str(error).replace("\n", " ")
    assert one.reports == [f"the workers cannot be started: {type(error).__name__}: {text}"]
    assert one.service.exit_status == 1
    assert [event["log_level"].name for event in one.events if "log_failure" in event] == ["error"]
    one.events.clear()  # they were to be there
    one.reactor.advance(0)
    assert one.done == [None]


def test_abandoned_start_leaves_no_socket_and_no_file(world) -> None:
    one = world()
    one.service.abandon()
    assert one.listener.done == ["remove file", "close"]


def test_failed_check_is_reported_before_any_worker_is_spawned(world) -> None:
    one = world(problem="the process still runs as root")
    with pytest.raises(StartError, match="still runs as root"):
        one.service.startService()
    assert one.reports == ["the process still runs as root"]
    assert one.processes == []
    assert one.handlers == {}
    assert one.listener.done == ["remove file", "close"]


def test_stop_before_all_workers_are_ready_is_reported_as_a_failed_start(world) -> None:
    one = world()
    one.service.startService()
    one.processes[0].says("ready")
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.reports == ["stopped before every worker was ready"]
    for process in one.processes:
        process.dies()
    assert one.done == [None]
    assert one.service.exit_status == 0


def test_worker_that_is_not_ready_within_a_minute_is_killed(world) -> None:
    one = world()
    first, _ = one.serve()
    first.dies(9)
    one.pass_time(1)
    late = one.processes[-1]
    for _ in range(59):
        late.logs("still busy")  # to be heard is not to be ready
        one.pass_time(1)
    assert late.signals == []
    one.pass_time(1)
    assert late.signals == [signal.SIGKILL]
    assert one.recorded("worker.start_timed_out", seconds=60)
