"""A change is tried in a child process, and this one stays as it is."""

import atexit
import os
import signal

import pytest

from rtservice.startup.dry_run import problem_of


def test_a_change_that_succeeds_has_no_problem_and_changes_nothing_here(tmp_path) -> None:
    before = os.getcwd()
    assert problem_of(lambda: os.chdir(tmp_path)) is None
    assert os.getcwd() == before


def test_a_problem_is_what_the_change_says() -> None:
    assert problem_of(lambda: "--chroot ⟨/x⟩: nö") == "--chroot ⟨/x⟩: nö"


def test_a_long_problem_is_cut_and_waits_for_nobody() -> None:
    assert problem_of(lambda: "x" * 1_000_000) == "x" * 4096


@pytest.mark.parametrize("error", [OSError(1, "no"), SystemExit(3), KeyboardInterrupt(), ZeroDivisionError("zero")])
def test_what_a_change_raises_is_a_problem(error) -> None:
    def change() -> None:
        raise error

    assert problem_of(change) == f"{type(error).__name__}: {error}"


def test_a_child_that_is_killed_is_a_problem() -> None:
    assert (
        problem_of(lambda: os.kill(os.getpid(), signal.SIGKILL)) == "the child process that tried the change was killed"
    )


def test_children_that_nobody_waits_for_answer_too() -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as some parents leave it to what they start
    try:
        assert problem_of(lambda: "no") == "no"
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_no_exit_handler_runs_and_no_descriptor_stays(tmp_path) -> None:
    atexit.register(handler := lambda: (tmp_path / "ran").touch())
    before = sorted(os.listdir("/proc/self/fd"))
    problem_of(lambda: None)
    atexit.unregister(handler)
    assert not (tmp_path / "ran").exists()
    assert sorted(os.listdir("/proc/self/fd")) == before
