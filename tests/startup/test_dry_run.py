"""A change is tried in a child process and does not affect this one."""

import atexit
import os
import signal

import pytest

from rtservice.startup.dry_run import problem_of


def test_successful_change_has_no_problem_and_does_not_affect_this_process(tmp_path) -> None:
    before = os.getcwd()
    assert problem_of(lambda: os.chdir(tmp_path)) is None
    assert os.getcwd() == before


def test_problem_is_the_text_that_the_change_returns() -> None:
    assert problem_of(lambda: "--chroot ⟨/x⟩: nö") == "--chroot ⟨/x⟩: nö"


def test_long_problem_is_truncated_without_blocking() -> None:
    assert problem_of(lambda: "x" * 1_000_000) == "x" * 4096


@pytest.mark.parametrize("error", [OSError(1, "no"), SystemExit(3), KeyboardInterrupt(), ZeroDivisionError("zero")])
def test_exception_in_the_change_is_a_problem(error) -> None:
    def change() -> None:
        raise error

    assert problem_of(change) == f"{type(error).__name__}: {error}"


def test_killed_child_process_is_a_problem() -> None:
    assert (
        problem_of(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "the child process that tried the change was killed"
    )


def test_problem_is_returned_while_sigchld_is_ignored() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # some parents leave SIGCHLD ignored
    try:
        assert problem_of(lambda: "no") == "no"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_exit_handler_runs_and_no_descriptor_leaks(tmp_path) -> None:
    atexit.register(handler := lambda: (tmp_path / "ran").touch())
    before = sorted(os.listdir("/proc/self/fd"))
    problem_of(lambda: None)
    atexit.unregister(handler)
    assert not (tmp_path / "ran").exists()
    assert sorted(os.listdir("/proc/self/fd")) == before
