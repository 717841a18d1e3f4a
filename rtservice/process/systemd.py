"""sd_notify(3) in Python: report readiness, reloads, stops and the watchdog to the service manager."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

from twisted.logger import Logger

from rtservice.escaping import escaped
from rtservice.events import SYSTEMD_DISCONNECTED, SYSTEMD_UNUSABLE

_log = Logger()

# systemd ignores datagrams of more than 4096 bytes (NOTIFY_BUFFER_MAX). A character has at most four bytes.
_STATUS_CHARACTERS = 1000


class Notifier:
    """Sends the state of the service to the service manager, in one datagram for each call. No effect without a socket.

    No method blocks or raises. If the manager is busy, a status, an extended timeout or a watchdog notification is
    dropped, since it is repeated soon. A change of state is kept, and sent before the next notification.

    `watchdog_interval` is the interval in seconds at which to call `watchdog`: half of the manager's watchdog timeout.
    None without a watchdog.
    """

    def __init__(self, sock: socket.socket | None = None, *, watchdog_interval: float | None = None) -> None:
        self.watchdog_interval = watchdog_interval
        self._socket = sock
        self._unsent: list[bytes] = []

    @property
    def connected(self) -> bool:
        """Whether there is a socket to a service manager."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """Report that the service has started or a reload has ended, with one line of status."""
        self._send("READY=1", _status(status), keep=True)

    def status(self, text: str) -> None:
        """Send one line of status, for `systemctl status`."""
        self._send(_status(text))

    def reloading(self) -> None:
        """Report that a reload begins. `ready` ends it, also after a failure."""
        # Type=notify-reload compares the time with that of its signal.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", keep=True)

    def stopping(self, status: str) -> None:
        """Report that the graceful shutdown begins, with one line of status."""
        self._send("STOPPING=1", _status(status), keep=True)

    def extend_timeout(self, seconds: float) -> None:
        """Extend the timeout of the start or stop in progress to at least `seconds` from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def watchdog(self) -> None:
        """Send a watchdog notification: the reactor runs."""
        self._send("WATCHDOG=1")

    def _send(self, *assignments: str, keep: bool = False) -> None:
        if self._socket is None:
            return
        datagrams = [*self._unsent, "\n".join(assignments).encode()]
        try:
            while datagrams:
                self._socket.send(datagrams[0])
                del datagrams[0]
        except BlockingIOError:
            if not keep:
                del datagrams[-1]
        except OSError as error:
            # The receiver is gone, and cannot be reached again after a chroot or as another user.
            SYSTEMD_DISCONNECTED.log(_log, problem=error.strerror)
            self._socket.close()
            self._socket = None
        self._unsent = datagrams


def _status(text: str) -> str:
    return f"STATUS={escaped(text)[:_STATUS_CHARACTERS]}"


def from_environment(environ: MutableMapping[str, str]) -> Notifier:
    """Return a notifier connected to NOTIFY_SOCKET. Removes its variables from `environ`: no child must inherit them.

    Call it before the process changes its root directory, user and process id. Whether WATCHDOG_USEC applies to this
    process (WATCHDOG_PID, sd_watchdog_enabled(3)) is determined here: a daemon that forks later sends the watchdog
    notifications for its parent, which systemd accepts with NotifyAccess=all, as all messages from a process that it
    did not start. Type=notify needs `--nodaemon`: it treats the parent's exit as the end of the service.

    If the socket cannot be used, a warning is logged, and the service starts nevertheless.
    """
    address = environ.pop("NOTIFY_SOCKET", "")
    microseconds = environ.pop("WATCHDOG_USEC", "")
    watched = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address:
        return Notifier()
    if address[0] not in "/@":
        SYSTEMD_UNUSABLE.log(_log, address=address, problem="neither a path nor an abstract name (@…)")
        return Notifier()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # close-on-exec, as all sockets of Python
    sock.setblocking(False)
    try:
        sock.connect(os.fsencode(address if address[0] == "/" else "\0" + address[1:]))
    except OSError as error:
        sock.close()
        # A path that is too long has no errno.
        SYSTEMD_UNUSABLE.log(_log, address=address, problem=error.strerror or str(error))
        return Notifier()
    # systemd writes decimal digits. 0 and other texts mean that there is no watchdog.
    interval = int(microseconds) / 1_000_000 / 2 if watched and microseconds.isdecimal() else 0
    return Notifier(sock, watchdog_interval=interval or None)
