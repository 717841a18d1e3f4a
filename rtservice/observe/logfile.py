"""A log file: append, reopen on SIGUSR1, rotate by size. The old file is closed only after the new one is open.

Other programs move, copy, truncate, replace and remove log files (logrotate(8)), other processes append to them, and
the process may have lost the permission to open them (--uid, --chroot). The step depends on the event and on the file
that is at the path now, compared by device and inode:

    event           this file     this file, empty   another file   no file   error
    SIGUSR1         rotate        keep               open           open      keep, report, retry
    size reached    rotate        keep               open           open      keep, report, retry
    removed         open          open               open           open      keep the lines, retry

    rotate  FILE.1 becomes FILE.2 and so on, FILE becomes FILE.1, and FILE is created; keep, if rotation is disabled
    open    open the file at the path, create it if there is none, then close the old one
    keep    continue with the open file

`decide` implements this table. After a step that fails, the open file stays in use, and `retry` tries again.

A line that a full disk accepted in part is written again as a whole once the file has changed. If two processes append
to one file, and all of a line but its end was written, the file may contain that line twice.

Each event costs a bounded number of system calls: at most two for each rotated file that is kept.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from enum import Enum, auto

from rtservice.observe.lines import OutputUnavailableError

# Size in bytes at which a file is rotated, as in twistd.
_ROTATE_AT = 1_000_000

# O_NONBLOCK is for a named pipe with a slow reader.
_FLAGS = os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


class FileEvent(Enum):
    """An event that concerns a log file."""

    ASKED = auto()  # SIGUSR1
    FULL = auto()  # the file has the size at which it is rotated
    REMOVED = auto()  # the file has no name any more: what is written to it is lost


class Found(Enum):
    """The file at the path of the open file."""

    OURS = auto()  # the open file
    EMPTY = auto()  # the open file, and it is empty
    OTHER = auto()
    NOTHING = auto()


class Step(Enum):
    """The reaction to an event, as in the table at the top."""

    KEEP = auto()
    OPEN = auto()
    ROTATE = auto()


_STEPS = {
    # An empty file is what logrotate's `copytruncate` leaves: there is nothing to rotate.
    (FileEvent.ASKED, Found.OURS): Step.ROTATE,
    (FileEvent.ASKED, Found.EMPTY): Step.KEEP,
    (FileEvent.FULL, Found.OURS): Step.ROTATE,
    (FileEvent.FULL, Found.EMPTY): Step.KEEP,
}


def decide(event: FileEvent, found: Found, *, rotates: bool) -> Step:
    """Return the step for an event, as in the table at the top."""
    step = _STEPS.get((event, found), Step.OPEN)
    return Step.KEEP if step is Step.ROTATE and not rotates else step


class LogFile:
    """An Output that appends to the file at a path: a regular file, a device or a named pipe.

    `rotated` is the number of rotated files to keep, of which `path.1` is the newest; 0 disables rotation. Files with
    higher numbers are not touched. `rotate_at` is the size in bytes. `mode` and the umask apply to a file that is
    created at the start. A file that is created later gets the mode of its predecessor. The mode of an existing file is
    never changed. `trouble` is the error of the last step, or empty.

    Raises OSError if the file cannot be opened.
    """

    def __init__(self, path: str, *, rotated: int = 0, mode: int = 0o640, rotate_at: int = _ROTATE_AT) -> None:
        self.title = path
        self.trouble = ""
        self._rotated = rotated
        self._mode = mode
        self._rotate_at = rotate_at
        self._pending: FileEvent | None = None  # an event whose step failed, or waits for another process
        self._doing = "reopened"
        directory, base = os.path.split(os.path.abspath(path))
        self._base = base or "."
        # Paths are resolved from the root directory of the start, also after `--chroot`.
        self._root = os.open("/", _DIRECTORY)
        self._path = directory.lstrip("/") or "."
        self._directory = os.open(self._path, _DIRECTORY, dir_fd=self._root)
        # For a line that was written in part: that part, and bytes to write before the rest of the line.
        self._begun = b""
        self._owed = b""
        self._end = -1  # size of the file after the last write
        self._use(self._open())

    # --- an Output ---

    def write(self, data: bytearray) -> int:
        """Append data, and return the number of bytes. May rotate or reopen the file. Raises OutputUnavailableError."""
        try:
            return self._write(data)
        except OSError as problem:  # after any error, a file may accept the same lines later
            raise OutputUnavailableError(problem.errno, problem.strerror) from None

    def _write(self, data: bytearray) -> int:
        state = os.fstat(self._descriptor)
        if stat.S_ISREG(state.st_mode):
            self._prepare(state)
            state = os.fstat(self._descriptor)
            if state.st_size != self._end:
                # A new file, or another process has appended or truncated. A line that was written in part is repeated.
                self._owed = (b"\n" if self._ends_within_a_line(state.st_size) else b"") + self._begun
        written = os.write(self._descriptor, self._owed + data if self._owed else data)
        if stat.S_ISREG(state.st_mode):
            # The end of this process's write (open(2), O_APPEND). Others may have appended since.
            self._end = os.lseek(self._descriptor, 0, os.SEEK_CUR)
        taken = max(0, written - len(self._owed))
        self._owed = self._owed[written:]
        last = data.rfind(b"\n", 0, taken)
        self._begun = bytes(data[last + 1 : taken]) if last >= 0 else self._begun + bytes(data[:taken])
        return taken

    def reopen(self) -> None:
        """Rotate or reopen the file, for SIGUSR1."""
        self._attempt(FileEvent.ASKED)

    def retry(self) -> None:
        """Repeat a failed step."""
        if self._pending is not None:
            self._attempt(self._pending)

    def in_place(self) -> bool:
        """Return whether the open file is the one at the path."""
        try:
            self._look_up_directory()
            return self._found() in (Found.OURS, Found.EMPTY)
        except OSError:
            return False

    def fileno(self) -> int:
        """Return the descriptor of the open file."""
        return self._descriptor

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in (self._descriptor, self._directory, self._root):
            os.close(descriptor)

    @property
    def beyond(self) -> str:
        """The path of the first file with a higher number than rotation creates, or ""."""
        number = self._rotated + 1
        return f"{self.title}.{number}" if self._rotated and self._exists(number) else ""

    # --- events and steps ---

    def _prepare(self, state: os.stat_result) -> None:
        """Handle events of the file before a write. Raises OSError."""
        if state.st_nlink == 0:
            self._take_step(FileEvent.REMOVED)
        elif self.trouble:
            return
        elif self._pending is not None:
            self._attempt(self._pending)
        elif self._rotated and state.st_size >= self._rotate_at:
            self._attempt(FileEvent.FULL)

    def _attempt(self, event: FileEvent) -> None:
        try:
            self._take_step(event)
        except OSError as problem:
            self._pending = event
            self.trouble = f"cannot be {self._doing}: {problem.strerror}; still writing to the file that was open"

    def _take_step(self, event: FileEvent) -> None:
        """Decide on a step, and perform it. Raises OSError; then the open file stays in use."""
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
        """Open the directory that is at its path now. Raises OSError."""
        try:
            directory = os.open(self._path, _DIRECTORY, dir_fd=self._root)
        except PermissionError:
            return  # root could access its parents, and this user cannot: keep the directory that is open
        os.close(self._directory)
        self._directory = directory

    def _found(self) -> Found:
        """Return what is at the path. Raises OSError."""
        current = os.fstat(self._descriptor)
        try:
            there = os.stat(self._base, dir_fd=self._directory)
        except FileNotFoundError:
            return Found.NOTHING
        if not os.path.samestat(there, current):
            return Found.OTHER
        return Found.OURS if current.st_size else Found.EMPTY

    def _rotate(self) -> bool:
        """Rename the file and its predecessors. Return False if another process does that now.

        Raises OSError; then no file is lost, and a second call continues.
        """
        try:
            # Two processes may have one file open: a service that drains, and its successor. The second process to
            # rotate it would replace the file that was just moved by the first process's new file.
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
        """Open the file at the path, or create it with the mode of its predecessor. Raises OSError."""
        mode = self._mode
        if predecessor is not None and stat.S_ISREG(predecessor.st_mode):
            mode = predecessor.st_mode & 0o777
        try:
            # Without O_CREAT, which fails for another user's file in /tmp (sysctl fs.protected_regular).
            descriptor = self._open_with(os.O_WRONLY)
        except FileNotFoundError:
            try:
                descriptor = self._open_with(os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            except FileExistsError:  # created meanwhile, or a dangling symbolic link
                descriptor = self._open_with(os.O_WRONLY | os.O_CREAT, mode)
            else:
                if predecessor is not None:
                    with contextlib.suppress(OSError):  # a file system without modes
                        os.fchmod(descriptor, mode)
        return self._readable(descriptor)

    def _open_with(self, flags: int, mode: int = 0) -> int:
        return os.open(self._base, flags | _FLAGS, mode, dir_fd=self._directory)

    def _readable(self, descriptor: int) -> int:
        """Reopen the file for reading too, if permitted: `_ends_within_a_line` reads its last byte."""
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
        """Return whether the last line is incomplete: the disk was full, or a process was killed."""
        try:
            return size > 0 and os.pread(self._descriptor, 1, size - 1) not in (b"\n", b"")
        except OSError:  # no permission to read
            return False


def check_file(path: str) -> None:
    """Raise the OSError that a LogFile of this path would most likely raise. Creates no file."""
    directory = os.path.dirname(path)
    wanted, rights = (path, os.W_OK) if os.path.lexists(path) else (directory, os.W_OK | os.X_OK)
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    os.stat(wanted)
    if not os.access(wanted, rights):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
