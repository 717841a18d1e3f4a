"""Workers that send no heartbeat, and a supervisor that was suspended."""

import signal

from rtservice.pool.control import BEAT


def test_worker_without_heartbeat_dumps_its_stack_and_is_killed(world) -> None:
    running = world()
    first, second = running.serve()
    running.pass_time(29, silent=(second,))
    assert second.signals == []
    running.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2]
    assert running.recorded("worker.hung", seconds=30.0)
    second.writes(b'  File "x.py", line 1 in loop\n', 2)
    running.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2, signal.SIGKILL]
    assert first.signals == []
    second.dies(9)
    running.pass_time(1)
    running.processes[-1].says("ready")
    assert running.pool.slots[1].ready
    assert running.recorded("worker.printed_error", line='  File "x.py", line 1 in loop')


def test_worker_that_hangs_while_draining_is_killed(world) -> None:
    running = world(drain_timeout=1000.0)
    running.serve()
    running.send(signal.SIGTERM)
    running.pass_time(30, silent=tuple(running.processes))
    assert all(process.signals == [signal.SIGUSR2] for process in running.processes)
    running.pass_time(1, silent=tuple(running.processes))
    assert all(process.killed for process in running.processes)


def test_without_a_hang_timeout_no_worker_is_killed_for_a_missing_heartbeat(world) -> None:
    running = world(hang_timeout=0.0)
    running.serve()
    running.pass_time(500, silent=tuple(running.processes))
    assert all(process.signals == [] for process in running.processes)
    assert running.notifier.signs > 490


def test_supervisor_that_was_suspended_kills_no_worker(world) -> None:
    running = world()
    first, second = running.serve()
    second.dies(9)
    running.pass_time(1)
    starting = running.processes[-1]
    running.reactor.advance(1000)
    assert first.signals == starting.signals == []
    running.pass_time(20)
    starting.says("ready")
    running.pass_time(100)
    assert first.signals == starting.signals == []


def test_watchdog_is_not_notified_while_a_hung_worker_cannot_be_killed(world) -> None:
    running = world()
    first, _ = running.serve()
    running.pass_time(50, silent=(first,))
    assert running.notifier.signs >= 50
    running.pass_time(10, silent=(first,))
    before = running.notifier.signs
    running.pass_time(50, silent=(first,))
    assert running.notifier.signs == before


def test_failing_periodic_check_is_logged_and_workers_are_still_checked(world, monkeypatch) -> None:
    running = world()
    _, second = running.serve()
    monkeypatch.setattr(running.notifier, "status", lambda text: 1 / 0)
    running.reactor.advance(BEAT)
    monkeypatch.undo()
    assert [event.pop("log_failure").type for event in running.events if "log_failure" in event] == [ZeroDivisionError]
    running.pass_time(32, silent=(second,))
    assert second.killed
