"""Hold signals during a start, accept those that the parent blocked, and ignore repeats of a stop signal."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# Seconds within which the same signal is a repeat: one stop is often sent twice, by a service manager to a control
# group, or by a terminal to a process group and by a wrapper to this process.
REPEAT = 0.5

# What has a handler once the service runs.
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU)
_STOPS = frozenset((signal.SIGTERM, signal.SIGINT))

_before: dict[int, Any] = {}  # the handlers that `hold` has replaced
_waiting: list[int] = []
_stops = 0


def hold() -> None:
    """Have the signals that the service handles wait, until `release`.

    From the first socket on: what would otherwise end the process leaves files behind. They wait in a handler and are
    not blocked, since processes that hosted code starts meanwhile would inherit that, and a start that hangs could be
    ended by SIGKILL alone: a second stop ends it here, and a third one at once.
    """
    for number in _HANDLED:
        if number not in _before:
            _before[number] = signal.signal(number, _wait)


def handler(number: int) -> Any:
    """The handler of a signal, as signal.getsignal gives it; while it is held, the one that `release` restores."""
    current = signal.getsignal(number)
    return _before[number] if current is _wait else current


def _wait(number: int, frame: object) -> None:
    global _stops
    if number in _STOPS and not _repeats.is_repeat(number):
        _stops += 1
    if _stops > 2:
        os._exit(128 + number)
    if _stops == 2:
        raise SystemExit(128 + number)
    if number not in _waiting:
        _waiting.append(number)


def release() -> None:
    """Take the signals that the service handles: those that waited, and those that are blocked."""
    global _stops
    for number, handler in _before.items():
        if signal.getsignal(number) is _wait:
            signal.signal(number, handler)
    waiting = [number for number in _waiting if signal.getsignal(number) is not signal.SIG_DFL]
    _before.clear()
    _waiting.clear()
    _stops = 0
    # Not all: hosted code may have blocked others since, to wait for them in a thread (sigwait(3)).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    for number in waiting:
        signal.raise_signal(number)


def inherit_nothing() -> None:
    """Undo what the parent did to signals: those blocked, and SIGCHLD ignored, which loses the status of each child."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def is_first_process() -> bool:
    """Whether this is process 1 of its PID namespace, as in most containers (pid_namespaces(7)).

    It gets no signal that it has no handler for, and the orphans of all other processes.
    """
    return os.getpid() == 1


def hold_in_first_process() -> None:
    """In process 1, `hold` from now on: its signals are not dropped then. Elsewhere a stop ends the process at once."""
    if is_first_process() and "rtservice" in sys.argv:  # of twistd or twist, and no other program that imports it
        hold()


class Repeats:
    """Tells a signal that counts from one that is sent again within `REPEAT` seconds of it. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counted: dict[int, float] = {}  # when, by signal

    def is_repeat(self, number: int) -> bool:
        """Return whether this signal, which has just come, is a repeat; if not, it counts from now."""
        now = self._clock()
        last = self._counted.get(number)
        if last is not None and 0 <= now - last < REPEAT:  # a clock may be set back
            return True
        self._counted[number] = now
        return False


_repeats = Repeats(time.monotonic)
