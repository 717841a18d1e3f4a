"""A reload replaces the workers one at a time."""

import signal
from functools import partial

import pytest

from rtservice.pool.control import BEAT, FIRST_SOCKET
from rtservice.process import service as service_module
from rtservice.process.slices import in_slices
from tests.support.pool_world import roll


def test_reload_replaces_one_worker_at_a_time_and_starts_each_successor_before_the_drain(world) -> None:
    running = world()
    first, second = running.serve()
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    assert running.notifier.said == ["READY", "RELOADING"]
    assert len(running.processes) == 3
    third = running.processes[2]
    assert third.told == [("start", {"slot": 0, "slots": 2, "generation": 2})]
    assert third.descriptors[FIRST_SOCKET] == first.descriptors[FIRST_SOCKET]
    assert first.words() == ["start"]
    third.says("ready")
    # The successor serves the backlog: the old worker does not have to empty any.
    assert first.told[1:] == [("drain", [])]
    assert second.words() == ["start"]
    assert len(running.processes) == 4
    fourth = running.processes[3]
    assert fourth.told[0][1]["slot"] == 1
    assert running.notifier.said == ["READY", "RELOADING"]
    fourth.says("ready")
    assert second.words() == ["start", "drain"]
    assert running.notifier.said == ["READY", "RELOADING", "READY"]
    first.dies()
    second.dies()
    running.pass_time(200)
    assert running.alive() == [third, fourth]
    assert third.signals == fourth.signals == []


def test_replaced_worker_that_does_not_end_is_killed_after_its_deadlines(world) -> None:
    running = world(1)
    [first] = running.serve()
    running.send(signal.SIGHUP)
    running.processes[-1].says("ready")
    running.pass_time(49)
    assert not first.killed
    running.pass_time(2)
    assert first.killed
    assert not running.processes[-1].killed


def test_failed_successor_ends_the_reload_and_keeps_the_current_worker(world) -> None:
    running = world()
    first, second = running.serve()
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    running.processes[-1].says("failed", "bad code")
    running.processes[-1].dies(1)
    assert running.notifier.said == ["READY", "RELOADING", "READY"]
    assert running.recorded("worker.not_replaced", problem="worker 0 (pid 1002) cannot take over: bad code")
    running.pass_time(100)
    assert running.alive() == [first, second]
    assert first.words() == second.words() == ["start"]
    assert not running.reactor.stopped


def test_failed_spawn_during_a_reload_keeps_the_current_workers(world) -> None:
    running = world()
    running.serve()
    running.reactor.refuse = OSError(11, "Resource temporarily unavailable")
    running.send(signal.SIGHUP)
    assert running.notifier.said == ["READY", "RELOADING", "READY"]
    assert running.recorded(
        "worker.not_replaced", problem="no worker can be spawned: python: Resource temporarily unavailable"
    )
    assert [slot.ready for slot in running.pool.slots] == [True, True]


def test_failed_reload_keeps_the_current_workers(world) -> None:
    running = world()
    running.serve()
    running.next_spec = None
    running.send(signal.SIGHUP)
    assert running.notifier.said == ["READY", "RELOADING", "READY"]
    assert len(running.processes) == 2


def test_reload_during_a_reload_replaces_all_workers_with_the_newest_settings(world) -> None:
    running = world()
    running.serve()
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    running.processes[-1].says("ready")
    running.next_spec = running.specified(3)
    running.send(signal.SIGHUP)
    roll(running)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in running.pool.slots] == [3, 3]
    assert running.notifier.said == ["READY", "RELOADING", "RELOADING", "READY"]
    assert len(running.alive()) == 2


def test_second_reload_succeeds_after_the_successor_of_the_first_fails(world) -> None:
    running = world()
    running.serve()
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    bad = running.processes[-1]
    running.next_spec = running.specified(3)
    running.send(signal.SIGHUP)
    bad.dies(1)
    roll(running)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in running.pool.slots] == [3, 3]
    assert running.notifier.said[-1] == "READY"


def test_reload_requested_during_the_start_runs_when_all_workers_are_ready(world) -> None:
    running = world()
    running.service.startService()
    running.send(signal.SIGHUP)
    assert running.reloads == 0
    running.next_spec = running.specified(2)
    for process in list(running.processes):
        process.says("ready")
    assert running.reloads == 1
    roll(running)
    assert running.reloads == 1
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in running.pool.slots] == [2, 2]


@pytest.fixture
def slow(monkeypatch):
    """Run each step of a reload in a separate slice."""
    monkeypatch.setattr(service_module, "in_slices", partial(in_slices, size=0.0, pause=0.1))


def test_workers_are_not_replaced_until_all_settings_are_read(world, slow) -> None:
    running = world()
    running.serve()
    running.reload_steps, running.next_spec = 10, running.specified(2)
    running.send(signal.SIGHUP)
    for _ in range(9):
        running.reactor.advance(0.1)
        assert (running.reloads, len(running.processes)) == (1, 2)
    running.reactor.advance(0.1)
    roll(running)
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in running.pool.slots] == [2, 2]
    assert [word for word in running.notifier.said if word != "EXTEND"] == ["READY", "RELOADING", "READY"]


def test_signals_while_a_reload_reads_settings_cause_one_more_reload(world, slow) -> None:
    running = world()
    running.serve()
    running.reload_steps, running.next_spec = 10, running.specified(2)
    running.send(signal.SIGHUP)
    running.reactor.advance(0.1)
    for _ in range(3):
        running.send(signal.SIGHUP)
    assert running.reloads == 1
    for _ in range(9):
        running.reactor.advance(0.1)
    assert running.reloads == 2
    running.next_spec = running.specified(3)
    for _ in range(10):
        running.reactor.advance(0.1)
    roll(running)
    assert running.reloads == 2
    assert [slot.worker.spec.start(0, 0)["generation"] for slot in running.pool.slots] == [3, 3]


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_stop_while_a_reload_reads_settings_cancels_the_reload(world, slow, turns) -> None:
    running = world()
    processes = running.serve()
    running.reload_steps, running.next_spec = 10, running.specified(2)
    running.send(signal.SIGHUP)
    for _ in range(turns):
        running.reactor.advance(0.1)
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.recorded("task.cancelled", task="reload")
    assert running.notifier.said[-1] == "STOPPING"
    for process in processes:
        process.dies(0)
    running.reactor.advance(5)
    assert running.done == [None]
    assert len(running.processes) == 2


def test_certificates_that_change_during_a_reload_are_reloaded_again(world, slow, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    running = world(1, watched=(str(file),))
    running.serve()
    running.reload_steps = 10
    file.write_text("another")
    running.pass_time(BEAT)
    for _ in range(3):
        running.reactor.advance(0.1)
    assert running.reloads == 1
    file.write_text("and another one")
    running.pass_time(10 * BEAT)
    while running.reloads < 2:
        roll(running)
        running.pass_time(BEAT)
    assert running.reloads == 2


@pytest.mark.parametrize(("count", "seconds"), [(0, 60), (100, 62), (5000, 160)])
def test_start_timeout_of_a_worker_grows_with_its_certificates(world, count, seconds) -> None:
    running = world(2)
    running.listener.certificates = (None,) * count
    running.service.startService()
    running.pass_time(seconds - 1.5)
    assert not any(process.killed for process in running.processes)
    running.pass_time(2)
    assert all(process.killed for process in running.processes)
    assert running.recorded("worker.start_timed_out", seconds=seconds)
    assert ("EXTEND" in running.notifier.said) is (count > 0)


def test_starting_successor_takes_over_the_slot_of_a_worker_that_dies(world) -> None:
    running = world()
    first, second = running.serve()
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    successor = running.processes[-1]
    first.dies(9)
    running.pass_time(1)
    successor.says("ready")
    roll(running)
    running.pass_time(1)
    assert not successor.killed
    assert running.pool.slots[0].worker is successor.protocol
    assert second not in running.alive()
    assert len(running.processes) == 4
    assert running.notifier.said == ["READY", "RELOADING", "READY"]


def test_slot_is_restarted_if_its_worker_and_its_successor_die(world) -> None:
    running = world(1)
    [first] = running.serve()
    running.send(signal.SIGHUP)
    first.dies(9)
    running.processes[-1].dies(9)
    running.pass_time(1)
    running.processes[-1].says("ready")
    assert running.pool.slots[0].ready
    assert len(running.alive()) == 1


def test_stop_ends_a_starting_successor_and_the_current_worker_serves_the_backlog(world) -> None:
    """The successor has copies of the sockets. While they are open, the kernel accepts connections and no other process
    can listen.
    """
    running = world()
    first, second = running.serve()
    running.send(signal.SIGHUP)
    successor = running.processes[2]
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert successor.told[1:] == [("drain", [])]
    assert successor.signals == [signal.SIGTERM]
    for worker in (first, second):
        assert worker.told[1:] == [("drain", ["slot", "own"])]
        assert worker.signals == []


def test_stop_lets_a_starting_worker_alone_in_its_slot_serve_the_backlog(world) -> None:
    running = world(1)
    [first] = running.serve()
    first.dies(9)
    running.pass_time(1)
    running.send(signal.SIGTERM)
    running.reactor.advance(0)
    assert running.processes[-1].told[1:] == [("drain", ["slot", "own"])]
    assert running.processes[-1].signals == []


def test_worker_starting_with_the_old_settings_is_replaced(world) -> None:
    running = world(1)
    [first] = running.serve()
    first.dies(9)
    running.pass_time(1)
    running.next_spec = running.specified(2)
    running.send(signal.SIGHUP)
    assert running.processes[1].told[0][1]["generation"] == 1
    roll(running)
    assert [process.told[0][1]["generation"] for process in running.alive()] == [2]


def test_worker_that_requests_replacement_drains_after_its_successor_is_ready(world) -> None:
    running = world()
    first, second = running.serve()
    first.says("leave")
    first.says("leave")
    assert len(running.processes) == 3
    running.processes[2].says("ready")
    assert first.words() == ["start", "drain"]
    first.says("leave")
    assert len(running.processes) == 3
    assert running.notifier.said == ["READY"]
    first.dies()
    assert running.alive() == [second, running.processes[2]]


def test_changed_certificates_cause_one_reload(world, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    running = world(1, watched=(str(file),))
    running.serve()
    running.pass_time(3)
    assert running.reloads == 0
    file.write_text("another")
    running.pass_time(3)
    assert running.reloads == 1
    roll(running)
    running.pass_time(3)
    assert running.reloads == 1
