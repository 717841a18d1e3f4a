"""A reload replaces the workers one at a time."""

import signal
from functools import partial

import pytest

from rtservice.pool.control import BEAT, FIRST_SOCKET
from rtservice.process import service as service_module
from rtservice.process.slices import in_slices
from tests.support.pool_world import roll


def test_reload_replaces_one_worker_at_a_time_and_starts_each_successor_before_the_drain(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING"]
    assert len(one.processes) == 3
    third = one.processes[2]
    assert third.told == [("start", {"slot": 0, "slots": 2, "generation": 2})]
    assert third.descriptors[FIRST_SOCKET] == first.descriptors[FIRST_SOCKET]
    assert first.words() == ["start"]
    third.says("ready")
    # Its queue is the successor's: no kind of socket is to be served to its end.
    assert first.told[1:] == [("drain", [])]
    assert second.words() == ["start"]
    assert len(one.processes) == 4
    fourth = one.processes[3]
    assert fourth.told[0][1]["slot"] == 1
    assert one.notifier.said == ["READY", "RELOADING"]
    fourth.says("ready")
    assert second.words() == ["start", "drain"]
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    first.dies()
    second.dies()
    one.pass_time(200)
    assert one.alive() == [third, fourth]
    assert third.signals == fourth.signals == []


def test_replaced_worker_that_does_not_end_is_killed_after_its_deadlines(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    one.pass_time(49)
    assert not first.killed
    one.pass_time(2)
    assert first.killed
    assert not one.processes[-1].killed


def test_failed_successor_ends_the_reload_and_keeps_the_current_worker(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    one.processes[-1].says("failed", "bad code")
    one.processes[-1].dies(1)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert one.recorded("worker.not_replaced", problem="worker 0 (pid 1002) cannot take over: bad code")
    one.pass_time(100)
    assert one.alive() == [first, second]
    assert first.words() == second.words() == ["start"]
    assert not one.reactor.stopped


def test_failed_spawn_during_a_reload_keeps_the_current_workers(world) -> None:
    one = world()
    one.serve()
    one.reactor.refuse = OSError(11, "Resource temporarily unavailable")
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert one.recorded(
        "worker.not_replaced", problem="no worker can be spawned: python: Resource temporarily unavailable"
    )
    assert [slot.ready for slot in one.pool.slots] == [True, True]


def test_failed_reload_keeps_the_current_workers(world) -> None:
    one = world()
    one.serve()
    one.next_spec = None
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert len(one.processes) == 2


def test_reload_during_a_reload_replaces_all_workers_with_the_newest_settings(world) -> None:
    one = world()
    one.serve()
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    one.next_spec = one.specified(3)
    one.send(signal.SIGHUP)
    roll(one)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in one.pool.slots] == [3, 3]
    assert one.notifier.said == ["READY", "RELOADING", "RELOADING", "READY"]
    assert len(one.alive()) == 2


def test_second_reload_succeeds_after_the_successor_of_the_first_fails(world) -> None:
    one = world()
    one.serve()
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    bad = one.processes[-1]
    one.next_spec = one.specified(3)
    one.send(signal.SIGHUP)
    bad.dies(1)
    roll(one)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in one.pool.slots] == [3, 3]
    assert one.notifier.said[-1] == "READY"


def test_reload_requested_during_the_start_runs_when_all_workers_are_ready(world) -> None:
    one = world()
    one.service.startService()
    one.send(signal.SIGHUP)
    assert one.reloads == 0
    one.next_spec = one.specified(2)
    for process in list(one.processes):
        process.says("ready")
    assert one.reloads == 1
    roll(one)
    assert one.reloads == 1
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in one.pool.slots] == [2, 2]


@pytest.fixture
def slow(monkeypatch):
    """Makes each step of a reload a slice."""
    monkeypatch.setattr(service_module, "in_slices", partial(in_slices, size=0.0, pause=0.1))


def test_workers_are_not_replaced_until_all_settings_are_read(world, slow) -> None:
    one = world()
    one.serve()
    one.reload_steps, one.next_spec = 10, one.specified(2)
    one.send(signal.SIGHUP)
    for _ in range(9):
        one.reactor.advance(0.1)
        assert (one.reloads, len(one.processes)) == (1, 2)
    one.reactor.advance(0.1)
    roll(one)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in one.pool.slots] == [2, 2]
    assert [word for word in one.notifier.said if word != "EXTEND"] == ["READY", "RELOADING", "READY"]


def test_signals_while_a_reload_reads_settings_cause_one_more_reload(world, slow) -> None:
    one = world()
    one.serve()
    one.reload_steps, one.next_spec = 10, one.specified(2)
    one.send(signal.SIGHUP)
    one.reactor.advance(0.1)
    for _ in range(3):
        one.send(signal.SIGHUP)
    assert one.reloads == 1
    for _ in range(9):
        one.reactor.advance(0.1)
    assert one.reloads == 2
    one.next_spec = one.specified(3)
    for _ in range(10):
        one.reactor.advance(0.1)
    roll(one)
    assert one.reloads == 2
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in one.pool.slots] == [3, 3]


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_stop_while_a_reload_reads_settings_cancels_the_reload(world, slow, turns) -> None:
    one = world()
    processes = one.serve()
    one.reload_steps, one.next_spec = 10, one.specified(2)
    one.send(signal.SIGHUP)
    for _ in range(turns):
        one.reactor.advance(0.1)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.recorded("task.cancelled", task="reload")
    assert one.notifier.said[-1] == "STOPPING"
    for process in processes:
        process.dies(0)
    one.reactor.advance(5)
    assert one.done == [None]
    assert len(one.processes) == 2


def test_certificates_that_change_during_a_reload_are_reloaded_again(world, slow, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    one = world(1, watched=(str(file),))
    one.serve()
    one.reload_steps = 10
    file.write_text("another")
    one.pass_time(BEAT)
    for _ in range(3):
        one.reactor.advance(0.1)
    assert one.reloads == 1
    file.write_text("and another one")
    one.pass_time(10 * BEAT)
    while one.reloads < 2:
        roll(one)
        one.pass_time(BEAT)
    assert one.reloads == 2


@pytest.mark.parametrize(("count", "seconds"), [(0, 60), (100, 62), (5000, 160)])
def test_start_timeout_of_a_worker_grows_with_its_certificates(world, count, seconds) -> None:
    one = world(2)
    one.listener.certificates = (None,) * count
    one.service.startService()
    one.pass_time(seconds - 1.5)
    assert not any(process.killed for process in one.processes)
    one.pass_time(2)
    assert all(process.killed for process in one.processes)
    assert one.recorded("worker.start_timed_out", seconds=seconds)
    assert ("EXTEND" in one.notifier.said) is (count > 0)


def test_starting_successor_takes_over_the_slot_of_a_worker_that_dies(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    successor = one.processes[-1]
    first.dies(9)
    one.pass_time(1)
    successor.says("ready")
    roll(one)
    one.pass_time(1)
    assert not successor.killed
    assert one.pool.slots[0].worker is successor.protocol
    assert second not in one.alive()
    assert len(one.processes) == 4
    assert one.notifier.said == ["READY", "RELOADING", "READY"]


def test_slot_is_restarted_if_its_worker_and_its_successor_die(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    first.dies(9)
    one.processes[-1].dies(9)
    one.pass_time(1)
    one.processes[-1].says("ready")
    assert one.pool.slots[0].ready
    assert len(one.alive()) == 1


def test_stop_ends_a_starting_successor_and_the_current_worker_serves_the_backlog(world) -> None:
    """The successor has copies of the sockets: until they are closed nobody is refused, and no other can listen."""
    one = world()
    first, second = one.serve()
    one.send(signal.SIGHUP)
    successor = one.processes[2]
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert successor.told[1:] == [("drain", [])]
    assert successor.signals == [signal.SIGTERM]
    for worker in (first, second):
        assert worker.told[1:] == [("drain", ["slot", "own"])]
        assert worker.signals == []


def test_stop_lets_a_starting_worker_alone_in_its_slot_serve_the_backlog(world) -> None:
    one = world(1)
    [first] = one.serve()
    first.dies(9)
    one.pass_time(1)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.processes[-1].told[1:] == [("drain", ["slot", "own"])]
    assert one.processes[-1].signals == []


def test_worker_starting_with_the_old_settings_is_replaced(world) -> None:
    one = world(1)
    [first] = one.serve()
    first.dies(9)
    one.pass_time(1)
    one.next_spec = one.specified(2)
    one.send(signal.SIGHUP)
    assert one.processes[1].told[0][1]["generation"] == 1
    roll(one)
    assert [process.told[0][1]["generation"] for process in one.alive()] == [2]


def test_worker_that_requests_replacement_drains_after_its_successor_is_ready(world) -> None:
    one = world()
    first, second = one.serve()
    first.says("leave")
    first.says("leave")
    assert len(one.processes) == 3
    one.processes[2].says("ready")
    assert first.words() == ["start", "drain"]
    first.says("leave")
    assert len(one.processes) == 3
    assert one.notifier.said == ["READY"]
    first.dies()
    assert one.alive() == [second, one.processes[2]]


def test_changed_certificates_cause_one_reload(world, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    one = world(1, watched=(str(file),))
    one.serve()
    one.pass_time(3)
    assert one.reloads == 0
    file.write_text("another")
    one.pass_time(3)
    assert one.reloads == 1
    roll(one)
    one.pass_time(3)
    assert one.reloads == 1
