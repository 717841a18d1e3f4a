"""Open UNIX listeners: bind a socket file, and replace a stale one."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rtservice.net.description import ListenError, unix_name
from rtservice.net.listen_conflicts import FilePlace, Place
from rtservice.net.listener import Listener, SocketFile
from rtservice.net.sockets import reason_of

# unix(7): sun_path has 108 bytes, the last of which is NUL.
_LONGEST_PATH = 107


def open_unix(path: str, mode: int, backlog: int) -> list[Listener]:
    """Return a listener on a socket file with the permissions `mode`. Replaces a stale file. Raises ListenError."""
    folder = _open_folder(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # The lock serializes services that start together: both may find a stale file.
        with _locked(folder, path):
            _remove_stale(path)
            # With umask the file has its mode from the beginning; a client could connect before a chmod.
            umask = os.umask(0o7777 & ~mode)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
            file = SocketFile(folder, os.path.basename(path), os.stat(path).st_ino, path)
            sock.listen(backlog)
    except BaseException as error:
        sock.close()
        os.close(folder)
        if isinstance(error, OSError):
            raise ListenError(f"cannot listen on {path!r}: {reason_of(error)}") from error
        raise
    return [Listener(sock, unix_name(path), _file=file)]


def unix_places(path: str, look_up: bool = True) -> list[Place]:
    """Return the place of a listener on this path."""
    directory, name = os.path.split(path)
    try:
        found = os.stat(directory)
    except OSError:  # opening it reports the reason
        return [FilePlace(os.path.normpath(directory), name, unix_name(path))]
    return [FilePlace((found.st_dev, found.st_ino), name, unix_name(path))]


def check_unix(path: str) -> None:
    """Check by its directory and an existing file that a socket file can be created. Raises ListenError."""
    os.close(_open_folder(path))
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=True):
        raise ListenError(f"cannot listen on {path!r}: its directory is not writable")
    _is_there(path)


def _open_folder(path: str) -> int:
    """Return a descriptor of the directory of a socket path. Raises ListenError."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ListenError(f"cannot listen on {path!r}: the path is longer than {_LONGEST_PATH} bytes")
    directory = os.path.dirname(path)
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListenError(f"cannot open the directory {directory!r}: {reason_of(error)}") from error


def _is_there(path: str) -> bool:
    """Return whether the path is a socket file. Raises ListenError for another kind of file."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"{path!r} exists and is not a socket; remove it, or choose another path")
    except FileNotFoundError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket file on which no process listens. Raises ListenError if one does, or if it is no socket."""
    if not _is_there(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its backlog is full: a process listens
            pass
    raise ListenError(f"{path!r} is in use; stop the process that listens on it, or choose another path")


# A start holds the lock for less than a millisecond. Any user who may open the directory can hold it forever (flock(2)
# needs no write permission), so the wait is bounded: seconds in total, and between two attempts.
_LOCK_WAIT, _LOCK_RETRY = 5.0, 0.02


@contextmanager
def _locked(folder: int, path: str) -> Iterator[None]:
    """Hold the lock of the directory of the socket `path`. Raises ListenError if another process keeps it."""
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ListenError(
                    f"cannot listen on {path!r}: another process has locked its directory for {_LOCK_WAIT:g} s; "
                    "find it with lslocks(8), or use a directory that only this user can open"
                ) from None
            time.sleep(_LOCK_RETRY)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)
