"""The lifecycle of one serving process: it adopts listening sockets, serves, reloads, drains and stops."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, maybeDeferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure

from rtservice.counted import counted
from rtservice.interfaces import IDrainable, IMetrics, IStartable
from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from rtservice.net.phases import OPEN
from rtservice.net.port import HANDSHAKE_TIMEOUT, Port
from rtservice.net.tls import Steps, fingerprinting
from rtservice.process.admission import Limits
from rtservice.process.certificates import certificates_of, logging_certificates, renewing
from rtservice.process.counters import (
    DRAIN_ABORTED,
    DRAIN_ENDED,
    DROPPED,
    CounterKey,
    Lag,
    factory_counters,
    process_counters,
)
from rtservice.process.foreign import ForeignFactory
from rtservice.process.orphans import Reaper
from rtservice.process.registry import ConnectionRecorder, Registry
from rtservice.process.signals import Repeats, release
from rtservice.process.slices import in_slices
from rtservice.process.stall import StallDetector
from rtservice.process.status_server import StatusServer
from rtservice.process.systemd import Notifier

# Descriptors that the default limit of connections leaves for all else: listeners, logs, certificates that are read.
# Half, where there are few.
_RESERVED_DESCRIPTORS = 64

# At the end of a drain: seconds without a byte after which a peer does not read what is sent to it, and seconds after
# which it is over for everybody.
_FLUSH_STALL, _FLUSH_LIMIT, _FLUSH_STEP = 5.0, 30.0, 1.0

# Signals that a stop may take: one to drain, one to hurry.
_PATIENCE = 2

# Seconds between two looks at the counts and the certificates: what a reader of `systemctl status`, or somebody who has
# just copied a certificate, does not mind waiting for.
_TICK = 2.0


class StartError(SystemExit, Exception):
    """The service cannot start; the text says why, and has been reported.

    Twistd removes the pidfile for an Exception, and the interpreter prints no traceback for a SystemExit: it has to be
    both.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.code = 1  # or the interpreter would print the text once more


def one_line(failure: Failure) -> str:
    """What was raised, in one line."""
    try:
        text = " ".join(str(failure.value).split())
    except BaseException:  # it is hosted code's
        text = ""
    return f"{type(failure.value).__name__}{text and f': {text}'}"


def traceback_level(error: BaseException | None) -> Any:
    """The level at which the traceback of a failed start is logged: it helps nobody where the system refuses a call."""
    return LogLevel.debug if isinstance(error, OSError | MemoryError | KeyboardInterrupt) else LogLevel.error


class State(Enum):
    """Where a serving process stands."""

    STARTING = "starting"  # sockets are bound, and queue clients
    SERVING = "serving"  # every listener accepts
    DRAINING = "draining"  # no new clients; open connections go on, for a while
    STOPPED = "stopped"  # no connection, no listener


_MOVES = {
    State.STARTING: {State.SERVING, State.DRAINING, State.STOPPED},
    State.SERVING: {State.DRAINING},
    State.DRAINING: {State.STOPPED},
    State.STOPPED: set[State](),
}


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """What may change while the process serves: see Limits; and, in seconds, how long handshakes and a drain take."""

    limits: Limits
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    drain_timeout: float = 30.0
    watch_certificates: bool = False


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors (RLIMIT_NOFILE, getrlimit(2)) to its hard limit; gives what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a sandbox that forbids it
        return soft
    return hard


def _left_for_connections(descriptors: int) -> int:
    return descriptors - min(_RESERVED_DESCRIPTORS, descriptors // 2)


def default_max_connections(descriptors: int, beside: int = 0) -> int:
    """How many connections a limit of descriptors allows, which can be unlimited (RLIM_INFINITY is -1).

    `beside` descriptors are reserved for a StatusServer, or half of all, where there are few.
    """
    if descriptors == resource.RLIM_INFINITY:
        return 10_000_000
    left = _left_for_connections(descriptors)
    return max(1, left - min(beside, left // 2))


def descriptors_for_status(descriptors: int) -> int | None:
    """Return how many descriptors of a limit the status server may use, or None for any number."""
    return None if descriptors == resource.RLIM_INFINITY else _left_for_connections(descriptors) // 2


def _one_after_the_other(*works: Steps[None]) -> Steps[None]:
    for steps in works:
        yield from steps


class Server(Service):
    """Serves one factory on listeners, which are bound already, and on endpoints of other kinds.

    `endpoints` are pairs of a description and an IStreamServerEndpoint. They start to listen before privileges are
    dropped; errors say that `listen_setting` gave them. `live` is what `apply` may change later.

    `report` is called once: with None when every listener accepts, or with the line that says why the start failed.
    `check` is called before anything is served, and gives such a line if that must not be. With `reload`, the process's
    signals are the service's: SIGTERM and SIGINT drain and a second one ends that, SIGHUP takes the steps that it
    gives, in slices, between which clients are served. What ends the process is `stop`, or else the reactor's. With
    `announce`, it logs what it listens on and which certificates it shows. `record` is as in Connections.
    `status_server` serves from the start to the very end. `dropped` gives how many log records nobody took. `leave`
    ends the process at once, with its `exit_status`.
    """

    name = "rtservice"

    def __init__(
        self,
        factory: Any,
        *,
        listeners: list[Listener],
        endpoints: list[tuple[str, Any]],
        live: RuntimeSettings,
        log: Logger,
        listen_setting: str = "--listen",
        notifier: Notifier | None = None,
        report: Callable[[str | None], None] = lambda problem: None,
        check: Callable[[], str | None] = lambda: None,
        reload: Callable[[], Steps[None]] | None = None,
        stop: Callable[[], None] | None = None,
        announce: bool = True,
        record: ConnectionRecorder | None = None,
        status_server: StatusServer | None = None,
        dropped: Callable[[], int] = lambda: 0,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.factory = factory
        self.live = live
        self.state = State.STARTING
        self.exit_status = 0
        self.drain_ended = self.drain_aborted = 0
        self.reactor: Any = None  # known from startService on
        self.connections = Registry(log, live.limits, record)
        self._listeners = listeners
        self._endpoints = endpoints
        self._awaited = 0  # endpoints that do not listen yet
        self._others: list[Any] = []  # what those endpoints gave
        self._log = log
        self._listen_setting = listen_setting
        self._notifier = Notifier() if notifier is None else notifier
        self._report: Callable[[str | None], None] | None = report
        self._check = check
        self._reload = reload
        self._stop_process = stop
        self._announce = announce
        self._status_server = StatusServer(log) if status_server is None else status_server
        self._certificates_seen: object = [
            listener.initial_fingerprint for listener in (*listeners, *self._status_server.listeners)
        ]
        self._slices: Deferred[None] | None = None  # a reload, or a look at the certificates, that is under way
        self._dropped = dropped
        self._counted: dict[CounterKey, float] = {}  # by the factory
        self._miscounted = ""  # what was wrong with that
        self._leave = leave
        self._signals = 0
        self._repeats = Repeats(lambda: self.reactor.seconds())
        self._reaper = Reaper()
        self._lag = Lag()
        self._started = time.time()
        self._ticking = LoopingCall(self._tick)
        self._watchdog = LoopingCall(self._notifier.watchdog)
        self._ending = False  # the reactor is told to stop
        self._reload_asked = False
        self._hurried = False
        self._woken: Deferred[None] | None = None  # what the drain waits for
        self._drained: Deferred[None] | None = None
        self._starting: Deferred[None] | None = None
        self._started_factory = False
        self._blocked = StallDetector(log)

    # --- start ---

    def privilegedStartService(self) -> None:
        """Listen where only an endpoint can: raises StartError, with an address that cannot be had."""
        super().privilegedStartService()
        if self._reload is not None:
            # A reload that is asked for too early must not be what SIGHUP is by default.
            signal.signal(signal.SIGHUP, self._hung_up)
        endpoints, self._endpoints = self._endpoints, []
        for description, endpoint in endpoints:
            failures: list[Failure] = []
            self._awaited += 1
            factory = ForeignFactory(self.factory, description, self.connections, self._log)
            started = maybeDeferred(endpoint.listen, factory)
            started.addCallback(self._listening, description)
            started.addErrback(failures.append)
            if failures:
                raise self._cannot_start(f"{self._listen_setting} {description}: {failures[0].getErrorMessage()}")
            # From here on a failure comes later, when privileges may be dropped already: stop, and exit non-zero.
            started.addBoth(self._late_failure, failures, description)

    def _listening(self, port: Any, description: str) -> None:
        self._awaited -= 1
        if self.state not in (State.STARTING, State.SERVING):
            port.stopListening()
            return
        self._others.append(port)
        self._log.info("listening on {listener}", listener=f"{description} ({port.getHost()})")
        self._serving_if_all_listen()

    def _late_failure(self, result: object, failures: list[Failure], description: str) -> None:
        if failures and not self._ending:
            self.fail(f"{self._listen_setting} {description}: {failures[0].getErrorMessage()}")

    def fail(self, problem: str) -> None:
        """End the process: it cannot serve all that it was asked to."""
        self._send_message(problem)
        self.exit_status = 1
        self._hurried = True  # nothing keeps half a service running
        self._stop_reactor()

    def _stop_reactor(self) -> None:
        from twisted.internet import reactor

        self._ending = True  # before stopService is called, which is a turn of the reactor later
        reactor.callWhenRunning(reactor.stop if self._stop_process is None else self._stop_process)

    def _cannot_start(self, problem: str) -> StartError:
        """What to raise before the reactor runs."""
        self._send_message(problem)
        self.abandon()
        return StartError(problem)

    def abandon(self) -> None:
        """Close the sockets and remove their files: the process ends, and has never served."""
        self._close_listeners()

    def _send_message(self, problem: str) -> None:
        self._log.critical("cannot start: {problem}", problem=problem)
        self._reported(problem)

    def _reported(self, problem: str | None) -> None:
        report, self._report = self._report, None
        if report is not None:
            report(problem)

    def startService(self) -> None:
        """Serve. The reactor is needed from here on. Raises StartError."""
        from twisted.internet import reactor

        self.privilegedStartService()  # `twist` knows none; for twistd nothing is left of it
        problem = self._check()
        if problem is not None:
            raise self._cannot_start(problem)
        super().startService()
        self.reactor = reactor
        # Not before the reactor handles signals: a program that reads "listening" may send one, which would end the
        # process before it can clean up. Clients that are early wait in the sockets' queues.
        reactor.callWhenRunning(self._serve)

    def _serve(self) -> None:
        if self._reload is not None:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._signalled)
            release()
        if self.state is not State.STARTING or not self.running:  # stopped before the reactor ran
            return
        try:
            if self._reload is not None:
                self._reaper.start(self.reactor)
            self._status_server.start(self.reactor)
            self._lag.start(self.reactor)
            self._warn_of_descriptors()
        except BaseException:  # the reactor would log it, and go on
            self._start_failed(Failure())
            return
        self._starting = Deferred.fromCoroutine(self._start_factory())
        self._starting.addCallbacks(self._accept, self._factory_failed)
        # What either of them raises would be lost in the Deferred.
        self._starting.addErrback(self._start_failed)

    async def _start_factory(self) -> None:
        """Have the factory do what it wants to have done before anybody connects."""
        # Once more than each listener does, so that it is stopped when the last connection is gone, and not the last
        # listener.
        self.factory.doStart()
        self._started_factory = True
        startable = IStartable(self.factory, None)
        if startable is not None:
            await startable.start()

    def _factory_failed(self, failure: Failure) -> None:
        if self.state is not State.STARTING or self._ending:  # it is stopped, and so was this
            return
        self._log.failure("{factory} failed", failure, LogLevel.debug, factory=self._factory_name)
        self.fail(f"{self._factory_name} did not start: {one_line(failure)}")

    def _start_failed(self, failure: Failure) -> None:
        """End the process: something else of its start has failed."""
        self._log.failure("the start failed", failure, traceback_level(failure.value))
        if self._report is not None and not self._ending:
            accepting = self.connections.ports[-1].name if self.connections.ports else "the service"
            self.fail(f"{accepting} did not start: {one_line(failure)}")

    @property
    def _factory_name(self) -> str:
        return type(self.factory).__name__

    def _accept(self, result: object) -> None:
        if self.state is not State.STARTING or not self.running:
            return
        self.connections.start(self.reactor)
        self._blocked.start(self.reactor)
        for listener in self._listeners:
            port = Port(
                self.reactor,
                listener.socket,
                self.factory,
                name=listener.name,
                proxied=listener.proxied,
                tls=listener.tls,
                handshake_timeout=self.live.handshake_timeout,
                opened=self.connections.opened,
                identified=self.connections.identified,
                closed=self.connections.closed,
                broken=self._broken,
            )
            self.connections.ports.append(port)
            port.startListening()
            if self._announce:
                self._log.info("listening on {listener}", listener=listener.name)
        if self._announce:
            self._take(logging_certificates(self._log, self._listeners), "logging the certificates")
        self._serving_if_all_listen()

    def _broken(self, port: Port, reason: Failure) -> None:
        if not self._ending:
            self.fail(f"{port.name} accepts no more: {reason.getErrorMessage()}")

    def _serving_if_all_listen(self) -> None:
        if self._awaited or len(self.connections.ports) < len(self._listeners) or self.reactor is None:
            return
        self._move(State.SERVING)
        self._ticking.clock = self._watchdog.clock = self.reactor
        self._ticking.start(_TICK, now=False)
        if self._notifier.watchdog_interval is not None:
            self._watchdog.start(self._notifier.watchdog_interval)
        self._notifier.ready(self.status)
        self._reported(None)
        self._reload_if_asked()

    def _move(self, state: State) -> None:
        if state not in _MOVES[self.state]:
            raise RuntimeError(f"a process that is {self.state.value} cannot become {state.value}")
        self.state = state

    # --- while it serves ---

    @property
    def status(self) -> str:
        """One line on how it stands."""
        phases = self.connections.phases()
        unfinished = sum(phases.values()) - phases[OPEN]
        more = f", {unfinished} in a handshake or closing" if unfinished else ""
        return f"{self.state.value}: {counted(phases[OPEN], 'connection')} open{more}"

    @property
    def ready(self) -> bool:
        """Whether it is a place to send clients to."""
        return self.state is State.SERVING and not self._ending

    def counters(self) -> dict[CounterKey, float]:
        """What this process has counted: see `process.counters`."""
        self._ask_factory()
        return {
            **self._counted,
            **self.connections.counters(),
            **self._lag.counters(),
            **process_counters(),
            DRAIN_ENDED: self.drain_ended,
            DRAIN_ABORTED: self.drain_aborted,
            DROPPED: self._dropped(),
        }

    def _ask_factory(self) -> None:
        """Ask the factory what it has counted, if it counts. What it said last stays when it fails or is stopped."""
        if self.state in (State.STARTING, State.STOPPED):
            return
        problem = ""
        try:
            counting = IMetrics(self.factory, None)
            if counting is not None:
                self._counted, problem = factory_counters(counting.metrics())
        except BaseException as error:  # sys.exit() would end the beat of a worker, and so the worker
            problem = repr(error)
            if problem != self._miscounted:
                self._log.failure("{factory} failed in metrics", factory=self._factory_name)
        else:
            if problem and problem != self._miscounted:
                self._log.warn(
                    "{factory} counts what cannot be shown: {problem}", factory=self._factory_name, problem=problem
                )
        # It is asked once a second, and says the same each time.
        self._miscounted = problem

    def overview(self) -> dict[str, Any]:
        """How the service stands, as plain data."""
        now = time.time()
        worker = {
            "worker": 0,
            "pid": os.getpid(),
            "phase": self.state.value,
            "age": now - self._started,
            "counted": now,
            "counters": self.counters(),
        }
        return {
            "state": self.state.value,
            "ready": self.ready,
            "status": self.status,
            "time": now,
            "started": self._started,
            "listeners": [listener.name for listener in self._listeners],
            "certificates": certificates_of(self._listeners, now),
            "workers": [worker],
            "supervisor": None,
            "starts": {},
            "exits": {},
        }

    def rows(self, sort: str, count: int) -> Deferred[tuple[list[list[Any]], list[int]]]:
        """Connections as `Registry.rows` has them, each after its worker's number; and workers without an answer."""
        return self.connections.rows(sort, count).addCallback(lambda rows: ([[0, *row] for row in rows], []))

    def refresh(self) -> Deferred[None]:
        """Have `overview` count all connections that are open now; fires when it has."""
        return self.connections.refresh()

    @property
    def standing(self) -> str:
        """One line on how it stands, which takes no look at each connection."""
        return f"{self.state.value}: {counted(len(self.connections.open), 'connection')}"

    def _tick(self) -> None:
        if self._notifier.connected:
            self._notifier.status(self.status)
        if self.state is State.DRAINING:
            self.connections.notify_drain()
            self._notifier.extend_timeout(_FLUSH_LIMIT)
        elif self.live.watch_certificates and self._slices is None:
            self._take(self._look_at_certificates(), "a look at the certificates")

    def apply(self, live: RuntimeSettings) -> None:
        """Serve by these from now on."""
        self.live = live
        self._warn_of_descriptors()
        self.connections.apply(live.limits)
        for port in self.connections.ports:
            port.handshake_timeout = live.handshake_timeout

    def _warn_of_descriptors(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY and self.live.limits.max_connections >= limit:
            self._log.warn(
                "--max-connections {connections} is never reached: the limit of descriptors is {limit}",
                connections=self.live.limits.max_connections,
                limit=limit,
            )

    def _hung_up(self, number: int, frame: object) -> None:
        self._reload_asked = True
        if self.reactor is not None:
            self.reactor.callFromThread(self._reload_if_asked)

    def _reload_if_asked(self) -> None:
        # One reload for all signals before it: what it reads is newer than them. And one after the other.
        if self._reload is None or not self._reload_asked or self._ending or self._slices is not None:
            return
        if self.state is not State.SERVING:
            return
        self._reload_asked = False
        self._log.info("SIGHUP: reloading")
        self._notifier.reloading()
        self._take(self._reload(), "a reload", self._reloaded)

    def _reloaded(self) -> None:
        # However it went, or the service manager would wait for ever.
        if not self._ending:
            self._notifier.ready(self.status)

    def _take(self, steps: Steps[None], what: str, done: Callable[[], None] = lambda: None) -> None:
        """Take these steps in slices, with `done` at their end. There is one such work at a time."""

        def over(result: object) -> None:
            self._slices = None
            if isinstance(result, Failure):
                if result.check(CancelledError):
                    self._log.info("{what} is given up: the service stops", what=what)
                else:
                    self._log.failure("{what} failed", result, what=what)
            done()
            self._reload_if_asked()

        slices = self._slices = in_slices(steps, self.reactor)
        slices.addBoth(over)  # which may be at once

    # --- certificates ---

    def renewing_certificates(self) -> Steps[Callable[[], Steps[None]]]:
        """Read and check the certificates of every listener again; gives what puts them in force for new connections.

        That gives the steps that log them and free those of before. Raises ListenError, and nothing has changed.
        """
        self._certificates_seen = yield from self._fingerprinting()
        served = [*zip(self._listeners, self.connections.ports, strict=True), *self._status_server.served()]
        adopt = yield from renewing(served)

        # Not a generator, which would do nothing before its first step.
        def adopt_and_log() -> Steps[None]:
            freeing = adopt()
            return _one_after_the_other(logging_certificates(self._log, self._listeners), freeing)

        return adopt_and_log

    def _fingerprinting(self) -> Steps[object]:
        found = []
        for listener in (*self._listeners, *self._status_server.listeners):
            found.append((yield from fingerprinting(listener.tls_files())))
        return found

    def _look_at_certificates(self) -> Steps[None]:
        """Renew them if their files have changed since the last time that this was tried."""
        if (yield from self._fingerprinting()) == self._certificates_seen:
            return
        self._log.info("certificates have changed: loading them")
        try:
            adopt = yield from self.renewing_certificates()
        except ListenError as problem:
            self._log.error("the certificates in force stay: {problem}", problem=problem)
        else:
            yield from adopt()

    # --- stop ---

    def _signalled(self, number: int, frame: object) -> None:
        if self._repeats.is_repeat(number):
            return
        self._signals += 1
        if self.state is State.STOPPED or self._signals > _PATIENCE:
            # Threads are waited for, or the reactor is blocked: it would not hear of this.
            self._log.error("{signal}: ended as it is", signal=signal.Signals(number).name)
            self.exit_status = self.exit_status or 128 + number
            self._leave()
        self.reactor.callFromThread(self._stop, number)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._ending:
            self._log.info("{signal}: stopping", signal=name)
            # Twisted's own handler would end the process by the same signal after all is done.
            self._stop_reactor()
        else:
            self._log.info("{signal}: not waiting any longer", signal=name)
            # As shells say it: it did not end on its own terms.
            self.exit_status = self.exit_status or 128 + number
            self.abort_drain()

    def abort_drain(self) -> None:
        """End a drain now: what is still open is aborted."""
        self._hurried = True
        self._wake()

    def stopService(self) -> Deferred[None]:
        """Drain, close the listening sockets and remove their files. Fires when that is done."""
        self._ending = True
        if self._drained is None:
            super().stopService()
            self._drained = Deferred.fromCoroutine(self._drain())
        done: Deferred[None] = Deferred()
        self._drained.chainDeferred(done)
        return done

    async def _drain(self) -> None:
        self._reported("told to stop before every listener was ready")
        if self._slices is not None:
            self._slices.cancel()
        if self._starting is not None:
            self._starting.cancel()
        connections = self.connections
        if self.reactor is not None and self.state is not State.STOPPED:
            began, ended, aborted = self.reactor.seconds(), connections.ended, connections.aborted
            self._move(State.DRAINING)
            self._notifier.stopping(self.status)
            self._notifier.extend_timeout(self.live.drain_timeout + _FLUSH_LIMIT)
            self._log.info(
                "draining: {connections} {have} {seconds:g} s to end",
                connections=counted(len(connections.open), "connection"),
                have="has" if len(connections.open) == 1 else "have",
                count=len(connections.open),
                seconds=self.live.drain_timeout,
            )
            await self._end_connections()
            self.drain_aborted = connections.aborted - aborted
            self.drain_ended = connections.ended - ended - self.drain_aborted
            self._log.info(
                "drained: {ended} ended, {aborted} aborted, {seconds} s",
                ended=self.drain_ended,
                aborted=self.drain_aborted,
                seconds=round(self.reactor.seconds() - began, 1),
            )
        self._ask_factory()
        self._move(State.STOPPED)
        for repeated in (self._ticking, self._watchdog):
            if repeated.running:
                repeated.stop()
        connections.stop()
        self._blocked.stop()
        self._lag.stop()
        self._reaper.stop()
        self._close_listeners()
        self._stop_factory()

    def _stop_factory(self) -> None:
        if self._started_factory:
            self._started_factory = False
            try:
                self.factory.doStop()
            except BaseException:
                self._log.failure("{factory} failed in stopFactory", factory=self._factory_name)

    def _tell_factory(self) -> None:
        try:
            drainable = IDrainable(self.factory, None)
            if drainable is not None:
                drainable.drain()
        except BaseException:  # the drain is everybody's
            self._log.failure("{factory} failed in drain", factory=self._factory_name)

    async def _end_connections(self) -> None:
        connections = self.connections
        connections.when_empty = self._wake_if_empty
        for port in self._others:
            maybeDeferred(port.stopListening).addErrback(self._not_stopped)
        for listener, port in zip(self._listeners, connections.ports, strict=False):
            if listener.shared:  # its queue is the successor's
                port.stopListening()
                # Or who drains for long would keep it listening after all others have closed it.
                listener.socket.close()
            else:
                self._remove_file(listener)
                port.finish().addCallback(self._finished, listener)
        self._tell_factory()
        connections.notify_drain()
        await self._wait(self.live.drain_timeout)
        for port in connections.ports:
            port.stopListening()
        if not self._hurried:
            connections.close_all("drained")
            steps = int(_FLUSH_LIMIT / _FLUSH_STEP)
            while connections.open and not self._hurried and steps:
                await self._wait(_FLUSH_STEP)
                connections.sweep(_FLUSH_STALL)
                steps -= 1
        if connections.open:
            connections.abort_all("cut off")
            self._hurried = False  # it takes one more turn of the reactor, and no more of anybody's patience
            await self._wait(_FLUSH_STEP)

    def _finished(self, result: object, listener: Listener) -> None:
        """Its queue is empty. New clients are refused, or find a successor on the same address."""
        listener.close()
        self._wake_if_empty()

    async def _wait(self, seconds: float) -> None:
        """Until there is no connection and no queue any more, or somebody hurries, or for so long."""
        if self._hurried:
            return
        woken = self._woken = Deferred()
        timer = self.reactor.callLater(seconds, self._wake)
        self._wake_if_empty()
        await woken
        if timer.active():
            timer.cancel()

    def _wake_if_empty(self) -> None:
        if not self.connections.open and not any(port.listening for port in self.connections.ports):
            self._wake()

    def _wake(self) -> None:
        woken, self._woken = self._woken, None
        if woken is not None:
            woken.callback(None)

    def _not_stopped(self, failure: Failure) -> None:
        self._log.failure("a listener failed to stop", failure)

    def _close_listeners(self) -> None:
        self._status_server.stop()
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            self._remove_file(listener)
            listener.close()

    def _remove_file(self, listener: Listener) -> None:
        try:
            listener.remove_file()
        except OSError as problem:
            # After privileges were dropped the directory may not be ours; the next start takes the file over.
            self._log.warn(
                "{listener}: its socket file stays: {problem}", listener=listener.name, problem=problem.strerror
            )
