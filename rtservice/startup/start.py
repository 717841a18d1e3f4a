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
from rtservice.pool.pool import WorkerPool
from rtservice.process import signals
from rtservice.process.server import Server, traceback_level
from rtservice.startup.credentials import Credentials, CredentialsError
from rtservice.startup.outputs import Outputs
from rtservice.startup.preflight import (
    reason,
)


class StartReporter:
    """A start, from the options to the service that serves. What fails meanwhile ends the process with one line.

    What Twisted does between `makeService` and the reactor may raise, too, and would be a traceback: `watch` has it
    reported like all else, and the sockets of `service` closed.
    """

    service: Server | WorkerPool | None = None

    def __init__(self, twistd: Any) -> None:
        self._twistd = twistd
        self._credentials = Credentials()
        self._log: Log | None = None
        self._pipe: int | None = None
        self._terminal: int | None = None
        self._hook: Callable[..., object] | None = None
        self._forks = 0  # that are still to come
        self.over = False  # it went well, or has been reported

    def watch(self) -> None:
        """Report what nobody catches, until the start is over."""
        self._hook, sys.excepthook = sys.excepthook, self._uncaught

    def prepare(self, credentials: Credentials, log: Log) -> None:
        """Keep the terminal, which is not 2 any more once twistd has daemonized, and have `check` change the user."""
        self._log = log
        self._terminal = os.dup(2)
        self._credentials = credentials
        for option in ("uid", "gid"):
            # Twistd fails for a user without a passwd entry, and believes what a system call says.
            if option in self._twistd:
                self._twistd[option] = None

    def expect_forks(self) -> None:
        """Prepare for the two forks by which twistd becomes a daemon. Nothing else is to fork before them."""
        self._forks = 2
        os.register_at_fork(after_in_parent=self._forked, after_in_child=self._forked_off)

    def _forked(self) -> None:
        """This process waits for the daemon now, at a pipe of which it has both ends, or exits.

        Twisted leaves it the end to write to: it would wait for ever for a daemon that is killed before it serves.
        """
        if self._forks:
            self._forks = 0
            for descriptor in range(3, self._next_descriptor()):
                with contextlib.suppress(OSError):
                    if _is_written(descriptor):
                        os.close(descriptor)

    @staticmethod
    def _next_descriptor() -> int:
        """A number above those of all descriptors that matter: they are given from the lowest one on."""
        descriptor = os.dup(2)
        os.close(descriptor)
        return descriptor

    def _forked_off(self) -> None:
        """This process is, or will be, the daemon."""
        if self._forks:
            self._forks -= 1
            signals.hold()

    def check(self) -> str | None:
        """Drop privileges; called when all is bound and nothing is served. Returns what is wrong, if anything is."""
        self._take_pipe()
        try:
            self._credentials.assume()
        except CredentialsError as error:
            return str(error)
        if self._credentials and self._log is not None:
            PRIVILEGES_DROPPED.log(self._log, uid=self._credentials.uid, gid=self._credentials.gid)
        return None

    def report(self, problem: str | None) -> None:
        """The start is over, and went well or not."""
        self.over = True
        if self._hook is not None and sys.excepthook == self._uncaught:  # hosted code may have put its own in front
            sys.excepthook = self._hook
        self._take_pipe()
        if problem is None:
            self._answer(b"0")
        else:
            with contextlib.suppress(OSError):  # nobody reads it any more
                os.write(self._terminal or 2, f"rtservice: {escaped(problem)}\n".encode())
            # The command returns when all is cleaned up: who tries again at once finds no pidfile and no port in use.
            atexit.register(self._answer, b"1 rtservice did not start")
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def abandon(self, problem: str) -> None:
        """Report the problem, and leave nothing behind."""
        if self.service is not None:
            self.service.exit_status = self.service.exit_status or 1
            self.service.abandon()
        self.report(problem)

    def _uncaught(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if self.over and self._hook is not None:  # what hosted code has put in front calls this still
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
        # When twistd daemonizes, the command that was typed waits at this pipe for a word. Twistd would say too early
        # that all is well, and of an error the first 98 bytes.
        if self._twistd.get("statusPipe") is not None:
            self._pipe, self._twistd["statusPipe"] = self._twistd["statusPipe"], None


def _is_written(descriptor: int) -> bool:
    """Whether it is the end of a pipe that is written to; raises OSError."""
    how = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
    return how == os.O_WRONLY and stat.S_ISFIFO(os.fstat(descriptor).st_mode)


def unexpected(error: BaseException) -> str:
    """What nobody expected to be raised in a start, in one line."""
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
    """Ends the process with the status of its service, if that is not 0: twistd's is 0, whatever stops its reactor."""

    service: Server | WorkerPool | None = None
    outputs: Outputs | None = None

    def __init__(self, start: StartReporter) -> None:
        self._start = start

    def __call__(self) -> None:
        if self.service is not None and not self._start.over:
            # Somebody has ended the process, or its reactor, in a way that nobody was told of.
            self._start.abandon("the process ended before it served")
        if self.service is not None and self.outputs is not None and self.service.exit_status:
            self.outputs.finish()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.service.exit_status)
