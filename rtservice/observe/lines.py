"""Lines of text to a file, a pipe or a terminal: in batches, and in nobody's way, whatever becomes of the other end."""

from __future__ import annotations

import atexit
import errno
import os
import select
import socket
import stat
from collections.abc import Callable
from threading import Lock, get_ident
from time import monotonic
from typing import Any, Protocol

from twisted.logger import Logger
from twisted.python.logfile import LogFile

# Seconds that a line may wait for others, so that one system call writes them all. Errors do not wait.
_DELAY = 0.1

# Seconds until what a pipe has not taken is tried again, when it took something the last time.
_RETRY = 0.01

# Characters that are written without waiting any longer: what a pipe holds.
_BATCH = 64 * 1024

# Bytes that are kept for an output that takes none: the records of 10,000 connections that end at once.
_MOST_KEPT = 1024 * 1024

# Seconds that a reader which is behind may take for the last lines of a process.
_LAST_LINES = 1.0

# After these errors the same lines may be written later.
_PASSING = frozenset((errno.EAGAIN, errno.ENOSPC, errno.EDQUOT))

_log = Logger()


class Output(Protocol):
    """Where bytes go.

    `write` takes what it can without waiting, gives how many bytes that was, and raises OSError; `turn_over` goes on in
    a new file, if it is one, and raises OSError. `fileno` is for waiting.
    """

    title: str

    def write(self, data: bytearray) -> int: ...
    def turn_over(self) -> None: ...
    def fileno(self) -> int: ...


class Stream:
    """A descriptor that is open already, and shared with others: standard output."""

    def __init__(self, descriptor: int, title: str) -> None:
        self.title = title
        self._descriptor = descriptor
        self._write: Callable[[bytearray], int] = self._write_whole
        mode = os.fstat(descriptor).st_mode
        # O_NONBLOCK would be everybody's who shares the descriptor, so it is not set on that.
        if stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(descriptor))
            self._write = self._send
        elif not stat.S_ISREG(mode):
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
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def _write_if_there_is_room(self, data: bytearray) -> int:
        # Room for so much is what poll(2) looks for in a pipe. Somebody else may take it meanwhile, alas.
        if not wait_for_room(self, 0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, data[: select.PIPE_BUF])

    def turn_over(self) -> None:
        """It has no name to be opened by."""

    def fileno(self) -> int:
        return self._descriptor


class File:
    """A file that lines are appended to, or a device or a pipe with a name; opened anew by `turn_over`.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: str, mode: int = 0o640) -> None:
        self.title = path
        self._mode = mode
        directory, base = os.path.split(path)
        self._base = base or "."
        # The path may mean another file once the process has changed its root or its directory, or none at all.
        self._directory = os.open(directory or ".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
        self._descriptor = self._open()

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(self._base, flags, self._mode, dir_fd=self._directory)

    def write(self, data: bytearray) -> int:
        return os.write(self._descriptor, data)

    def turn_over(self) -> None:
        old, self._descriptor = self._descriptor, self._open()
        os.close(old)

    def fileno(self) -> int:
        return self._descriptor


def check_file(path: str) -> None:
    """Raise the OSError that a File of this path would most likely raise, and make none."""
    directory = os.path.dirname(path)
    wanted, rights = (path, os.W_OK) if os.path.lexists(path) else (directory, os.W_OK | os.X_OK)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.stat(wanted)
    if not os.access(wanted, rights):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class RotatedFile(LogFile):
    """A file of twistd's `--logfile`, which grows and rotates as it does there.

    Raises OSError when it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.title = path
        super().__init__(os.path.basename(path), os.path.dirname(path))

    def write(self, data: bytearray) -> int:  # Twisted's does not say how much it wrote
        if self._file.closed:  # a rotation failed
            self._openFile()
        if self.shouldRotate():
            self.rotate()
        written = self._file.write(data)
        self.size += written
        return written

    def turn_over(self) -> None:
        if os.path.exists(self.path):
            self.rotate()
        else:  # somebody has moved it away
            self.reopen()

    def fileno(self) -> int:
        return self._file.fileno()


def wait_for_room(output: Output, seconds: float) -> bool:
    """Whether an output can take something, at the latest after so long."""
    poll = select.poll()
    poll.register(output.fileno(), select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class Lines:
    """Lines on their way to an output. Nothing that becomes of that is raised, and nothing waits for it.

    From `start` on, while the reactor runs, lines are written some at a time. What an output does not take is kept, up
    to a megabyte, and tried again; beyond that, and when there is no hope, lines are dropped. `dropped` counts them.
    """

    def __init__(self, output: Output) -> None:
        self.dropped = 0
        self._output = output
        self._lines: list[str] = []
        self._size = 0  # of those, about
        self._kept = bytearray()
        self._blocked = False  # there was no room
        self._failing = False  # which has been said
        self._said = 0  # of `dropped`
        self._flushing = Lock()
        self._reactor: Any = None
        self._thread = 0
        self._waiting = False  # for _tick
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
        if (self._kept or self._lines) and self._reactor is not None and not self._waiting:
            self._waiting = True
            self._reactor.callLater(_RETRY if moved else _DELAY, self._tick)

    def _write_all(self) -> bool:
        """Write all there is, if nobody does that already; gives whether the last of it was taken."""
        # Another thread, or an object that logs at its end and was found in here by the garbage collector.
        if not self._flushing.acquire(blocking=False):
            return False
        try:
            moved = self._write()
            while self._lines and not self._kept:
                moved = self._write()
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
            self._begin_to_fail("nobody reads it")
        self._blocked = False
        before = len(self._kept)
        try:
            while self._kept:
                del self._kept[: self._output.write(self._kept)]
        except OSError as problem:
            self._blocked = problem.errno == errno.EAGAIN
            if problem.errno not in _PASSING:
                self.dropped += self._kept.count(b"\n")
                self._kept.clear()
            if not self._blocked:
                self._begin_to_fail(problem.strerror or str(problem))
            return len(self._kept) < before
        if self._failing and before:
            self._failing = False
            count, self._said = self.dropped - self._said, self.dropped
            _log.warn("{output} is written again; lines dropped: {count}", output=self._output.title, count=count)
        return True

    def _begin_to_fail(self, problem: str) -> None:
        if not self._failing:
            self._failing = True
            _log.error("{output} cannot be written: {problem}", output=self._output.title, problem=problem)

    def turn_over(self) -> None:
        """Go on in a new file, if the output is one."""
        self.flush()
        try:
            self._output.turn_over()
        except OSError as problem:
            _log.error("{output} cannot be opened anew: {problem}", output=self._output.title, problem=problem.strerror)

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
