"""Buffered output of lines to a file, pipe or terminal that never blocks on the reader."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import math
import os
import select
import socket
import stat
from collections.abc import Callable
from threading import Lock, get_ident
from time import monotonic
from typing import Any, Protocol

from twisted.logger import Logger

from rtservice.events import OUTPUT_FAILED, OUTPUT_NOT_REPLACED, OUTPUT_RECOVERED, OUTPUT_REPLACED, Event

# Seconds that a line may wait for others, to be written with one system call. Errors do not wait.
_DELAY = 0.1

# Seconds until the next attempt to write to a pipe that accepted only a part.
_RETRY = 0.01

# Characters that are written without further delay: the capacity of a pipe.
_BATCH = 64 * 1024

# Bytes that are kept for a blocked output: the log records of 10,000 connections that end at once.
_MOST_KEPT = 1024 * 1024

# Seconds until the next attempt to reopen or rotate a file: after the first failure, and at most.
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0

# Seconds between two reports of a failing output: it may fail and recover many times a second.
_QUIET = 10.0

# Seconds to wait for a slow reader at the end of the process.
_LAST_LINES = 1.0

# After these errors the same lines may be written later.
_PASSING = frozenset((errno.EAGAIN, errno.ENOSPC, errno.EDQUOT))

_log = Logger()


class OutputUnavailableError(OSError):
    """An output accepts nothing now. The same lines can be written later."""


class Output(Protocol):
    """Destination of bytes.

    `write` writes as much as possible without blocking, and returns the number of bytes. It raises OSError. `reopen`
    handles SIGUSR1, and raises nothing: `trouble` is the error of the last attempt, empty if it succeeded, and `retry`
    tries again. `in_place` returns whether the open file is still the one at its path. `fileno` returns a descriptor
    for poll(2).
    """

    title: str
    trouble: str

    def write(self, data: bytearray) -> int: ...
    def reopen(self) -> None: ...
    def retry(self) -> None: ...
    def in_place(self) -> bool: ...
    def fileno(self) -> int: ...


class Stream:
    """Output to an open descriptor that is shared with other processes: standard output."""

    trouble = ""

    def __init__(self, descriptor: int, title: str) -> None:
        self.title = title
        self._descriptor = self._given = descriptor
        self._socket: socket.socket | None = None
        self._write: Callable[[bytearray], int] = self._write_whole
        mode = os.fstat(descriptor).st_mode
        # O_NONBLOCK would apply to all processes that share the descriptor, so it is not set.
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self._write = self._send
        elif stat.S_ISREG(mode):
            # Without O_APPEND, processes that share a file opened with `>` overwrite each other, and truncation leaves
            # a hole. The flag applies to all of them, and is right for all; GNU make does the same.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        else:
            try:
                # A new open file description of the same pipe or terminal (proc(5)), which is not shared.
                self._descriptor = os.open(
                    f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                )
            except OSError:  # no /proc, or it was opened by another user
                self._write = self._write_if_there_is_room

    def write(self, data: bytearray) -> int:
        return self._write(data)

    def _write_whole(self, data: bytearray) -> int:
        return os.write(self._descriptor, data)

    def _send(self, data: bytearray) -> int:
        assert self._socket is not None
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def _write_if_there_is_room(self, data: bytearray) -> int:
        # poll(2) reports a pipe as writable if it has room for PIPE_BUF bytes. Another process may fill it meanwhile.
        if not wait_for_room(self, 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, data[: select.PIPE_BUF])

    def reopen(self) -> None:
        """Do nothing: a stream has no path."""

    def retry(self) -> None:
        """Do nothing: `reopen` cannot fail."""

    def in_place(self) -> bool:
        """Return True: a stream has no path."""
        return True

    def close(self) -> None:
        """Close descriptors that this object opened. The given descriptor stays open."""
        if self._socket is not None:
            self._socket.close()
        if self._descriptor != self._given:
            os.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def write_to_stderr(line: str) -> None:
    """Write a line to standard error, unless that would block."""
    with contextlib.suppress(OSError):
        stream = Stream(2, "standard error")
        try:
            stream.write(bytearray(line.encode("utf-8", "backslashreplace")))
        finally:
            stream.close()


def wait_for_room(output: Output, seconds: float) -> bool:
    """Wait until an output is writable, for at most this many seconds. Return whether it is."""
    poll = select.poll()
    poll.register(output.fileno(), select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class Report:
    """Decides whether to report a lasting failure: once, and not within `_QUIET` seconds of another."""

    def __init__(self) -> None:
        self._reported = False
        self._quiet_until = -math.inf

    def begin(self, now: float) -> bool:
        """Record a failure at the time `now` in seconds. Return whether to report it."""
        if self._reported or now < self._quiet_until:
            return False
        self._reported = True
        self._quiet_until = now + _QUIET
        return True

    def end(self) -> bool:
        """Record a recovery. Return whether to report it."""
        reported, self._reported = self._reported, False
        return reported


class LineWriter:
    """Writes lines to an output without blocking and without raising exceptions.

    After `start`, while the reactor runs, lines are written in batches. Lines that the output does not accept are kept,
    up to 1 MiB, and written later. Beyond that, and after an error that is not temporary, lines are dropped. `dropped`
    counts them.

    A failing output is reported as an error in the log, and to `aside`, which is called with a line, since the log may
    be the failing output. `clock` returns seconds.
    """

    def __init__(
        self,
        output: Output,
        *,
        aside: Callable[[str], None] | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.dropped = 0
        self._output = output
        self._aside = aside
        self._clock = clock
        self._lines: list[str] = []
        self._size = 0  # approximate bytes in `_lines`
        self._kept = bytearray()
        self._blocked = False  # the output had no room
        self._writing = Report()
        self._opening = Report()
        self._counted = 0  # the part of `dropped` that was logged
        self._flushing = Lock()
        self._reactor: Any = None
        self._thread = 0
        self._waiting = False  # a call of _tick is scheduled
        self._asked = False  # a reopen is requested
        self._due = False  # a retry of a failed reopen is due
        self._retry_call: Any = None
        self._retry_after = _FIRST_RETRY
        atexit.register(self.finish)

    def start(self, reactor: Any) -> None:
        """Write in batches while this reactor runs."""
        reactor.callWhenRunning(self._run, reactor)
        # Before the reactor waits for its threads, which may take any time.
        reactor.addSystemEventTrigger("during", "shutdown", self.finish)

    def _run(self, reactor: Any) -> None:
        self._reactor = reactor
        self._thread = get_ident()

    def put(self, line: str, *, at_once: bool = False) -> None:
        """Write a line, which ends with a line feed. With `at_once`, do not wait for others. Thread-safe."""
        self._lines.append(line)
        self._size += len(line)
        if not self._waiting or at_once or self._size >= _BATCH:
            self._wake(at_once or self._size >= _BATCH)

    def _wake(self, at_once: bool) -> None:
        reactor = self._reactor
        if reactor is None:
            self.flush()
        elif get_ident() != self._thread:
            if at_once:  # the reactor may be blocked, and the line may report that
                self._write_all()
            reactor.callFromThread(self.flush)
        elif at_once:
            self.flush()
        else:
            self._waiting = True
            reactor.callLater(_DELAY, self._tick)

    def _tick(self) -> None:
        self._waiting = False
        self.flush()

    def flush(self) -> None:
        """Write what the output accepts now."""
        moved = self._write_all()
        if self._reactor is None:
            return
        if (self._kept or self._lines or self._asked) and not self._waiting:
            self._waiting = True
            self._reactor.callLater(_RETRY if moved else _DELAY, self._tick)
        if not self._output.trouble:
            self._retry_after = _FIRST_RETRY
        elif self._retry_call is None:
            self._retry_call = self._reactor.callLater(self._retry_after, self._retry)
            self._retry_after = min(2 * self._retry_after, _LAST_RETRY)

    def _retry(self) -> None:
        self._retry_call = None
        self._due = True
        self.flush()

    def reopen(self) -> None:
        """Reopen the output, for SIGUSR1."""
        self._asked = True
        self.flush()

    def _write_all(self) -> bool:
        """Write all lines, unless another call does. Return whether the output accepted something at last."""
        # The lock is held by another thread, or below on the stack: the garbage collector may run a destructor that
        # logs.
        if not self._flushing.acquire(blocking=False):
            return False
        try:
            if self._asked:
                # Lines logged before the signal go to the file that is rotated now, but not to one that another program
                # has moved and may compress.
                if self._output.in_place():
                    self._write()
                self._asked = self._due = False
                self._output.reopen()
            elif self._due:
                self._due = False
                self._output.retry()
            moved = self._write()
            self._report_trouble()
            while self._lines and not self._kept:
                moved = self._write()
                self._report_trouble()
        finally:
            self._flushing.release()
        return moved

    def _write(self) -> bool:
        """Write the lines once. Return whether the output accepted something."""
        lines, self._lines, self._size = self._lines, [], 0
        if len(self._kept) < _MOST_KEPT:
            self._kept += "".join(lines).encode("utf-8", "backslashreplace")
        elif lines:
            self.dropped += len(lines)
            self._report_failure("the reader is too slow")
        self._blocked = False
        before = len(self._kept)
        try:
            while self._kept:
                del self._kept[: self._output.write(self._kept)]
        except OSError as problem:
            self._blocked = problem.errno == errno.EAGAIN
            if not isinstance(problem, OutputUnavailableError) and problem.errno not in _PASSING:
                self.dropped += self._kept.count(b"\n")
                self._kept.clear()
            if not self._blocked:
                self._report_failure(problem.strerror or str(problem))
            return len(self._kept) < before
        if before:
            # Dropped lines are always reported: they are rare, after 1 MiB of kept lines or a permanent error.
            count = self.dropped - self._counted
            if self._writing.end() or count:
                self._counted = self.dropped
                OUTPUT_RECOVERED.log(_log, output=self._output.title, count=count)
        return True

    def _report_failure(self, problem: str) -> None:
        if self._writing.begin(self._clock()):
            OUTPUT_FAILED.log(_log, output=self._output.title, problem=problem)
            self._say(OUTPUT_FAILED, problem)

    def _report_trouble(self) -> None:
        """Report that the output could not be reopened, or that a retry succeeded."""
        trouble = self._output.trouble
        if trouble:
            if self._opening.begin(self._clock()):
                OUTPUT_NOT_REPLACED.log(_log, output=self._output.title, problem=trouble)
                self._say(OUTPUT_NOT_REPLACED, trouble)
        elif self._opening.end():
            OUTPUT_REPLACED.log(_log, output=self._output.title)

    def _say(self, event: Event, problem: str) -> None:
        """Write the text of an event aside, since the log may be what fails."""
        if self._aside is not None:
            self._aside(f"rtservice: {event.text.format(output=self._output.title, problem=problem)}\n")

    def fileno(self) -> int:
        """Return the descriptor of the output."""
        return self._output.fileno()

    def finish(self) -> None:
        """Write the remaining lines. Waits up to a second for a slow reader. Later lines are written at once."""
        self._reactor = None
        self._waiting = False
        self.flush()
        end = monotonic() + _LAST_LINES
        while self._blocked and wait_for_room(self._output, max(0.0, end - monotonic())):
            self.flush()
