"""Reap orphaned processes in process 1, which inherits all orphans of its PID namespace (pid_namespaces(7)).

Twisted reaps workers and other children of the reactor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from twisted.internet import process
from twisted.internet.task import LoopingCall

from rtservice.process.signals import is_first_process

# Seconds until an ended child is reaped. Hosted code that started the child and polls it needs its status.
PATIENCE = 5.0

# Seconds between two checks. A check is one system call if no child has ended.
_BEAT = 2.0

# `children` in the directory of each thread lists the children that it has started (proc_tid_children(5)).
_TASKS = Path("/proc/self/task")


class Overdue:
    """Finds ended children for which no code has waited within `PATIENCE` seconds."""

    def __init__(self) -> None:
        self._since: dict[int, float] = {}

    def update(self, now: float, ended: Iterable[int]) -> list[int]:
        """Record the ended children that were not waited for at `now`, in seconds. Return those that are overdue."""
        self._since = {pid: self._since.get(pid, now) for pid in ended}
        return [pid for pid, since in self._since.items() if now - since >= PATIENCE]


def _has_ended(kind: int, number: int) -> int:
    """Return the process id of an ended child without reaping it, or 0. Arguments are those of waitid(2)."""
    with suppress(ChildProcessError):
        found = os.waitid(kind, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found.si_pid if found is not None else 0
    return 0


def ended_children() -> Iterator[int]:
    """Yield the process ids of children that ended; without /proc, only one of them."""
    first = _has_ended(os.P_ALL, 0)
    if not first:
        return
    children: set[int] = {first}
    with suppress(OSError):
        for listing in _TASKS.glob("*/children"):
            children.update(map(int, listing.read_text().split()))
    for pid in sorted(children):
        if pid == first or _has_ended(os.P_PID, pid):
            yield pid


class OrphanReaper:
    """Reaps orphans if this is process 1. Twisted reaps its own children, such as workers."""

    def __init__(self, ended: Callable[[], Iterable[int]] = ended_children) -> None:
        self._ended = ended
        self._overdue = Overdue()
        self._beating = LoopingCall(self._beat)

    def start(self, reactor: Any) -> None:
        """Start the checks if this is process 1."""
        if is_first_process():
            self._beating.clock = reactor
            self._beating.start(_BEAT, now=False)

    def stop(self) -> None:
        """Stop the checks."""
        if self._beating.running:
            self._beating.stop()

    def _beat(self) -> None:
        left = [pid for pid in self._ended() if pid not in process.reapProcessHandlers]
        for pid in self._overdue.update(self._beating.clock.seconds(), left):
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
