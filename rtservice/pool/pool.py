"""The supervisor: spawn a worker process with its sockets for each slot, watch the workers, and replace them."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.error import ProcessDone
from twisted.logger import LogEvent, Logger, globalLogPublisher
from twisted.python.failure import Failure

from rtservice.counted import counted
from rtservice.events import (
    DRAIN_DONE,
    RELOAD_DONE,
    SLOT_NOT_ADDED,
    SLOT_NOT_REMOVED,
    SLOT_REMOVED,
    WORKER_ENDED,
    WORKER_KILLED,
    WORKER_NOT_REPLACED,
    WORKER_READY,
    WORKER_RESTARTING,
    WORKER_SPAWN_FAILED,
    WORKER_TOO_LARGE,
    WORKER_TOO_OLD,
    WORKER_UNLINKED,
)
from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from rtservice.pool.control import BEAT, CONTROL_IN, CONTROL_OUT, FIRST_SOCKET, LINK_CHANNEL
from rtservice.pool.mesh_links import LinkChannel, MeshLinks
from rtservice.pool.query import Queries
from rtservice.pool.rollout import Rollout, backoff_of_death, count_replacement
from rtservice.pool.slot import Slot
from rtservice.pool.totals import Totals, signal_name
from rtservice.pool.worker_messages import WorkerMessages
from rtservice.pool.worker_process import KILL_AFTER, WorkerProcess, WorkerSpec
from rtservice.process.backend import ConnectionRows, Host
from rtservice.process.counters import DRAIN_ABORTED, DRAIN_ENDED, MEMORY, OPEN_CONNECTIONS, CounterKey
from rtservice.process.start_errors import log_start_failure
from rtservice.process.state import State, advance

# Seconds that a worker may take until it is ready: for its interpreter on a busy machine; and for each certificate and
# each worker. A certificate takes 1 to 3 ms, and all workers load them at the same time.
_START_DEADLINE, _START_OF_CERTIFICATE = 60.0, 0.01

# Seconds between two checks after which this process counts as stalled.
_STALL = 5.0


class WorkerPool:
    """A backend that serves with a worker process for each of `slots` slots.

    `listeners` have a socket for each slot, if their type allows it (Listener.slot_sockets). Workers are started with
    `spec`, until `apply` replaces it, by `command`. `access` is called with each line for the access log; without it, a
    worker must not send any.

    SIGTTIN adds a slot, and SIGTTOU removes one.
    """

    tick_interval = BEAT
    stopped_before_ready = "stopped before every worker was ready"
    exits_at_once = False  # its workers would continue to run

    def __init__(
        self,
        *,
        listeners: list[Listener],
        slots: int,
        spec: WorkerSpec,
        command: list[str],
        log: Logger,
        access: Callable[[str], None] | None = None,
    ) -> None:
        self.log = log
        self.listeners = listeners
        self.reactor: Any = None  # set by `start`
        self.slots = [Slot(number) for number in range(slots)]
        self.state = State.STARTING
        self.totals = Totals()
        self._access = access
        self._host: Any = None  # set by `prepare`
        self._queries = Queries()
        self._mesh = MeshLinks()
        self._rollout = Rollout()
        self._target_slots = slots
        self._spec = spec
        self._command = command
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._spawn_problem = ""  # of the last process that could not be spawned
        self._checked = 0.0  # the time of the last check, by the reactor's clock
        self._accepting: list[int] = []  # the slots that get new clients
        self._drained: Deferred[None] = Deferred()  # fires when the last worker has ended

    # --- start ---

    def prepare(self, host: Host) -> None:
        """Keep the host. A pool has no endpoints to listen on."""
        self._host = host

    @property
    def signals(self) -> Mapping[int, Callable[[], None]]:
        """Handlers of the signals that add and remove slots."""
        return {signal.SIGTTIN: self.add_slot, signal.SIGTTOU: self.remove_slot}

    def start(self, reactor: Any) -> None:
        """Spawn the workers."""
        self.reactor = reactor
        try:
            self._start()
        except BaseException:  # the reactor would log it and continue
            self._host.failed(log_start_failure(self.log, "the workers cannot be started", Failure()))

    def _start(self) -> None:
        self._checked = self.reactor.seconds()
        if self.start_deadline > _START_DEADLINE:  # the start timeout of the unit does not allow for many certificates
            self._host.extend_timeout(self.start_deadline)
        for slot in self.slots:
            slot.worker = self._spawn(slot)
            if slot.worker is None:
                self._host.failed(self._spawn_problem)
                return

    @property
    def start_deadline(self) -> float:
        """Seconds that a worker may take until it is ready."""
        count = sum(len(listener.certificates) for listener in self.listeners)
        return _START_DEADLINE + int(_START_OF_CERTIFICATE * count * len(self.slots))

    def _spawn(self, slot: Slot) -> WorkerProcess | None:
        """Spawn a worker for a slot. Return None if the system rejects it; after the start this is also logged."""
        try:
            worker = self._spawn_process(slot)
        except OSError as problem:
            # Most often the user of --uid may not run the interpreter.
            self._spawn_problem = f"no worker can be spawned: {self._command[0]}: {problem.strerror}"
            if self.state is not State.STARTING:
                WORKER_SPAWN_FAILED.log(self.log, slot=slot.number, problem=self._spawn_problem)
            return None
        self.totals.count_start(slot.number)
        worker.send("start", self._spec.start(slot.number, len(self.slots)))
        return worker

    def _spawn_process(self, slot: Slot) -> WorkerProcess:
        """Spawn a worker process. Raises OSError."""
        link_channel = LinkChannel(self.reactor)
        worker = WorkerProcess(
            self,
            slot.number,
            self._spec,
            messages=WorkerMessages(
                slot=slot.number,
                listeners=frozenset(listener.name for listener in self.listeners),
                access=self._access is not None,
            ),
            counter_bounds=self.totals.counters_of(slot.number),
            link_channel=link_channel,
        )
        try:
            with open(os.devnull, "rb") as nothing, link_channel.inherited as inherited:
                descriptors: dict[int, Any] = {0: nothing.fileno(), 1: "r", 2: "r", CONTROL_IN: "w", CONTROL_OUT: "r"}
                descriptors[LINK_CHANNEL] = inherited.fileno()
                for place, listener in enumerate(self.listeners):
                    descriptors[FIRST_SOCKET + place] = listener.of_slot(slot.number).fileno()
                command = self._command
                self.reactor.spawnProcess(worker, command[0], command, self._environment, childFDs=descriptors)
        except OSError:
            link_channel.close()
            raise
        return worker

    # --- reports of workers ---

    def worker_ready(self, worker: WorkerProcess) -> None:
        """Drain the predecessor of a worker that has become ready."""
        slot = self.slots[worker.slot]
        if slot.successor is worker:
            assert slot.worker is not None
            slot.old.append(slot.worker)
            slot.worker.drain()
            slot.worker, slot.successor = worker, None
        WORKER_READY.log(self.log, **worker.identity)
        if self.state is State.STARTING and all(slot.ready for slot in self.slots):
            self._move(State.SERVING)
            self._host.accepting()
            self._host.ready()
        self._reconcile()

    def worker_leaves(self, worker: WorkerProcess) -> None:
        """Replace a worker that received a stop signal, unless it is not serving or is being replaced already."""
        slot = self.slots[worker.slot]
        if worker is slot.worker and slot.ready and slot.successor is None and slot not in self._rollout:
            worker.wants_to_leave = True
            self._replace_if_needed(slot, self.reactor.seconds())

    def worker_joins_mesh(self, worker: WorkerProcess) -> None:
        """Link a worker that uses the hub with the others that do."""
        try:
            silent = self._mesh.add(worker.link_channel)
        except OSError as problem:
            self._unlinked(worker, f"no socket can be created: {problem.strerror}")
            return
        for other in self._workers():
            if other.link_channel in silent:
                self._unlinked(other, "it does not read its link channel")

    def peer_problem(self, worker: WorkerProcess, incarnation: int, problem: str) -> None:
        """Kill a worker that another one reports: its links cannot be used any more."""
        channel = self._mesh.channel_of(incarnation)
        for other in self._workers():
            if other.link_channel is channel and other is not worker:
                self._unlinked(other, f"{worker} reports that it {problem}")

    def _unlinked(self, worker: WorkerProcess, problem: str) -> None:
        WORKER_UNLINKED.log(self.log, **worker.identity, problem=problem)
        worker.signal(signal.SIGKILL)

    def worker_exited(self, worker: WorkerProcess) -> None:
        """Close the links of a worker whose process has ended."""
        self._mesh.remove(worker.link_channel)

    def worker_gone(self, worker: WorkerProcess, reason: Failure) -> None:
        """Remove a worker whose process has ended from its slot. The slot gets another worker if it needs one."""
        slot = self.slots[worker.slot]
        self.totals.count_end(worker, reason)
        self._queries.worker_gone(worker)
        outcome = self._log_end(worker, reason)
        if worker in slot.old:
            slot.old.remove(worker)
        elif worker is slot.successor:
            slot.successor = None
            # A worker with an older spec says nothing about the current one.
            if not self._is_draining() and worker.spec is self._spec:
                self._stop_rollout(f"{worker} cannot take over: {worker.problem or outcome}")
        elif worker is slot.worker:
            slot.worker, slot.successor = slot.successor, None
            if self._is_draining() or (slot.being_removed and reason.check(ProcessDone)):
                pass
            elif self.state is State.STARTING:
                self._host.failed(worker.problem or f"{worker} {outcome}")
            elif slot.worker is None:
                # Clients may be left in the backlog of a slot that is being removed: it gets a worker again.
                slot.being_removed = False
                self._respawn_later(slot, worker, worker.problem or f"{worker} {outcome}")
        self._reconcile()

    def _log_end(self, worker: WorkerProcess, reason: Failure) -> str:
        """Log how a worker process has ended. Return it as text."""
        number: int | None = getattr(reason.value, "signal", None)
        if number is not None:
            name = signal_name(number)
            WORKER_KILLED.log(self.log, **worker.identity, signal=name)
            return f"was ended by {name}"
        status: int = getattr(reason.value, "exitCode", None) or 0
        WORKER_ENDED.log(self.log, **worker.identity, exit_status=status)
        return f"ended with status {status}"

    def answered(self, worker: WorkerProcess, number: int, rows: list[list[Any]]) -> None:
        """Pass a worker's answer to its query."""
        self._queries.answered(worker, number, rows)

    def publish(self, event: LogEvent) -> None:
        """Log a record of a worker."""
        globalLogPublisher(event)

    def access(self, lines: list[str]) -> None:
        """Write a worker's lines to the access log."""
        assert self._access is not None
        for line in lines:
            self._access(line)

    def _respawn_later(self, slot: Slot, worker: WorkerProcess | None, problem: str) -> None:
        seconds = backoff_of_death(slot, worker, self.reactor.seconds(), random.random())
        WORKER_RESTARTING.log(self.log, slot=slot.number, seconds=seconds, problem=problem)
        slot.respawn = self.reactor.callLater(seconds, self._respawn, slot)

    def _respawn(self, slot: Slot) -> None:
        slot.respawn = None
        slot.worker = self._spawn(slot)
        if slot.worker is None:
            self._respawn_later(slot, None, self._spawn_problem)

    def _workers(self) -> list[WorkerProcess]:
        return [worker for slot in self.slots for worker in slot.workers()]

    # --- regular checks ---

    def tick(self) -> None:
        """Kill workers that hang, choose the slots that get new clients, and replace a worker that needs it."""
        now = self.reactor.seconds()
        elapsed = now - self._checked
        self._checked = now
        for worker in self._workers():
            if elapsed > _STALL:  # the supervisor itself did not run, and received no heartbeats
                worker.extend_deadline(elapsed)
            worker.check_health(now)
        self._spread()
        if self._is_draining():
            self._host.extend_timeout(KILL_AFTER)
        elif self._may_replace(now):
            for slot in self.slots:
                if slot.ready and (self._replace_if_old(slot, now) or self._replace_if_needed(slot, now)):
                    break

    @property
    def alive(self) -> bool:
        """Whether every worker that hung has been killed."""
        now = self.reactor.seconds()
        return not any(worker.is_overdue(now) for worker in self._workers())

    @property
    def watches_certificates(self) -> bool:
        """Whether to replace workers now if certificate files have changed."""
        return self._spec.watch_certificates and self._may_replace(self.reactor.seconds())

    def _may_replace(self, now: float) -> bool:
        """Whether workers may be replaced for a reason other than SIGHUP."""
        return self.state is State.SERVING and not self._is_replacing() and not self._rollout.is_paused(now)

    def _replace_if_old(self, slot: Slot, now: float) -> bool:
        """Replace a worker that has reached --max-worker-age. Return whether it is replaced."""
        worker = slot.worker
        assert worker is not None
        if not worker.spec.max_age or now - worker.began < worker.age:
            return False
        WORKER_TOO_OLD.log(self.log, **worker.identity)
        self._replace([slot])
        return True

    def _replace_if_needed(self, slot: Slot, now: float) -> bool:
        """Replace a worker that asked for it or is too large, after the back-off. Return whether it is replaced."""
        worker = slot.worker
        if worker is None or now < slot.replace_after or not (worker.wants_to_leave or self._has_grown(worker)):
            return False
        count_replacement(slot, worker, now, random.random())
        self._replace([slot])
        return True

    def _has_grown(self, worker: WorkerProcess) -> bool:
        memory = worker.counters.get(MEMORY, 0)
        if not worker.spec.max_memory or memory <= worker.spec.max_memory:
            return False
        WORKER_TOO_LARGE.log(self.log, **worker.identity, memory=int(memory) >> 20)
        return True

    # --- the state of the service ---

    def _move(self, state: State) -> None:
        self.state = advance(self.state, state)

    def _is_draining(self) -> bool:
        return self.state in (State.DRAINING, State.STOPPED)

    @property
    def status(self) -> str:
        """The state in one line."""
        ready = sum(slot.ready for slot in self.slots)
        count = sum(worker.counters.get(OPEN_CONNECTIONS, 0) for worker in self._workers())
        workers = counted(len(self.slots), "worker")
        without = sum(slot.ready and not slot.has_hub for slot in self.slots)
        hub = f", the hub has no connection in {counted(without, 'worker')}" if without else ""
        return f"{self.state.value}: {ready} of {workers} ready, {counted(count, 'connection')} open{hub}"

    @property
    def short_status(self) -> str:
        """The state in one line, in constant time."""
        return self.status

    @property
    def ready(self) -> bool:
        """Whether the pool is ready for traffic: after all workers were ready once, one ready worker is enough.

        With `hub_required`, the hub of that worker is up.
        """
        required = self._spec.hub_required
        return self.state is State.SERVING and any(slot.ready and (slot.has_hub or not required) for slot in self.slots)

    def snapshot(self, now: float, process: dict[CounterKey, float]) -> dict[str, Any]:
        """Return the state of the supervisor and of each worker: see Backend."""
        return {
            "workers": self.totals.snapshot(self.slots, self.reactor.seconds()),
            "supervisor": process,
            "starts": self.totals.starts,
            "exits": self.totals.exits,
        }

    def rows(self, sort: str, count: int) -> Deferred[ConnectionRows]:
        """Ask every worker for its open connections: see Backend."""
        return self._queries.ask(self.reactor, self._workers(), sort, count)

    def refresh(self) -> Deferred[None]:
        """Do nothing: each heartbeat of a worker updates its counters."""
        return succeed(None)

    # --- replacing ---

    def apply(self, spec: WorkerSpec) -> None:
        """Replace every worker by a worker with this spec."""
        self._spec = spec
        self._rollout.reloading = True
        self._replace(self.slots)

    @property
    def replacing(self) -> bool:
        """Whether a reload still replaces workers."""
        return self._rollout.reloading

    def _replace(self, slots: list[Slot]) -> None:
        """Replace the workers of these slots, one after the other: a worker drains when its successor is ready."""
        if self.state is State.SERVING:
            self._rollout.add(slots)
            self._reconcile()

    def _stop_rollout(self, problem: str) -> None:
        """End the rollout after a new worker has failed. The current workers continue to serve."""
        reloaded = self._rollout.fail(self.reactor.seconds())
        WORKER_NOT_REPLACED.log(self.log, problem=problem)
        if reloaded:
            self._host.reloaded()

    def _is_replacing(self) -> bool:
        return bool(self._rollout) or any(slot.successor is not None for slot in self.slots)

    def _reconcile(self) -> None:
        """Take the next step towards the desired state. Called after each change."""
        if self._is_draining():
            if not any(slot.workers() for slot in self.slots) and not self._drained.called:
                self._drained.callback(None)
            return
        self._spread()
        if self.state is State.STARTING or any(slot.successor is not None for slot in self.slots):
            return
        while (slot := self._rollout.next(self._spec)) is not None:
            slot.successor = self._spawn(slot)
            if slot.successor is not None:
                return
            self._stop_rollout(self._spawn_problem)
        if self._rollout.end_reload():
            RELOAD_DONE.log(self.log, status=self.status)
            self._host.reloaded()
        self._adjust()

    # --- more and fewer slots ---

    def _spread(self) -> None:
        """Send new clients to slots with a responsive worker: in another backlog they would wait for a worker."""
        if self.state is not State.SERVING:
            return
        now = self.reactor.seconds()
        accepting = [slot.number for slot in self.slots if slot.accepts(now)]
        accepting = accepting or [slot.number for slot in self.slots if not slot.being_removed]
        if accepting != self._accepting:
            self._accepting = accepting
            for listener in self.listeners:
                listener.balance_over(accepting)

    def add_slot(self) -> None:
        """Add a worker. Called for SIGTTIN."""
        self._target_slots += 1
        self._reconcile()

    def remove_slot(self) -> None:
        """Remove a worker. Called for SIGTTOU."""
        if self._target_slots == 1:
            SLOT_NOT_REMOVED.log(self.log)
            return
        self._target_slots -= 1
        self._reconcile()

    def _adjust(self) -> None:
        last = self.slots[-1]
        if last.being_removed:
            if not last.workers():
                self._drop(last)
        elif len(self.slots) > self._target_slots:
            # A slot without a worker gets one first, which serves the backlog.
            if last.ready:
                self._begin_removal(last)
        elif len(self.slots) < self._target_slots:
            self._add()

    def _add(self) -> None:
        added: list[Listener] = []
        try:
            for listener in self.listeners:
                listener.add_slot()
                added.append(listener)
        except ListenError as problem:
            for listener in added:
                listener.remove_slot()
            self._target_slots = len(self.slots)
            SLOT_NOT_ADDED.log(self.log, problem=str(problem))
            return
        slot = Slot(len(self.slots))
        self.slots.append(slot)
        self._respawn(slot)
        self._share()

    def _begin_removal(self, slot: Slot) -> None:
        slot.being_removed = True
        self._spread()
        assert slot.worker is not None
        slot.worker.drain(("slot",))

    def _drop(self, slot: Slot) -> None:
        for listener in self.listeners:
            listener.remove_slot()
        self.slots.remove(slot)
        SLOT_REMOVED.log(self.log, slot=slot.number)
        self._share()
        self._reconcile()

    def _share(self) -> None:
        for worker in self._workers():
            worker.send("share", len(self.slots))

    # --- stop ---

    def abort(self) -> None:
        """Abort open connections, and so end the drain. Workers that do not end within some seconds are killed."""
        for worker in self._workers():
            worker.abort_drain()

    def drain(self) -> Deferred[None]:
        """Drain all workers, within one deadline. Fires when the last one has ended."""
        return Deferred.fromCoroutine(self._drain())

    async def _drain(self) -> None:
        if self.reactor is None:  # no worker was spawned
            self._move(State.STOPPED)
            for listener in self.listeners:
                listener.close()
            return
        self._move(State.DRAINING)
        self._host.draining()
        began = self.reactor.seconds()
        before = self.totals.ended()
        for slot in self.slots:
            if slot.respawn is not None:
                slot.respawn.cancel()
                slot.respawn, slot.worker = None, self._spawn(slot)  # clients may wait in its backlog
            if slot.successor is not None:
                slot.successor.give_up()
            for worker in slot.workers():
                worker.drain(("slot", "own"))
        # No worker is spawned from here on. Each worker has its sockets and serves their backlogs. When it closes them,
        # new clients are refused, and a successor of the service can listen.
        for listener in self.listeners:
            if not listener.shared:
                listener.close()
        self._reconcile()
        await self._drained
        ended = self.totals.ended()
        DRAIN_DONE.log(
            self.log,
            ended=ended.get(DRAIN_ENDED, 0) - before.get(DRAIN_ENDED, 0),
            aborted=ended.get(DRAIN_ABORTED, 0) - before.get(DRAIN_ABORTED, 0),
            seconds=self.reactor.seconds() - began,
        )
        self._move(State.STOPPED)
        self._queries.close()
        for listener in self.listeners:
            if listener.shared:
                listener.close()
