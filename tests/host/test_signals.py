"""Signals as the parent left them, signals that wait, and signals that are sent twice."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rtservice.host import signals
from rtservice.host.signals import REPEAT, Repeats

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("sent", "count"),
    [
        ([(0.0, TERM), (0.1, TERM)], [True, False]),
        ([(0.0, TERM), (0.0, TERM), (0.0, TERM)], [True, False, False]),
        ([(0.0, TERM), (0.1, INT), (0.2, TERM), (0.3, INT)], [True, True, False, False]),
        ([(0.0, TERM), (REPEAT, TERM)], [True, True]),
        # From the one that counts, or a stream of them would never count again.
        ([(0.0, TERM), (0.3, TERM), (0.6, TERM), (0.9, TERM)], [True, False, True, False]),
        ([(100.0, TERM), (0.0, TERM)], [True, True]),  # the clock was set back
    ],
)
def test_the_same_signal_within_half_a_second_counts_once(sent, count) -> None:
    clock = iter([when for when, _ in sent])
    repeats = Repeats(lambda: next(clock))
    assert [not repeats.is_repeat(number) for _, number in sent] == count


@pytest.fixture
def restored() -> Iterator[None]:
    """Puts the signal mask and the disposition of SIGCHLD back."""
    mask, child = signal.pthread_sigmask(signal.SIG_BLOCK, ()), signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, child)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def blocked() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_a_start_takes_all_signals_that_the_parent_had_blocked(restored) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR2})
    signals.inherit_nothing()
    assert blocked() == set()


def test_children_have_a_status_where_the_parent_ignored_sigchld(restored) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signals.inherit_nothing()
    assert subprocess.run([sys.executable, "-c", "raise SystemExit(7)"], check=False).returncode == 7


def test_what_is_held_waits_and_is_not_lost(restored) -> None:
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in (TERM, INT)}
    try:
        signals.hold()
        for number in (TERM, INT):
            signal.raise_signal(number)
        assert came == []
        signals.release()
        assert sorted(came) == [INT, TERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("pid", "command", "held"),
    [
        (1, ["twistd", "-n", "rtservice", "--port=80"], True),
        (1, ["twistd", "web"], False),
        (2, ["twistd", "rtservice"], False),
    ],
)
def test_process_1_holds_signals_from_the_first_import_on(restored, monkeypatch, pid, command, held) -> None:
    monkeypatch.setattr("os.getpid", lambda: pid)
    monkeypatch.setattr("sys.argv", command)
    signals.hold_in_first_process()
    signals.inherit_nothing()
    assert ({TERM, INT, signal.SIGHUP} <= blocked()) is held
    assert blocked() if held else not blocked()
