"""sd_notify(3) in Python: report readiness, reloads, stops and the watchdog to the service manager."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

from twisted.logger import Logger

from rtservice.net.address import escaped

_log = Logger()

# systemd ignores a datagram of more than 4096 bytes (NOTIFY_BUFFER_MAX); a character takes four at most.
_STATUS_CHARACTERS = 1000


class Notifier:
    """Tells the manager how the service stands, in one datagram for each call; without a socket, tells nobody.

    Nothing here blocks or raises. A manager that is busy loses a status, an extension or a sign of life, which are said
    again soon, but no change of state: that is sent before whatever comes next.

    `watchdog_interval` is how often `watchdog` is to be called, in seconds: half of the time after which the manager
    takes the process for stuck. None where nobody watches.
    """

    def __init__(self, sock: socket.socket | None = None, *, watchdog_interval: float | None = None) -> None:
        self.watchdog_interval = watchdog_interval
        self._socket = sock
        self._unsent: list[bytes] = []

    @property
    def connected(self) -> bool:
        """Whether somebody is told."""
        return self._socket is not None

    def ready(self, status: str) -> None:
        """The service is up, or has reloaded."""
        self._send("READY=1", _status(status), keep=True)

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._send(_status(text))

    def reloading(self) -> None:
        """A reload begins; `ready` ends it, also one that failed."""
        # Type=notify-reload takes a message with an earlier time for the answer to an earlier signal.
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", keep=True)

    def stopping(self, status: str) -> None:
        """The drain begins."""
        self._send("STOPPING=1", _status(status), keep=True)

    def extend_timeout(self, seconds: float) -> None:
        """Ask for `seconds` from now, should the timeout of the start or the stop in progress end earlier."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def watchdog(self) -> None:
        """The reactor turns."""
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
            # Its receiver is gone, and cannot be found again after a chroot or as another user.
            _log.warn("the service manager is told no more: {problem}", problem=error.strerror)
            self._socket.close()
            self._socket = None
        self._unsent = datagrams


def _status(text: str) -> str:
    return f"STATUS={escaped(text)[:_STATUS_CHARACTERS]}"


def from_environment(environ: MutableMapping[str, str]) -> Notifier:
    """The notifier for NOTIFY_SOCKET, connected; its variables are taken out of `environ`, so that no child has them.

    It is to be made while the process still has its first root, user and process id. Whether WATCHDOG_USEC means this
    process (WATCHDOG_PID, sd_watchdog_enabled(3)) is decided here: a daemon that forks later gives the signs of life in
    its parent's stead, which systemd takes with NotifyAccess=all, as it does all else from a process that it did not
    start. Type=notify wants `--nodaemon`: it counts the parent's exit as the service's.

    A socket that cannot be used is a warning in the log: it is no reason not to serve.
    """
    address = environ.pop("NOTIFY_SOCKET", "")
    microseconds = environ.pop("WATCHDOG_USEC", "")
    watched = environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not address:
        return Notifier()
    if address[0] not in "/@":
        _log.warn("NOTIFY_SOCKET {address!r} is neither a path nor an abstract name (@…)", address=address)
        return Notifier()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # close-on-exec, as all of Python's
    sock.setblocking(False)
    try:
        sock.connect(os.fsencode(address if address[0] == "/" else "\0" + address[1:]))
    except OSError as error:
        sock.close()
        # A path that is too long has no errno.
        _log.warn(
            "NOTIFY_SOCKET {address!r} cannot be used: {problem}", address=address, problem=error.strerror or error
        )
        return Notifier()
    # systemd writes decimal digits; 0 and anything else mean that nobody watches.
    interval = int(microseconds) / 1_000_000 / 2 if watched and microseconds.isdecimal() else 0
    return Notifier(sock, watchdog_interval=interval or None)
