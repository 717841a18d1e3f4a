"""Process 1 reaps orphans, and leaves other children to their parent."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from twisted.internet import process
from twisted.internet.task import Clock

from rtservice.process import orphans
from rtservice.process.orphans import PATIENCE, OrphanReaper, Overdue, ended_children


def test_ended_child_is_overdue_after_the_patience_time() -> None:
    overdue = Overdue()
    assert overdue.update(0, [5]) == []
    assert overdue.update(PATIENCE - 1, [5, 6]) == []
    assert overdue.update(PATIENCE, [5, 6]) == [5]
    assert overdue.update(2 * PATIENCE - 1, [6]) == [6]


def test_reused_pid_of_a_reaped_child_is_timed_from_the_start() -> None:
    overdue = Overdue()
    overdue.update(0, [5])
    overdue.update(1, [])
    assert overdue.update(PATIENCE, [5]) == []
    assert overdue.update(2 * PATIENCE, [5]) == [5]


@pytest.fixture
def ended_child() -> Iterator[Callable[[], int]]:
    """Return a function that starts a child and returns its pid once it has ended, before it is reaped."""
    made: list[int] = []

    def make(status: int = 0) -> int:
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", f"raise SystemExit({status})"], os.environ)
        made.append(pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return pid

    yield make
    for pid in made:
        if not is_reaped(pid):
            os.waitpid(pid, 0)


def is_reaped(pid: int) -> bool:
    """Return whether a child has been reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False


@pytest.fixture
def reaper(monkeypatch) -> Iterator[Clock]:
    """The clock of an OrphanReaper that treats this process as process 1."""
    monkeypatch.setattr(orphans, "is_first_process", lambda: True)
    clock = Clock()
    orphan_reaper = OrphanReaper()
    orphan_reaper.start(clock)
    yield clock
    orphan_reaper.stop()
    assert clock.getDelayedCalls() == []


def pass_time(clock: Clock, seconds: float) -> None:
    clock.pump([1.0] * int(seconds))


def test_orphans_are_reaped_after_the_patience_time(reaper, ended_child) -> None:
    children = [ended_child(), ended_child(1), ended_child(2)]
    assert set(children) <= set(ended_children())
    pass_time(reaper, PATIENCE - 1)
    assert not any(map(is_reaped, children))
    pass_time(reaper, PATIENCE + 1)
    assert all(map(is_reaped, children))


def test_without_proc_orphans_are_reaped_one_at_a_time(reaper, ended_child, monkeypatch, tmp_path) -> None:
    children = [ended_child(), ended_child()]
    monkeypatch.setattr(orphans, "_TASKS", tmp_path / "missing")
    pass_time(reaper, 3 * PATIENCE + 3)
    assert all(map(is_reaped, children))


def test_exit_status_of_a_child_of_twisted_is_left_to_twisted(reaper, ended_child, monkeypatch) -> None:
    worker, orphan = ended_child(7), ended_child()
    monkeypatch.setitem(process.reapProcessHandlers, worker, object())
    pass_time(reaper, 3 * PATIENCE)
    assert is_reaped(orphan)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7


def test_running_child_is_not_reaped(reaper) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        pass_time(reaper, 3 * PATIENCE)
        living.send_signal(signal.SIGKILL)
        assert living.wait() == -signal.SIGKILL


def test_hosted_code_can_read_an_exit_status_within_the_patience_time(reaper) -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as polled:
        os.waitid(os.P_PID, polled.pid, os.WEXITED | os.WNOWAIT)
        pass_time(reaper, PATIENCE - 1)
        assert polled.poll() == 7


def test_only_process_1_reaps_orphans(ended_child) -> None:
    clock = Clock()
    OrphanReaper().start(clock)
    assert clock.getDelayedCalls() == []


def test_process_without_children_has_no_ended_children() -> None:
    assert list(ended_children()) == []
