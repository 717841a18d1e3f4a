"""The main process: signals, start report, systemd, status server, reloads and exit status, around one backend."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import ILogObserver, Logger
from twisted.python.components import Componentized
from twisted.python.failure import Failure

from rtservice.events import (
    CERTIFICATES_CHANGED,
    LISTENER_LISTENING,
    SERVICE_FAILED,
    SERVICE_SERVING,
    START_FAILED,
    STOP_FORCED,
    STOP_REPEATED,
    STOP_REQUESTED,
    TASK_CANCELLED,
    TASK_FAILED,
)
from rtservice.net.description import ListenError
from rtservice.net.tls import fingerprinting
from rtservice.process.backend import Backend, ConnectionRows
from rtservice.process.certificates import certificates_of, logging_certificates
from rtservice.process.meter import ProcessMeter
from rtservice.process.orphans import OrphanReaper
from rtservice.process.signals import Repeats, release
from rtservice.process.slices import in_slices
from rtservice.process.socket_files import close_listeners, remove_files
from rtservice.process.start_errors import StartError, log_start_failure
from rtservice.process.state import State
from rtservice.process.status_server import StatusServer
from rtservice.process.systemd import Notifier
from rtservice.steps import Steps

# Stop signals that are handled in the reactor: the first drains, the second aborts the drain.
_GRACEFUL_SIGNALS = 2


class Reload(Protocol):
    """Reads settings and certificates again, and applies them to the backend. Problems are logged, not raised."""

    def steps(self) -> Steps[bool]:
        """Reload everything that can change while the service runs, or nothing.

        Returns False if the certificates were not read. The next check then loads those whose files have changed.
        """

    def renewal(self) -> Steps[None] | None:
        """Renew certificates whose files have changed, and nothing else; None if that needs a full reload."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The functions of the entry point that a ServiceProcess calls, and the connection to the service manager.

    `check` is called before anything is served. It returns None, or the problem in one line that makes the start fail.
    `report` is called once: with None when every listener accepts, or with the problem in one line when the start has
    failed. `exit_now` ends the process at once, with the `exit_status` of its service. `dropped` returns the number of
    dropped log lines. `protocol` names what is served, and `hint` says how to try and to stop it; the log has both at
    the end of the start. `log_observer` creates the observer that twistd logs with; None leaves that to twistd.
    """

    check: Callable[[], str | None]
    report: Callable[[str | None], None]
    exit_now: Callable[[], None]
    notifier: Notifier
    dropped: Callable[[], int]
    protocol: str
    hint: str
    log_observer: Callable[[], Any] | None


class ServiceProcess(Service):
    """The service that twistd runs in the main process. It drives a backend, and is its Host.

    `make_site` creates the factory of the status server, if that has listeners. It is called once, with this service.

    SIGTERM and SIGINT drain. A second one aborts the drain. A third one ends the process at once, if the backend allows
    it. SIGHUP reloads in slices, between which clients are served. The backend may handle more signals.
    """

    name = "rtservice"

    def __init__(
        self,
        backend: Backend,
        reload: Reload,
        *,
        log: Logger,
        launch: Launch,
        status_server: StatusServer,
        make_site: Callable[[ServiceProcess], Any] = lambda service: None,
    ) -> None:
        self.backend = backend
        self.exit_status = 0
        self.reactor: Any = None  # set by startService
        self._reload = reload
        self._log = log
        self._launch = launch
        self._notifier = launch.notifier
        self._report: Callable[[str | None], None] | None = launch.report
        self._status_server = status_server
        self._fingerprint: object = [
            listener.initial_fingerprint for listener in (*backend.listeners, *status_server.listeners)
        ]
        self._slices: Deferred[None] | None = None  # a reload, or a check of the certificates, in progress
        self._reload_requested = False
        self._reloading = False  # a reload was reported to the service manager, but not yet its end
        self._serves = False  # the backend has been ready
        self._ending = False  # the reactor is about to stop
        self._signals = 0  # stop signals, without repeats
        self._stopped: Deferred[None] | None = None
        self._started = time.time()
        self._repeats = Repeats(lambda: self.reactor.seconds())
        self._reaper = OrphanReaper()
        self._meter = ProcessMeter(launch.dropped)
        self._ticking = LoopingCall(self._tick)
        self._watchdog = LoopingCall(self._notify_watchdog)
        self._site = make_site(self) if status_server else None

    def setServiceParent(self, parent: Any) -> None:
        # twistd logs with the observer of its application, and creates one if there is none.
        if self._launch.log_observer is not None and isinstance(parent, Componentized):
            parent.setComponent(ILogObserver, self._launch.log_observer())
        super().setServiceParent(parent)

    # --- start ---

    def privilegedStartService(self) -> None:
        """Bind the listeners that the backend binds itself. Raises StartError if one cannot be bound."""
        super().privilegedStartService()
        try:
            self.backend.prepare(self)
        except ListenError as error:
            problem = str(error)
        else:
            return
        raise self._start_error(problem)

    def startService(self) -> None:
        """Drop privileges, and start the backend when the reactor runs. Raises StartError."""
        from twisted.internet import reactor

        self.privilegedStartService()  # `twist` does not call it; after twistd has, it does nothing
        problem = self._launch.check()
        if problem is not None:
            raise self._start_error(problem)
        super().startService()
        self.reactor = reactor
        # Before the service is ready: the default action of an early SIGHUP would end the process.
        signal.signal(signal.SIGHUP, self._request_reload)
        for number, action in self.backend.signals.items():
            self._on_signal(number, action)
        # Serve only when the reactor handles signals: a program that reads "listening" may send one at once, which
        # would end the process before it can clean up. Early clients wait in the backlog.
        reactor.callWhenRunning(self._serve)

    def _on_signal(self, number: int, action: Callable[[], None]) -> None:
        signal.signal(number, lambda number, frame: self.reactor.callFromThread(action))

    def _start_error(self, problem: str) -> StartError:
        """Report the problem and clean up. Return the exception to raise before the reactor runs."""
        self._report_failure(problem)
        self.abandon()
        return StartError(problem)

    def abandon(self) -> None:
        """Close the sockets and remove their files, in a process that ends without having served."""
        self._status_server.stop()
        close_listeners(self.backend.listeners, self._log)

    def _serve(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive_stop)
        release()
        if not self.running:  # stopped before the reactor ran
            return
        try:
            self._reaper.start(self.reactor)
            self._ticking.clock = self._watchdog.clock = self.reactor
            self._ticking.start(self.backend.tick_interval, now=False)
            self._status_server.start(self.reactor, self._site)
            self._meter.start(self.reactor)
        except BaseException:  # the reactor would log it and continue
            self.failed(log_start_failure(self._log, "the service did not start", Failure()))
        else:
            self.backend.start(self.reactor)

    def _report_failure(self, problem: str) -> None:
        START_FAILED.log(self._log, problem=problem)
        self._report_start(problem)

    def _report_start(self, problem: str | None) -> None:
        report, self._report = self._report, None
        if report is not None:
            report(problem)

    # --- reports of the backend ---

    def accepting(self) -> None:
        """Log the listeners and their certificates."""
        for listener in self.backend.listeners:
            LISTENER_LISTENING.log(self._log, listener=listener.name)
        self._take(logging_certificates(self._log, self.backend.listeners), "certificate log")

    def ready(self) -> None:
        """Report to the terminal and to the service manager that the service accepts everywhere."""
        self._serves = True
        if self._notifier.watchdog_interval is not None:
            self._watchdog.start(self._notifier.watchdog_interval)
        SERVICE_SERVING.log(self._log, protocol=self._launch.protocol, hint=self._launch.hint)
        self._notifier.ready(self.backend.status)
        self._report_start(None)
        self._reload_if_requested()

    def failed(self, problem: str) -> None:
        """End the process with exit status 1: the start, or a part of the service, has failed."""
        if not self._ending:
            if self._serves:
                SERVICE_FAILED.log(self._log, problem=problem)
            else:
                self._report_failure(problem)
            self.exit_status = 1
            self.backend.abort()  # an incomplete service must not keep running
            self._stop_reactor()

    def draining(self) -> None:
        """Report to the service manager that the drain has begun."""
        self._notifier.stopping(self.backend.status)

    def drained(self) -> None:
        """Stop the status server. A factory that stops slowly must not keep its address from a successor."""
        self._status_server.stop()

    def reloaded(self) -> None:
        """Report the end of a reload, successful or not, to the service manager, after it has reached every worker."""
        if self._reloading and self._slices is None and not self.backend.replacing and not self._ending:
            self._reloading = False
            self._notifier.ready(self.backend.status)

    def extend_timeout(self, seconds: float) -> None:
        """Extend the service manager's timeout to `seconds` from now."""
        self._notifier.extend_timeout(seconds)

    # --- while it serves ---

    @property
    def is_ready(self) -> bool:
        """Whether the service is ready for traffic. False after a stop signal."""
        return self.backend.ready and not self._ending

    @property
    def standing(self) -> tuple[bool, str]:
        """Whether the service is ready for traffic, and the state in one line, in constant time."""
        return self.is_ready, self.backend.short_status

    def overview(self) -> dict[str, Any]:
        """Return the state of the service as plain data."""
        now = time.time()
        return {
            "state": self.backend.state.value,
            "ready": self.is_ready,
            "status": self.backend.status,
            "time": now,
            "started": self._started,
            "listeners": [listener.name for listener in self.backend.listeners],
            "certificates": certificates_of(self.backend.listeners, now),
            **self.backend.snapshot(now, self._meter.counters()),
        }

    def rows(self, sort: str, count: int) -> Deferred[ConnectionRows]:
        """Return rows of open connections: see Backend."""
        return self.backend.rows(sort, count)

    def refresh(self) -> Deferred[None]:
        """Update the counters of open connections for `overview`. Fires when they are current."""
        return self.backend.refresh()

    def _tick(self) -> None:
        try:
            if self.backend.watches_certificates and self._slices is None and not self._ending:
                self._take(self._check_certificates(), "certificate check")
            self.backend.tick()
            if self._notifier.connected:
                self._notifier.status(self.backend.status)
        except BaseException:  # it must not end the LoopingCall
            TASK_FAILED.failure(self._log, task="periodic check")

    def _notify_watchdog(self) -> None:
        if self.backend.alive:
            self._notifier.watchdog()

    # --- reload ---

    def _request_reload(self, number: int, frame: object) -> None:
        self._reload_requested = True
        self.reactor.callFromThread(self._reload_if_requested)

    def _reload_if_requested(self) -> None:
        # One reload serves all signals before it, since it reads files later than they arrived. Two never overlap.
        if self._reload_requested and self._serves and not self._ending and self._slices is None:
            self._reload_requested = False
            self._take(self._reload_steps(), "reload")

    def _reload_steps(self) -> Steps[None]:
        self._reloading = True
        self._notifier.reloading()
        # Before the files are read, so that no change is missed.
        before, self._fingerprint = self._fingerprint, (yield from self._fingerprinting())
        if not (yield from self._reload.steps()):
            self._fingerprint = before

    def _check_certificates(self) -> Steps[None]:
        """Load certificates if their files have changed since they were last loaded."""
        found = yield from self._fingerprinting()
        if found == self._fingerprint:
            return
        CERTIFICATES_CHANGED.log(self._log)
        renewal = self._reload.renewal()
        if renewal is None:
            yield from self._reload_steps()
        else:
            self._fingerprint = found
            yield from renewal

    def _fingerprinting(self) -> Steps[object]:
        found = []
        for listener in (*self.backend.listeners, *self._status_server.listeners):
            found.append((yield from fingerprinting(listener.tls_files())))
        return found

    def _take(self, steps: Steps[None], task: str) -> None:
        """Run these steps in slices. One task runs at a time. A reload that is requested meanwhile follows it."""

        def over(result: object) -> None:
            self._slices = None
            if isinstance(result, Failure):
                if result.check(CancelledError):
                    TASK_CANCELLED.log(self._log, task=task)
                else:
                    TASK_FAILED.failure(self._log, result, task=task)
            self.reloaded()  # without it, the service manager would wait forever
            self._reload_if_requested()

        slices = self._slices = in_slices(steps, self.reactor)
        slices.addBoth(over)  # may call it at once

    # --- stop ---

    def _receive_stop(self, number: int, frame: object) -> None:
        if self._repeats.is_repeat(number):
            return
        self._signals += 1
        if self.backend.exits_at_once and (self.backend.state is State.STOPPED or self._signals > _GRACEFUL_SIGNALS):
            # The process waits for threads, or its reactor is blocked and calls nothing.
            STOP_FORCED.log(self._log, signal=signal.Signals(number).name)
            self.exit_status = self.exit_status or 128 + number
            self._launch.exit_now()
        self.reactor.callFromThread(self._stop, number)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._ending:
            STOP_REQUESTED.log(self._log, signal=name)
            # Twisted's handler would end the process with the same signal after the shutdown.
            self._stop_reactor()
        else:
            STOP_REPEATED.log(self._log, signal=name)
            # The status that shells report for a process that a signal has ended.
            self.exit_status = self.exit_status or 128 + number
            self.backend.abort()

    def _stop_reactor(self) -> None:
        from twisted.internet import reactor

        self._ending = True  # before stopService is called, which is a turn of the reactor later
        reactor.callWhenRunning(reactor.stop)

    def stopService(self) -> Deferred[None]:
        """Drain, close the listening sockets and remove their files. Fires when that is done."""
        self._ending = True
        if self._stopped is None:
            super().stopService()
            self._stopped = Deferred.fromCoroutine(self._drain())
        done: Deferred[None] = Deferred()
        self._stopped.chainDeferred(done)
        return done

    async def _drain(self) -> None:
        self._report_start(self.backend.stopped_before_ready)
        if self._slices is not None:
            self._slices.cancel()
        remove_files(self.backend.listeners, self._log)
        await self.backend.drain()
        for call in (self._ticking, self._watchdog):
            if call.running:
                call.stop()
        self._meter.stop()
        self._reaper.stop()
        self._status_server.stop()
