"""Buffered output of lines to a file, a pipe or a terminal, without waiting for the reader."""

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

# Seconds that a line may wait for others, so that one system call writes them all. Errors do not wait.
_DELAY = 0.1

# Seconds until what a pipe has not taken is tried again, when it took something the last time.
_RETRY = 0.01

# Characters that are written without waiting any longer: what a pipe holds.
_BATCH = 64 * 1024

# Bytes that are kept for an output that takes none: the records of 10,000 connections that end at once.
_MOST_KEPT = 1024 * 1024

# Seconds until a file that could not be reopened or rotated is tried again: at first, and at most after more failures.
_FIRST_RETRY, _LAST_RETRY = 1.0, 60.0

# Seconds in which one output is reported to fail once: it may fail and recover many times a second.
_QUIET = 10.0

# Seconds that a reader which is behind may take for the last lines of a process.
_LAST_LINES = 1.0

# After these errors the same lines may be written later.
_PASSING = frozenset((errno.EAGAIN, errno.ENOSPC, errno.EDQUOT))

_log = Logger()


class UnavailableError(OSError):
    """An output takes nothing now; the same lines may be written later."""


class Output(Protocol):
    """Where bytes go.

    `write` takes what it can without waiting, gives how many bytes that was, and raises OSError. `reopen` does what
    SIGUSR1 asks for, and raises nothing: while `trouble` is not empty it says what failed, and `retry` tries again.
    `in_place` is whether it is still the file at its path. `fileno` is for waiting.
    """

    title: str
    trouble: str

    def write(self, data: bytearray) -> int: ...
    def reopen(self) -> None: ...
    def retry(self) -> None: ...
    def in_place(self) -> bool: ...
    def fileno(self) -> int: ...


class Stream:
    """A descriptor that is open already, and shared with others: standard output."""

    trouble = ""

    def __init__(self, descriptor: int, title: str) -> None:
        self.title = title
        self._descriptor = self._given = descriptor
        self._socket: socket.socket | None = None
        self._write: Callable[[bytearray], int] = self._write_whole
        mode = os.fstat(descriptor).st_mode
        # O_NONBLOCK would be everybody's who shares the descriptor, so it is not set on that.
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self._write = self._send
        elif stat.S_ISREG(mode):
            # What a shell opened with `>` would be overwritten by others, and have a hole once it is truncated. This is
            # everybody's who shares it, and right for them too; GNU make does the same.
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        else:
            try:
                # A descriptor of our own for the same pipe or terminal (proc(5)).
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
        # Room for so much is what poll(2) looks for in a pipe. Somebody else may take it meanwhile, alas.
        if not wait_for_room(self, 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, data[: select.PIPE_BUF])

    def reopen(self) -> None:
        """Nothing: it has no path."""

    def retry(self) -> None:
        """Nothing: nothing fails."""

    def in_place(self) -> bool:
        """True: it has no path."""
        return True

    def close(self) -> None:
        """Close what was opened here, which is not the descriptor that was given."""
        if self._socket is not None:
            self._socket.close()
        if self._descriptor != self._given:
            os.close(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def say_aside(line: str) -> None:
    """Write a line to standard error, if that takes it without waiting."""
    with contextlib.suppress(OSError):
        stream = Stream(2, "standard error")
        try:
            stream.write(bytearray(line.encode("utf-8", "backslashreplace")))
        finally:
            stream.close()


def wait_for_room(output: Output, seconds: float) -> bool:
    """Whether an output can take something, at the latest after so long."""
    poll = select.poll()
    poll.register(output.fileno(), select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class Report:
    """Whether a failure that lasts is to be reported: once, and not soon after another one."""

    def __init__(self) -> None:
        self._reported = False
        self._quiet_until = -math.inf

    def begin(self, now: float) -> bool:
        """It fails, or still does; gives whether that is to be reported."""
        if self._reported or now < self._quiet_until:
            return False
        self._reported = True
        self._quiet_until = now + _QUIET
        return True

    def end(self) -> bool:
        """It does not fail any more; gives whether that is to be reported."""
        reported, self._reported = self._reported, False
        return reported


class LineWriter:
    """Lines on their way to an output. Nothing that becomes of that is raised, and nothing waits for it.

    From `start` on, while the reactor runs, lines are written some at a time. What an output does not take is kept, up
    to a megabyte, and tried again; beyond that, and when there is no hope, lines are dropped. `dropped` counts them.

    An output that fails is reported as an error in the log, and to `aside`, which takes a line, since the log may be
    what fails. `clock` gives seconds.
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
        self._size = 0  # of those, about
        self._kept = bytearray()
        self._blocked = False  # there was no room
        self._writing = Report()
        self._opening = Report()
        self._counted = 0  # of `dropped`, in the log
        self._flushing = Lock()
        self._reactor: Any = None
        self._thread = 0
        self._waiting = False  # for _tick
        self._asked = False  # to reopen the output
        self._due = False  # to try again what failed of that
        self._retry_call: Any = None
        self._retry_after = _FIRST_RETRY
        atexit.register(self.finish)

    def start(self, reactor: Any) -> None:
        """Write in batches while this reactor runs."""
        reactor.callWhenRunning(self._run, reactor)
        # Before the reactor waits for its threads, which may take as long as they like.
        reactor.addSystemEventTrigger("during", "shutdown", self.finish)

    def _run(self, reactor: Any) -> None:
        self._reactor = reactor
        self._thread = get_ident()

    def put(self, line: str, *, at_once: bool = False) -> None:
        """Have a line written, which ends as lines do. May be called in any thread."""
        self._lines.append(line)
        self._size += len(line)
        if not self._waiting or at_once or self._size >= _BATCH:
            self._wake(at_once or self._size >= _BATCH)

    def _wake(self, at_once: bool) -> None:
        reactor = self._reactor
        if reactor is None:
            self.flush()
        elif get_ident() != self._thread:
            if at_once:  # the reactor may be blocked, and this be what is said about it
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
        """Write what the output takes now."""
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
        """Have the output do what SIGUSR1 asks for."""
        self._asked = True
        self.flush()

    def _write_all(self) -> bool:
        """Write all there is, if nobody does that already; gives whether the last of it was taken."""
        # Another thread, or an object that logs at its end and was found in here by the garbage collector.
        if not self._flushing.acquire(blocking=False):
            return False
        try:
            if self._asked:
                # What was logged before the signal goes to the file that is going to be rotated; but not to one that
                # somebody else has moved, which may be on its way through a compressor.
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
        """Write what there is; gives whether some of it was taken."""
        lines, self._lines, self._size = self._lines, [], 0
        if len(self._kept) < _MOST_KEPT:
            self._kept += "".join(lines).encode("utf-8", "backslashreplace")
        elif lines:
            self.dropped += len(lines)
            self._report_failure("nobody reads it")
        self._blocked = False
        before = len(self._kept)
        try:
            while self._kept:
                del self._kept[: self._output.write(self._kept)]
        except OSError as problem:
            self._blocked = problem.errno == errno.EAGAIN
            if not isinstance(problem, UnavailableError) and problem.errno not in _PASSING:
                self.dropped += self._kept.count(b"\n")
                self._kept.clear()
            if not self._blocked:
                self._report_failure(problem.strerror or str(problem))
            return len(self._kept) < before
        if before:
            # Lines that were dropped are reported, however often that is: it takes a megabyte of them, or no hope.
            count = self.dropped - self._counted
            if self._writing.end() or count:
                self._counted = self.dropped
                _log.warn("{output} is written again; lines dropped: {count}", output=self._output.title, count=count)
        return True

    def _report_failure(self, problem: str) -> None:
        if self._writing.begin(self._clock()):
            self._report("{output} cannot be written: {problem}", problem=problem)

    def _report_trouble(self) -> None:
        """Report that the output could not be reopened, or could be after all."""
        trouble = self._output.trouble
        if trouble:
            if self._opening.begin(self._clock()):
                self._report("{output} {problem}", problem=trouble)
        elif self._opening.end():
            _log.warn("{output} is the file at its path again", output=self._output.title)

    def _report(self, text: str, **fields: str) -> None:
        _log.error(text, output=self._output.title, **fields)
        if self._aside is not None:
            self._aside(f"rtservice: {text.format(output=self._output.title, **fields)}\n")

    def fileno(self) -> int:
        """The descriptor of the output."""
        return self._output.fileno()

    def finish(self) -> None:
        """Write what is left, waiting for a reader that is behind, but not for long. Later lines do not wait."""
        self._reactor = None
        self._waiting = False
        self.flush()
        end = monotonic() + _LAST_LINES
        while self._blocked and wait_for_room(self._output, max(0.0, end - monotonic())):
            self.flush()
