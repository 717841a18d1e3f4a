"""Hold signals during a start, unblock those that the parent blocked, and ignore repeats of a stop signal."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

# Seconds within which the same signal is a repeat. A stop signal is often sent twice: by a service manager to a control
# group, or by a terminal to a process group and by a wrapper to this process.
REPEAT = 0.5

# The signals with a handler once the service runs.
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU)
_STOPS = frozenset((signal.SIGTERM, signal.SIGINT))

_before: dict[int, Any] = {}  # the handlers that `hold` has replaced
_waiting: list[int] = []
_stops = 0


def hold() -> None:
    """Hold the signals that the service handles until `release`.

    Called before the first socket is bound: a signal that ends the process then would leave files behind. The signals
    are held by a handler and not blocked: processes that hosted code starts would inherit the mask, and only SIGKILL
    could end a start that hangs. A second stop signal ends the start, a third one ends the process at once.
    """
    for number in _HANDLED:
        if number not in _before:
            _before[number] = signal.signal(number, _wait)


def handler(number: int) -> Any:
    """Return the handler of a signal as signal.getsignal does; while it is held, the one that `release` restores."""
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
    """Restore the handlers, unblock the signals that the service handles, and raise those that were held."""
    global _stops
    for number, handler in _before.items():
        if signal.getsignal(number) is _wait:
            signal.signal(number, handler)
    waiting = [number for number in _waiting if signal.getsignal(number) is not signal.SIG_DFL]
    _before.clear()
    _waiting.clear()
    _stops = 0
    # Only these: hosted code may have blocked others meanwhile, to wait for them in a thread (sigwait(3)).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    for number in waiting:
        signal.raise_signal(number)


def reset_inherited_signals() -> None:
    """Unblock all signals, and reset an ignored SIGCHLD, which would lose the exit status of children."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def is_first_process() -> bool:
    """Return whether this is process 1 of its PID namespace, as in most containers (pid_namespaces(7)).

    Process 1 receives no signal without a handler, and inherits the orphans of all other processes.
    """
    return os.getpid() == 1


def hold_in_first_process() -> None:
    """Call `hold` in process 1, which would lose signals. In other processes a stop signal ends the process."""
    if is_first_process() and "rtservice" in sys.argv:  # twistd or twist, and not another program that imports this
        hold()


class Repeats:
    """Detects signals that are sent again within `REPEAT` seconds. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._counted: dict[int, float] = {}  # time of the last signal that counted, by number

    def is_repeat(self, number: int) -> bool:
        """Return whether the signal received now is a repeat. If it is not, the period of `REPEAT` starts again."""
        now = self._clock()
        last = self._counted.get(number)
        if last is not None and 0 <= now - last < REPEAT:  # a clock may be set back
            return True
        self._counted[number] = now
        return False


_repeats = Repeats(time.monotonic)
