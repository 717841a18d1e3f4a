"""A log file: appended to, reopened on SIGUSR1, rotated by size, and never given up before its successor is open.

Other programs move, copy, truncate, replace and remove log files (logrotate(8)), other processes append to them, and
the process may have lost the right to open them (--uid, --chroot). What to do depends on what has happened, and on what
is at the path now, compared by device and inode:

    event           this file     this file, empty   another file   nothing   cannot be looked up
    SIGUSR1         rotate        keep               open           open      keep, report, retry
    size reached    rotate        keep               open           open      keep, report, retry
    removed         open          open               open           open      keep the lines, retry

    rotate  FILE.1 becomes FILE.2 and so on, FILE becomes FILE.1, and FILE is created; keep, if it does not rotate
    open    open the file at the path, create it if there is none, then close the old one
    keep    go on with the open file

`decide` is this table. A step that fails leaves the open file in use, and is tried again by `retry`.

A line that a full disk took in part is written again, whole, once the file has changed. So if two processes append to
one file, and all of a line but its end was taken, that line may be in it twice.

Each event costs a bounded number of system calls: at most two for each rotated file that is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from enum import Enum, auto

from rtservice.observe.lines import UnavailableError

# Bytes after which a file is rotated, as twistd's `--logfile` is.
_ROTATE_AT = 1_000_000

# O_NONBLOCK is for a named pipe, of which the reader may be behind.
_FLAGS = os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class Event(Enum):
    """What has happened to a file."""

    ASKED = auto()  # SIGUSR1
    FULL = auto()  # it has the size at which it is rotated
    REMOVED = auto()  # it has no name any more: what is written to it is lost


class Found(Enum):
    """What is at the path of a file that is open."""

    OURS = auto()  # the open file
    EMPTY = auto()  # the open file, with nothing in it
    OTHER = auto()
    NOTHING = auto()


class Step(Enum):
    """What to do about it."""

    KEEP = auto()
    OPEN = auto()
    ROTATE = auto()


_STEPS = {
    # An empty file is what logrotate's `copytruncate` leaves: there is nothing to rotate.
    (Event.ASKED, Found.OURS): Step.ROTATE,
    (Event.ASKED, Found.EMPTY): Step.KEEP,
    (Event.FULL, Found.OURS): Step.ROTATE,
    (Event.FULL, Found.EMPTY): Step.KEEP,
}


def decide(event: Event, found: Found, *, rotates: bool) -> Step:
    """Return the step for an event, as in the table at the top."""
    step = _STEPS.get((event, found), Step.OPEN)
    return Step.KEEP if step is Step.ROTATE and not rotates else step


class LogFile:
    """An Output that appends to the file at a path: a regular file, a device or a named pipe.

    `rotated` is how many rotated files are kept, `path.1` being the newest; 0: never rotate. Files with higher numbers
    are left alone. `mode` is that of a file that is created at the start, less the umask; a file that is created later
    gets the mode of its predecessor, and the mode of a file that exists is never changed. `trouble` says what is wrong
    after a step that failed, and is empty otherwise.

    Raises OSError when the file cannot be opened.
    """

    def __init__(self, path: str, *, rotated: int = 0, mode: int = 0o640, rotate_at: int = _ROTATE_AT) -> None:
        self.title = path
        self.trouble = ""
        self._rotated = rotated
        self._mode = mode
        self._rotate_at = rotate_at
        self._pending: Event | None = None  # what failed, or has to wait for another process
        self._doing = "reopened"
        directory, base = os.path.split(os.path.abspath(path))
        self._base = base or "."
        # Paths are looked up from the root of now, which `--chroot` may leave outside of the process's.
        self._root = os.open("/", _DIRECTORY)
        self._path = directory.lstrip("/") or "."
        self._directory = os.open(self._path, _DIRECTORY, dir_fd=self._root)
        # Of a line that the file could not take whole: what it has of it, and what has to be written before the rest.
        self._begun = b""
        self._owed = b""
        self._end = -1  # of the file, after what was written last
        self._use(self._open())

    # --- an Output ---

    def write(self, data: bytearray) -> int:
        """Append data, in a new file if it is time for one; gives how much was taken. Raises UnavailableError."""
        try:
            return self._write(data)
        except OSError as problem:  # whatever it is, a file may take the same lines later
            raise UnavailableError(problem.errno, problem.strerror) from None

    def _write(self, data: bytearray) -> int:
        state = os.fstat(self._descriptor)
        if stat.S_ISREG(state.st_mode):
            self._look_after(state)
            state = os.fstat(self._descriptor)
            if state.st_size != self._end:
                # A new file, or somebody else has appended or truncated. A line that is in parts begins again.
                self._owed = (b"\n" if self._ends_within_a_line(state.st_size) else b"") + self._begun
        written = os.write(self._descriptor, self._owed + data if self._owed else data)
        if stat.S_ISREG(state.st_mode):
            # The end of what this process wrote (open(2), O_APPEND); others may have appended since.
            self._end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        taken = max(0, written - len(self._owed))
        self._owed = self._owed[written:]
        last = data.rfind(b"\n", 0, taken)
        self._begun = bytes(data[last + 1 : taken]) if last >= 0 else self._begun + bytes(data[:taken])
        return taken

    def reopen(self) -> None:
        """Do what SIGUSR1 asks for."""
        self._attempt(Event.ASKED)

    def retry(self) -> None:
        """Try again what failed."""
        if self._pending is not None:
            self._attempt(self._pending)

    def in_place(self) -> bool:
        """Whether the file that is open is the one at the path."""
        try:
            self._look_up_directory()
            return self._found() in (Found.OURS, Found.EMPTY)
        except OSError:
            return False

    def fileno(self) -> int:
        """The descriptor of the file that is open now."""
        return self._descriptor

    def close(self) -> None:
        """Close every descriptor."""
        for descriptor in (self._descriptor, self._directory, self._root):
            os.close(descriptor)

    @property
    def beyond(self) -> str:
        """The path of the first file that has a higher number than rotation makes, or nothing if there is none."""
        number = self._rotated + 1
        return f"{self.title}.{number}" if self._rotated and self._exists(number) else ""

    # --- what has happened, and what follows ---

    def _look_after(self, state: os.stat_result) -> None:
        """Before something is written: have a file that it will be found in. Raises OSError."""
        if state.st_nlink == 0:
            self._take_step(Event.REMOVED)
        elif self.trouble:
            return
        elif self._pending is not None:
            self._attempt(self._pending)
        elif self._rotated and state.st_size >= self._rotate_at:
            self._attempt(Event.FULL)

    def _attempt(self, event: Event) -> None:
        try:
            self._take_step(event)
        except OSError as problem:
            self._pending = event
            self.trouble = f"cannot be {self._doing}: {problem.strerror}; still writing to the file that was open"

    def _take_step(self, event: Event) -> None:
        """Decide and do it. Raises OSError, and then the file that was open still is."""
        self._doing = "reopened"
        self._look_up_directory()
        rotates = self._rotated > 0 and stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        step = decide(event, self._found(), rotates=rotates)
        if step is Step.ROTATE:
            self._doing = "rotated"
            if not self._rotate():
                self._pending = event
                return
            self._doing = "reopened"
        if step is not Step.KEEP:
            self._use(self._open(os.fstat(self._descriptor)))
        self._pending = None
        self.trouble = ""

    def _look_up_directory(self) -> None:
        """Take the directory that is at its path now. Raises OSError."""
        try:
            directory = os.open(self._path, _DIRECTORY, dir_fd=self._root)
        except PermissionError:
            return  # root could pass its parents and this user cannot: the directory of then
        os.close(self._directory)
        self._directory = directory

    def _found(self) -> Found:
        """What is at the path. Raises OSError when that cannot be seen."""
        ours = os.fstat(self._descriptor)
        try:
            there = os.stat(self._base, dir_fd=self._directory)
        except FileNotFoundError:
            return Found.NOTHING
        if not os.path.samestat(there, ours):
            return Found.OTHER
        return Found.OURS if ours.st_size else Found.EMPTY

    def _rotate(self) -> bool:
        """Give the file and its predecessors their next names; gives False when another process is at that now.

        Raises OSError; then no file has been lost, and a second call continues.
        """
        try:
            # Two processes may have one file open: a service that drains, and its successor. The second one to rotate
            # it would move the first one's new file on top of the one that was just moved.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
        try:
            if self._found() is Found.OURS:
                free = next((number for number in range(1, self._rotated) if not self._exists(number)), self._rotated)
                for number in range(free - 1, -1, -1):
                    self._rename(self._name(number), self._name(number + 1))
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        return True

    def _name(self, number: int) -> str:
        return f"{self._base}.{number}" if number else self._base

    def _exists(self, number: int) -> bool:
        try:
            os.stat(self._name(number), dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def _rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    # --- files ---

    def _open(self, predecessor: os.stat_result | None = None) -> int:
        """Open the file at the path, or create it, then with the mode of a predecessor. Raises OSError."""
        mode = self._mode
        if predecessor is not None and stat.S_ISREG(predecessor.st_mode):
            mode = predecessor.st_mode & 0o777
        try:
            # Without O_CREAT, which is refused for a file of somebody else's in /tmp (sysctl fs.protected_regular).
            descriptor = self._open_with(os.O_WRONLY)
        except FileNotFoundError:
            try:
                descriptor = self._open_with(os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:  # created meanwhile, or a symbolic link to nothing
                descriptor = self._open_with(os.O_WRONLY | os.O_CREAT, mode)
            else:
                if predecessor is not None:
                    with contextlib.suppress(OSError):  # a file system without modes
                        os.fchmod(descriptor, mode)
        return self._readable(descriptor)

    def _open_with(self, flags: int, mode: int = 0) -> int:
        return os.open(self._base, flags | _FLAGS, mode, dir_fd=self._directory)

    def _readable(self, descriptor: int) -> int:
        """The same file, opened for reading too where this user may: `_ends_within_a_line` reads its last byte."""
        state = os.fstat(descriptor)
        if stat.S_ISREG(state.st_mode):
            with contextlib.suppress(OSError):
                both = self._open_with(os.O_RDWR)
                if os.path.samestat(os.fstat(both), state):
                    descriptor, both = both, descriptor
                os.close(both)
        return descriptor

    def _use(self, descriptor: int) -> None:
        """Write to this file from now on."""
        old, self._descriptor = getattr(self, "_descriptor", None), descriptor
        self._end = -1
        self._owed = self._begun
        if old is not None:
            os.close(old)

    def _ends_within_a_line(self, size: int) -> bool:
        """Whether the last line of the file has no end: a full disk took half of it, or a process was killed."""
        try:
            return size > 0 and os.pread(self._descriptor, 1, size - 1) not in (b"\n", b"")
        except OSError:  # it may not be read
            return False


def check_file(path: str) -> None:
    """Raise the OSError that a LogFile of this path would most likely raise, and make none."""
    directory = os.path.dirname(path)
    wanted, rights = (path, os.W_OK) if os.path.lexists(path) else (directory, os.W_OK | os.X_OK)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.stat(wanted)
    if not os.access(wanted, rights):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
