"""Report the outcome of a start to the terminal, and end the process with the exit status of its service."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import os
import resource
import stat
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from twisted.python.failure import Failure

from rtservice.escaping import escaped
from rtservice.events import PRIVILEGES_DROPPED, START_EXCEPTION
from rtservice.hosting.error_line import error_line
from rtservice.observe.logs import Log
from rtservice.process import signals
from rtservice.process.service import ServiceProcess
from rtservice.process.start_errors import traceback_level
from rtservice.startup.credentials import Credentials, CredentialsError
from rtservice.startup.outputs import Outputs
from rtservice.startup.preflight import reason


class StartReporter:
    """Reports the outcome of a start, which begins with the options and ends when the service is ready or fails.

    A failure ends the process with one line. After `watch`, this includes exceptions of Twisted between `makeService`
    and the reactor, which would be printed as tracebacks. Then the service is abandoned.
    """

    def __init__(self, twistd: Any) -> None:
        self._twistd = twistd
        self._service: ServiceProcess | None = None
        self._credentials = Credentials()
        self._log: Log | None = None
        self._pipe: int | None = None
        self._terminal: int | None = None
        self._hook: Callable[..., object] | None = None
        self._forks = 0  # expected ones
        self.over = False  # the start has succeeded, or its failure is reported

    def watch(self) -> None:
        """Report uncaught exceptions until the start is over."""
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def prepare(self, credentials: Credentials, log: Log) -> None:
        """Keep the terminal, since a daemon replaces descriptor 2. `check` will assume the credentials."""
        self._log = log
        self._terminal = os.dup(2)
        self._credentials = credentials
        for option in ("uid", "gid"):
            # Twistd fails for a user without a passwd entry, and does not verify the result.
            if option in self._twistd:
                self._twistd[option] = None

    def take(self, service: ServiceProcess) -> None:
        """Set the service that is abandoned if the start fails."""
        self._service = service

    def expect_forks(self) -> None:
        """Prepare for the two forks with which twistd becomes a daemon. No other fork may happen before them."""
        self._forks = 2
        os.register_at_fork(after_in_parent=self._forked, after_in_child=self._forked_off)

    def _forked(self) -> None:
        """Close the writing end of the pipe from which this process, the parent, reads the outcome of the daemon.

        Twisted leaves it open, so the parent would wait forever if the daemon is killed before it is ready.
        """
        if self._forks:
            self._forks = 0
            for descriptor in range(3, self._next_descriptor()):
                with contextlib.suppress(OSError):
                    if _is_written(descriptor):
                        os.close(descriptor)

    @staticmethod
    def _next_descriptor() -> int:
        """Return a number above those of all open descriptors that matter; the kernel assigns the lowest free one."""
        descriptor = os.dup(2)
        os.close(descriptor)
        return descriptor

    def _forked_off(self) -> None:
        """Hold signals in the child: it is the daemon, or its parent."""
        if self._forks:
            self._forks -= 1
            signals.hold()

    def check(self) -> str | None:
        """Drop privileges, after all sockets are bound and before any client is served. Return a problem, or None."""
        self._take_pipe()
        try:
            self._credentials.assume()
        except CredentialsError as error:
            return str(error)
        if self._credentials and self._log is not None:
            PRIVILEGES_DROPPED.log(self._log, uid=self._credentials.uid, gid=self._credentials.gid)
        return None

    def report(self, problem: str | None) -> None:
        """End the start. None means success. Otherwise `problem` is printed."""
        self.over = True
        if self._hook is not None and sys.excepthook == self._uncaught:  # hosted code may have replaced it
            sys.excepthook = self._hook
        self._take_pipe()
        if problem is None:
            self._answer(b"0")
        else:
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(self._terminal or 2, f"rtservice: {escaped(problem)}\n".encode())
            # At exit, so that the command returns after the cleanup. A retry then finds no pidfile and no port in use.
            atexit.register(self._answer, b"1 rtservice did not start")
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def abandon(self, problem: str) -> None:
        """Report the problem, and remove the sockets and their files."""
        if self._service is not None:
            self._service.exit_status = self._service.exit_status or 1
            self._service.abandon()
        self.report(problem)

    def _uncaught(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if self.over and self._hook is not None:  # an excepthook of hosted code may still call this method
            self._hook(kind, error, traceback)
            return
        problem = unexpected(error)
        if self._log is not None:
            START_EXCEPTION.failure(self._log, Failure(error, kind, traceback), level=traceback_level(error))
        self.abandon(problem)

    def _answer(self, word: bytes) -> None:
        if self._pipe is not None:
            with contextlib.suppress(OSError):
                os.write(self._pipe, word)
            os.close(self._pipe)

    def _take_pipe(self) -> None:
        # When twistd daemonizes, the command on the terminal reads the outcome from this pipe. Twisted would report
        # success too early, and only the first 98 bytes of an error.
        if self._twistd.get("statusPipe") is not None:
            self._pipe, self._twistd["statusPipe"] = self._twistd["statusPipe"], None


def _is_written(descriptor: int) -> bool:
    """Whether a descriptor is the writing end of a pipe. Raises OSError."""
    mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return mode == os.O_WRONLY and stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def unexpected(error: BaseException) -> str:
    """Return an unexpected exception during a start as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if not isinstance(error, OSError) or error.errno is None:
        return f"cannot start: {error_line(error)}"
    where = "" if error.filename is None else f"{escaped(str(error.filename))}: "
    more = ""
    if error.errno == errno.EMFILE:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        more = f"; the limit of descriptors (ulimit -n, LimitNOFILE=) is {limit}"
    return f"cannot start: {where}{reason(error)}{more}"


class ExitWithStatus:
    """Ends the process with the exit status of its service, unless that is 0: twistd itself always exits with 0.

    It must be registered with atexit before hosted code is imported, so that it is called last.
    """

    def __init__(self, start: StartReporter) -> None:
        self._start = start
        self._service: ServiceProcess | None = None
        self._outputs: Outputs | None = None

    def take(self, service: ServiceProcess, outputs: Outputs) -> None:
        """Set the service whose exit status is used, and the outputs that are written before."""
        self._service, self._outputs = service, outputs
        self._start.take(service)

    def __call__(self) -> None:
        if self._service is None or self._outputs is None:
            return
        if not self._start.over:
            # The process or its reactor ended without a report, for example because hosted code called sys.exit().
            self._start.abandon("the process ended before the service was ready")
        if self._service.exit_status:
            self._outputs.finish()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self._service.exit_status)
