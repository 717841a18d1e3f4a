"""Workers that send no heartbeat, and a supervisor that was stopped itself."""

import signal

from rtservice.pool.control import BEAT


def test_worker_without_heartbeat_dumps_its_stack_and_is_killed(world) -> None:
    one = world()
    first, second = one.serve()
    one.pass_time(29, silent=(second,))
    assert second.signals == []
    one.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2]
    assert one.recorded("worker.hung", seconds=30.0)
    second.writes(b'  File "x.py", line 1 in loop\n', 2)
    one.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2, signal.SIGKILL]
    assert first.signals == []
    second.dies(9)
    one.pass_time(1)
    one.processes[-1].says("ready")
    assert one.pool.slots[1].ready
    assert one.recorded("worker.printed_error", line='  File "x.py", line 1 in loop')


def test_worker_that_hangs_while_draining_is_killed(world) -> None:
    one = world(drain_timeout=1000.0)
    one.serve()
    one.send(signal.SIGTERM)
    one.pass_time(30, silent=tuple(one.processes))
    assert all(process.signals == [signal.SIGUSR2] for process in one.processes)
    one.pass_time(1, silent=tuple(one.processes))
    assert all(process.killed for process in one.processes)


def test_without_a_hang_timeout_no_worker_is_killed_for_a_missing_heartbeat(world) -> None:
    one = world(hang_timeout=0.0)
    one.serve()
    one.pass_time(500, silent=tuple(one.processes))
    assert all(process.signals == [] for process in one.processes)
    assert one.notifier.signs > 490


def test_supervisor_that_was_suspended_kills_no_worker(world) -> None:
    one = world()
    first, second = one.serve()
    second.dies(9)
    one.pass_time(1)
    starting = one.processes[-1]
    one.reactor.advance(1000)
    assert first.signals == starting.signals == []
    one.pass_time(20)
    starting.says("ready")
    one.pass_time(100)
    assert first.signals == starting.signals == []


def test_watchdog_is_not_notified_while_a_hung_worker_cannot_be_killed(world) -> None:
    one = world()
    first, _ = one.serve()
    one.pass_time(50, silent=(first,))
    assert one.notifier.signs >= 50
    one.pass_time(10, silent=(first,))
    before = one.notifier.signs
    one.pass_time(50, silent=(first,))
    assert one.notifier.signs == before


def test_failing_periodic_check_is_logged_and_workers_are_still_checked(world, monkeypatch) -> None:
    one = world()
    _, second = one.serve()
    monkeypatch.setattr(one.notifier, "status", lambda text: 1 / 0)
    one.reactor.advance(BEAT)
    monkeypatch.undo()
    assert [event.pop("log_failure").type for event in one.events if "log_failure" in event] == [ZeroDivisionError]
    one.pass_time(32, silent=(second,))
    assert second.killed
