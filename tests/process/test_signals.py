"""Inherited signal dispositions, held signals and repeated signals."""

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from rtservice.process import signals
from rtservice.process.signals import REPEAT, Repeats

TERM, INT = signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(
    ("sent", "count"),
    [
        ([(0.0, TERM), (0.1, TERM)], [True, False]),
        ([(0.0, TERM), (0.0, TERM), (0.0, TERM)], [True, False, False]),
        ([(0.0, TERM), (0.1, INT), (0.2, TERM), (0.3, INT)], [True, True, False, False]),
        ([(0.0, TERM), (REPEAT, TERM)], [True, True]),
        # Measured from the last signal that counted; otherwise a stream of signals would never count again.
        ([(0.0, TERM), (0.3, TERM), (0.6, TERM), (0.9, TERM)], [True, False, True, False]),
        ([(100.0, TERM), (0.0, TERM)], [True, True]),  # the clock was set back
    ],
)
def test_same_signal_within_half_a_second_counts_once(sent, count) -> None:
    clock = iter([when for when, _ in sent])
    repeats = Repeats(lambda: next(clock))
    assert [not repeats.is_repeat(number) for _, number in sent] == count


@pytest.fixture(autouse=True)
def restored_signals(monkeypatch) -> Iterator[None]:
    """Restore the signal mask and the handlers."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    numbers = (signal.SIGCHLD, *signals._HANDLED)
    before = {number: signal.getsignal(number) for number in numbers}
    for name, value in (("_before", {}), ("_waiting", []), ("_stops", 0)):
        monkeypatch.setattr(signals, name, value)
    monkeypatch.setattr(signals, "_repeats", Repeats(lambda: 0.0))
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.fixture
def received() -> list[int]:
    """The signals received by handlers of SIGTERM, SIGINT and SIGHUP."""
    received: list[int] = []
    for number in (TERM, INT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def blocked() -> set[int]:
    return set(signal.pthread_sigmask(signal.SIG_BLOCK, ()))


def test_signals_blocked_by_the_parent_are_unblocked_at_the_start() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR2})
    signals.reset_inherited_signals()
    assert blocked() == set()


def test_children_have_an_exit_status_if_the_parent_ignored_sigchld() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signals.reset_inherited_signals()
    assert subprocess.run([sys.executable, "-c", "raise SystemExit(7)"], check=False).returncode == 7


def test_held_signals_are_delivered_after_release(received) -> None:
    signals.hold()
    signals.hold()  # process 1 calls it twice
    for number in (TERM, signal.SIGHUP, signal.SIGHUP):
        signal.raise_signal(number)
    assert received == []
    signals.release()
    assert received == [TERM, signal.SIGHUP]
    signal.raise_signal(TERM)
    assert received == [TERM, signal.SIGHUP, TERM]


def test_handler_set_while_signals_are_held_stays_and_receives_the_held_signal() -> None:
    received: list[int] = []
    signals.hold()
    signal.raise_signal(INT)
    signal.signal(INT, lambda number, frame: received.append(number))
    signals.release()
    assert received == [INT]


def test_default_action_of_an_unhandled_signal_is_restored_and_not_executed() -> None:
    signal.signal(signal.SIGTTIN, signal.SIG_DFL)
    signals.hold()
    signal.raise_signal(signal.SIGTTIN)
    signals.release()
    assert signal.getsignal(signal.SIGTTIN) is signal.SIG_DFL


def test_signals_blocked_by_hosted_code_stay_blocked() -> None:
    signals.hold()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGRTMIN, TERM})
    signals.release()
    assert blocked() == {signal.SIGUSR2, signal.SIGRTMIN}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP, TERM])
def test_handler_of_hosted_code_is_returned_while_its_signal_is_held(number) -> None:
    def first(number: int, frame: object) -> None: ...

    def second(number: int, frame: object) -> None: ...

    signal.signal(number, first)
    assert signals.handler(number) is first
    signals.hold()
    assert signals.handler(number) is first
    signal.signal(number, second)  # hosted code may do this in process 1, where signals are held before its import
    assert signals.handler(number) is second
    signals.release()
    assert signals.handler(number) is second


def test_child_started_while_signals_are_held_receives_signals() -> None:
    signals.hold()
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    child.stdout.readline()
    child.terminate()
    assert child.wait(30) == -TERM
    child.communicate()


@pytest.mark.parametrize(
    ("stops", "status"),
    [
        ([(0.0, TERM)], None),
        ([(0.0, TERM), (0.1, TERM), (0.2, TERM)], None),
        ([(0.0, TERM), (1.0, TERM)], 128 + TERM),
        ([(0.0, TERM), (0.1, INT)], 128 + INT),
    ],
)
def test_second_stop_signal_ends_a_start_that_hangs(received, monkeypatch, stops, status) -> None:
    times = iter([when for when, _ in stops])
    monkeypatch.setattr(signals, "_repeats", Repeats(lambda: next(times)))
    signals.hold()
    ended = None
    try:
        for _, number in stops:
            signal.raise_signal(number)
    except SystemExit as end:
        ended = end.code
    assert (ended, received) == (status, [])


@pytest.mark.parametrize(
    ("pid", "command", "held"),
    [
        (1, ["twistd", "-n", "rtservice", "--port=80"], True),
        (1, ["twistd", "web"], False),
        (2, ["twistd", "rtservice"], False),
    ],
)
def test_process_1_holds_signals_from_the_first_import(received, monkeypatch, pid, command, held) -> None:
    monkeypatch.setattr("os.getpid", lambda: pid)
    monkeypatch.setattr("sys.argv", command)
    signals.hold_in_first_process()
    signals.reset_inherited_signals()
    signal.raise_signal(TERM)
    assert received == ([] if held else [TERM])
