"""`Server`, the backend that serves in one process: start the factory, accept clients, apply limits, and drain."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.counted import counted
from rtservice.events import (
    CONNECTION_LIMIT_UNREACHABLE,
    DRAIN_DONE,
    DRAIN_STARTED,
    FACTORY_FAILED,
    FACTORY_METRICS_REJECTED,
    FACTORY_START_FAILED,
)
from rtservice.hub.hub import Hub
from rtservice.interfaces import IDrainable, IHubUser, IMetrics, IStartable
from rtservice.net.listener import Listener
from rtservice.net.phases import OPEN
from rtservice.net.port import HANDSHAKE_TIMEOUT, Port
from rtservice.process.admission import Limits
from rtservice.process.backend import ConnectionRows, Host
from rtservice.process.counters import DRAIN_ABORTED, DRAIN_ENDED, CounterKey, factory_counters, hub_counters
from rtservice.process.endpoints import Endpoints
from rtservice.process.foreign import ForeignFactory
from rtservice.process.registry import ConnectionRecorder, Registry
from rtservice.process.stall import StallDetector
from rtservice.process.start_errors import log_start_failure, one_line
from rtservice.process.state import State, advance

# Descriptors that the default of --max-connections reserves for listeners, logs and certificate files. It reserves at
# most half of all.
_RESERVED_DESCRIPTORS = 64

# At the end of a drain: seconds without a byte after which a peer counts as not reading, seconds after which every
# connection is aborted, and seconds between two checks.
_FLUSH_STALL, _FLUSH_LIMIT, _FLUSH_STEP = 5.0, 30.0, 1.0

# During a drain: seconds between two notifications of protocols that are new since the last one, and of the service
# manager.
_DRAIN_INTERVAL = 2.0


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings:
    """Settings that may change while the process serves. `handshake_timeout` and `drain_timeout` are in seconds."""

    limits: Limits
    handshake_timeout: float = HANDSHAKE_TIMEOUT
    drain_timeout: float = 30.0
    hub_required: bool = False
    watch_certificates: bool = False


def raise_descriptor_limit() -> int:
    """Raise the limit of open descriptors (RLIMIT_NOFILE, getrlimit(2)) to its hard limit; return the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a sandbox may forbid it
        return soft
    return hard


def _left_for_connections(descriptors: int) -> int:
    return descriptors - min(_RESERVED_DESCRIPTORS, descriptors // 2)


def default_max_connections(descriptors: int, reserved: int = 0) -> int:
    """Return the default of --max-connections for a limit of descriptors, which can be RLIM_INFINITY (-1).

    `reserved` descriptors are reserved for the status server, but at most half of those for connections.
    """
    if descriptors == resource.RLIM_INFINITY:
        return 10_000_000
    left = _left_for_connections(descriptors)
    return max(1, left - min(reserved, left // 2))


def descriptors_for_status(descriptors: int) -> int | None:
    """Return how many descriptors the status server may use, given the limit of the process; None is unlimited."""
    return None if descriptors == resource.RLIM_INFINITY else _left_for_connections(descriptors) // 2


class Server:
    """A backend that serves one factory in this process, on bound listeners and on endpoints of other types.

    Each worker process runs a Server, too. `record` is as in Registry.
    """

    signals: Mapping[int, Callable[[], None]] = {}
    tick_interval = 2.0  # for an operator who has copied a certificate, or reads `systemctl status`
    alive = True  # as long as the reactor runs
    replacing = False
    stopped_before_ready = "stopped before every listener was ready"
    exits_at_once = True

    def __init__(
        self,
        factory: Any,
        *,
        listeners: list[Listener],
        settings: RuntimeSettings,
        log: Logger,
        hub: Hub,
        endpoints: Endpoints | None = None,
        record: ConnectionRecorder | None = None,
    ) -> None:
        self.factory = factory
        self.hub = hub
        self.settings = settings
        self.state = State.STARTING
        self.drain_ended = self.drain_aborted = 0
        self.reactor: Any = None  # set by `start`
        self.listeners = listeners
        self.connections = Registry(log, settings.limits, record)
        self._endpoints = Endpoints([], "", log) if endpoints is None else endpoints
        self._log = log
        self._host: Any = None  # set by `prepare`
        self._factory_counters: dict[CounterKey, float] = {}  # the last ones
        self._metrics_problem = ""  # of the factory's last metrics
        self._started = time.time()
        self._is_ready = False  # `Host.ready` was called
        self._accepts = False  # every listener does
        self._aborted = False
        self._woken: Deferred[None] | None = None  # the drain waits for it
        self._starting: Deferred[None] | None = None
        self._started_factory = False
        self._notifying = LoopingCall(self._continue_drain)
        self._stalls = StallDetector(log)

    # --- start ---

    def prepare(self, host: Host) -> None:
        """Listen on the endpoints. Raises ListenError."""
        self._host = host
        self._endpoints.listen(
            lambda description: ForeignFactory(self.factory, description, self.connections, self._log),
            self._ready_if_all_listen,
            host.failed,
        )

    def start(self, reactor: Any) -> None:
        """Start the factory, then accept. The reactor must be running."""
        self.reactor = reactor
        self._warn_of_descriptors()
        self._starting = Deferred.fromCoroutine(self._start_factory())
        self._starting.addCallbacks(self._accept, self._factory_failed)
        # An exception in one of these callbacks would be lost in the Deferred.
        self._starting.addErrback(self._start_failed)

    async def _start_factory(self) -> None:
        """Start the factory, give it the hub, and wait for its IStartable.start."""
        # Each listener calls doStart, too. This call keeps the factory running until the last connection has ended,
        # and not only until the last listener is closed.
        self.factory.doStart()
        self._started_factory = True
        hub_user = IHubUser(self.factory, None)
        if hub_user is not None:
            self.hub.start(self.reactor)
            hub_user.use(self.hub)
        startable = IStartable(self.factory, None)
        if startable is not None:
            await startable.start()

    def _factory_failed(self, failure: Failure) -> None:
        if self.state is not State.STARTING:  # a drain has cancelled the start
            return
        FACTORY_START_FAILED.failure(self._log, failure, factory=self._factory_name)
        self._host.failed(f"{self._factory_name} did not start: {one_line(failure)}")

    def _start_failed(self, failure: Failure) -> None:
        """End the process: the start failed after the factory had started."""
        accepting = self.connections.ports[-1].name if self.connections.ports else "the service"
        problem = log_start_failure(self._log, f"{accepting} did not start", failure)
        if not self._is_ready:
            self._host.failed(problem)

    @property
    def _factory_name(self) -> str:
        return type(self.factory).__name__

    def _accept(self, result: object) -> None:
        if self.state is not State.STARTING:
            return
        self.connections.start(self.reactor)
        self._stalls.start(self.reactor)
        for listener in self.listeners:
            port = Port(
                self.reactor,
                listener.socket,
                self.factory,
                name=listener.name,
                proxied=listener.proxied,
                tls=listener.tls,
                handshake_timeout=self.settings.handshake_timeout,
                opened=self.connections.opened,
                identified=self.connections.identified,
                closed=self.connections.closed,
                broken=self._broken,
            )
            self.connections.ports.append(port)
            port.startListening()
        self._accepts = True
        self._host.accepting()
        self._ready_if_all_listen()

    def _broken(self, port: Port, reason: Failure) -> None:
        self._host.failed(f"{port.name} cannot accept any more: {reason.getErrorMessage()}")

    def _ready_if_all_listen(self) -> None:
        if self._endpoints.awaited or not self._accepts:
            return
        self._move(State.SERVING)
        self._host.ready()
        self._is_ready = True

    def _move(self, state: State) -> None:
        self.state = advance(self.state, state)

    # --- while it serves ---

    @property
    def status(self) -> str:
        """The state in one line."""
        phases = self.connections.phases()
        unfinished = sum(phases.values()) - phases[OPEN]
        more = f", {unfinished} in a handshake or closing" if unfinished else ""
        return f"{self.state.value}: {counted(phases[OPEN], 'connection')} open{more}{self._hub_status}"

    @property
    def short_status(self) -> str:
        """The state in one line, in constant time."""
        return f"{self.state.value}: {counted(len(self.connections.open), 'connection')}{self._hub_status}"

    @property
    def _hub_status(self) -> str:
        return ", the hub has no connection" if self.hub.started and not self.hub.up else ""

    @property
    def ready(self) -> bool:
        """Whether the server is ready for traffic."""
        has_hub = self.hub.up or not self.hub.started or not self.settings.hub_required
        return self.state is State.SERVING and has_hub

    @property
    def watches_certificates(self) -> bool:
        """Whether to load certificates if their files have changed."""
        return self.settings.watch_certificates and self.state is State.SERVING

    def tick(self) -> None:
        """Do nothing: a server has no periodic checks."""

    def counters(self) -> dict[CounterKey, float]:
        """Return the counters of this server: see `process/counters.py`."""
        self._read_metrics()
        return {
            **self._factory_counters,
            **self.connections.counters(),
            **(hub_counters(self.hub.counters()) if self.hub.used else {}),
            DRAIN_ENDED: self.drain_ended,
            DRAIN_ABORTED: self.drain_aborted,
        }

    def _read_metrics(self) -> None:
        """Read the metrics of a factory that provides IMetrics. If it fails or has stopped, the last ones are kept."""
        if self.state in (State.STARTING, State.STOPPED):
            return
        problem = ""
        try:
            provider = IMetrics(self.factory, None)
            if provider is not None:
                self._factory_counters, problem = factory_counters(provider.metrics())
        except BaseException as error:  # sys.exit() would end the heartbeat of a worker, which would then be killed
            problem = repr(error)
            if problem != self._metrics_problem:
                FACTORY_FAILED.failure(self._log, factory=self._factory_name, method="metrics")
        else:
            if problem and problem != self._metrics_problem:
                FACTORY_METRICS_REJECTED.log(self._log, factory=self._factory_name, problem=problem)
        # This runs once a second. A problem that stays is logged once.
        self._metrics_problem = problem

    def snapshot(self, now: float, process: dict[CounterKey, float]) -> dict[str, Any]:
        """Return the state of this process, as worker 0: see Backend."""
        worker = {
            "worker": 0,
            "pid": os.getpid(),
            "phase": self.state.value,
            "age": now - self._started,
            "counted": now,
            "counters": {**self.counters(), **process},
        }
        return {"workers": [worker], "supervisor": None, "starts": {}, "exits": {}}

    def rows(self, sort: str, count: int) -> Deferred[ConnectionRows]:
        """Return the rows of `Registry.rows`, each preceded by the number of its worker, which is 0."""
        return self.connections.rows(sort, count).addCallback(lambda rows: ([[0, *row] for row in rows], []))

    def refresh(self) -> Deferred[None]:
        """Count the open connections. Fires when that is done."""
        return self.connections.refresh()

    def apply(self, settings: RuntimeSettings) -> None:
        """Replace the settings."""
        self.settings = settings
        self._warn_of_descriptors()
        self.connections.apply(settings.limits)
        for port in self.connections.ports:
            port.handshake_timeout = settings.handshake_timeout

    def _warn_of_descriptors(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limit != resource.RLIM_INFINITY and self.settings.limits.max_connections >= limit:
            connections = self.settings.limits.max_connections
            CONNECTION_LIMIT_UNREACHABLE.log(self._log, connections=connections, limit=limit)

    def served(self) -> list[tuple[Listener, Port]]:
        """Return the listeners, each with the port that accepts on it, once they accept."""
        return list(zip(self.listeners, self.connections.ports, strict=False))

    # --- stop ---

    def abort(self) -> None:
        """Abort open connections, and so end the drain."""
        self._aborted = True
        self._wake()

    def drain(self) -> Deferred[None]:
        """Drain, and close the listening sockets. Fires when that is done."""
        return Deferred.fromCoroutine(self._drain())

    async def _drain(self) -> None:
        connections = self.connections
        if self.reactor is None:
            self._endpoints.stop()
        else:
            began, ended, aborted = self.reactor.seconds(), connections.ended, connections.aborted
            self._move(State.DRAINING)
            if self._starting is not None:
                self._starting.cancel()
            self._host.draining()
            self._host.extend_timeout(self.settings.drain_timeout + _FLUSH_LIMIT)
            DRAIN_STARTED.log(self._log, count=len(connections.open), seconds=self.settings.drain_timeout)
            self._notifying.clock = self.reactor
            self._notifying.start(_DRAIN_INTERVAL, now=False)
            await self._end_connections()
            self._notifying.stop()
            self.drain_aborted = connections.aborted - aborted
            self.drain_ended = connections.ended - ended - self.drain_aborted
            DRAIN_DONE.log(
                self._log,
                ended=self.drain_ended,
                aborted=self.drain_aborted,
                seconds=round(self.reactor.seconds() - began, 1),
            )
        self._read_metrics()
        self._move(State.STOPPED)
        connections.stop()
        self._stalls.stop()
        for listener in self.listeners:
            listener.close()
        if self._host is not None:
            self._host.drained()
        self._stop_factory()
        if self.hub.started:
            await self.hub.stop()

    def _continue_drain(self) -> None:
        self.connections.notify_drain()
        self._host.extend_timeout(_FLUSH_LIMIT)

    def _stop_factory(self) -> None:
        if self._started_factory:
            self._started_factory = False
            try:
                self.factory.doStop()
            except BaseException:
                FACTORY_FAILED.failure(self._log, factory=self._factory_name, method="stopFactory")

    def _notify_factory(self) -> None:
        try:
            drainable = IDrainable(self.factory, None)
            if drainable is not None:
                drainable.drain()
        except BaseException:  # the drain must continue
            FACTORY_FAILED.failure(self._log, factory=self._factory_name, method="drain")

    async def _end_connections(self) -> None:
        connections = self.connections
        connections.when_empty = self._wake_if_empty
        self._endpoints.stop()
        for listener, port in self.served():
            if listener.shared:  # its backlog is left to the successor
                port.stopListening()
                # Without this, a long drain would keep the socket listening after all other processes have closed it.
                listener.socket.close()
            else:
                port.finish().addCallback(self._finished, listener)
        self._notify_factory()
        connections.notify_drain()
        await self._wait(self.settings.drain_timeout)
        for port in connections.ports:
            port.stopListening()
        if not self._aborted:
            connections.close_all("drained")
            steps = int(_FLUSH_LIMIT / _FLUSH_STEP)
            while connections.open and not self._aborted and steps:
                await self._wait(_FLUSH_STEP)
                connections.sweep(_FLUSH_STALL)
                steps -= 1
        if connections.open:
            connections.abort_all("cut off")
            self._aborted = False  # so that the wait for the next turn of the reactor is not skipped
            await self._wait(_FLUSH_STEP)

    def _finished(self, result: object, listener: Listener) -> None:
        """Close a listener whose backlog is empty. New clients are refused, or reach a successor on that address."""
        listener.close()
        self._wake_if_empty()

    async def _wait(self, seconds: float) -> None:
        """Wait until every connection has ended and every backlog is empty, until `abort`, or for `seconds`."""
        if self._aborted:
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
