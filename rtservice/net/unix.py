"""UNIX listeners: a socket file, in the place of a stale one."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rtservice.net.description import ListenError, unix_name
from rtservice.net.listener import Listener, SocketFile
from rtservice.net.places import FilePlace, Place
from rtservice.net.sockets import reason_of

# unix(7): sun_path is 108 bytes, of which the last is a NUL.
_LONGEST_PATH = 107


def open_unix(path: str, mode: int, backlog: int) -> list[Listener]:
    """Return a listener on a socket file with this mode. A stale file is replaced. Raises ListenError."""
    folder = _open_folder(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Two services that start at once may both find a stale file: one after the other.
        with _locked(folder, path):
            _remove_stale(path)
            # The file has its mode from its first moment; a chmod would come after a client could have connected.
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
    """Return where a listener on this path would listen."""
    directory, name = os.path.split(path)
    try:
        found = os.stat(directory)
    except OSError:  # opening it says why
        return [FilePlace(os.path.normpath(directory), name, unix_name(path))]
    return [FilePlace((found.st_dev, found.st_ino), name, unix_name(path))]


def check_unix(path: str) -> None:
    """Check that a socket file can be made, as far as its directory and an existing file show. Raises ListenError."""
    os.close(_open_folder(path))
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=True):
        raise ListenError(f"cannot listen on {path!r}: its directory is not writable")
    _is_there(path)


def _open_folder(path: str) -> int:
    """A descriptor of the directory of a path that can be a socket's."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ListenError(f"cannot listen on {path!r}: the path is longer than {_LONGEST_PATH} bytes")
    directory = os.path.dirname(path)
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListenError(f"cannot open the directory {directory!r}: {reason_of(error)}") from error


def _is_there(path: str) -> bool:
    """Whether there is a socket file; raises ListenError when there is another kind of one."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"{path!r} exists and is not a socket")
    except FileNotFoundError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket file on which nobody listens; raises ListenError when somebody does, or it is no socket."""
    if not _is_there(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its queue is full: somebody is very much there
            pass
    raise ListenError(f"{path!r} is in use: another process answers on it")


# A start holds the lock for less than a millisecond. Any user who may open the directory can hold it for ever
# (flock(2) asks for no write permission), so the wait is bounded: seconds in all, and between two attempts.
_LOCK_WAIT, _LOCK_RETRY = 5.0, 0.02


@contextmanager
def _locked(folder: int, path: str) -> Iterator[None]:
    """Hold the lock of the directory of the socket `path`; raises ListenError when another process keeps it."""
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ListenError(
                    f"cannot listen on {path!r}: another process has locked its directory for {_LOCK_WAIT:g} s; "
                    "lslocks(8) shows which, and a directory that only this user can open prevents it"
                ) from None
            time.sleep(_LOCK_RETRY)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)
