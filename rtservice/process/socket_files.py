"""Remove the socket files of UNIX listeners, and log a warning for each that cannot be removed."""

from __future__ import annotations

from collections.abc import Iterable

from twisted.logger import Logger

from rtservice.events import LISTENER_FILE_KEPT
from rtservice.net.listener import Listener


def remove_files(listeners: Iterable[Listener], log: Logger) -> None:
    """Remove the socket file of each listener that has one."""
    for listener in listeners:
        try:
            listener.remove_file()
        except OSError as problem:
            # After privileges were dropped, the directory may not be writable. The next start replaces the file.
            LISTENER_FILE_KEPT.log(log, listener=listener.name, problem=problem.strerror)


def close_listeners(listeners: Iterable[Listener], log: Logger) -> None:
    """Remove the socket file of each listener, and close its sockets."""
    for listener in listeners:
        remove_files([listener], log)
        listener.close()
