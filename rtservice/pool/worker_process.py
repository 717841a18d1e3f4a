"""A worker process as its supervisor sees it: phases, messages in both directions, deadlines, and its end."""

from __future__ import annotations

import contextlib
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from twisted.internet.error import ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.logger import LogEvent, Logger
from twisted.python.failure import Failure

from rtservice.events import (
    WORKER_HUNG,
    WORKER_MESSAGE_FAILED,
    WORKER_PRINTED,
    WORKER_PRINTED_ERROR,
    WORKER_START_TIMED_OUT,
    WORKER_UNRESPONSIVE,
    WORKER_VIOLATION,
)
from rtservice.pool.control import BEAT, CONTROL_IN, CONTROL_OUT, ProtocolViolation, encode
from rtservice.pool.intake import Intake
from rtservice.pool.log_records import as_event
from rtservice.pool.mesh_links import LinkChannel
from rtservice.pool.printed import Line, PrintedLines
from rtservice.pool.worker_counters import SlotCounters
from rtservice.pool.worker_messages import (
    Access,
    Beat,
    Failed,
    JoinMesh,
    Leave,
    Message,
    PeerProblem,
    Ready,
    Records,
    Rows,
    WorkerMessages,
)
from rtservice.process.counters import CounterKey

# Seconds after the drain timeout until a draining worker is killed.
KILL_AFTER = 40.0

# The maximum number of questions that a worker has not answered. Further ones are not sent: a worker that does not read
# its channel must not cost memory.
_MOST_ASKED = 16

# Seconds until a worker is killed whose drain is aborted, or whose control channel is closed.
_ABORT = 5.0

# Seconds for which the pipes of an ended process are still read: another process may hold them open.
_PIPES = 1.0

# Seconds after the hang timeout in which the supervisor must have killed a worker. After that it stops its own watchdog
# notifications.
_OVERDUE = 30.0

# Seconds without a heartbeat after which new clients go to the other workers, and the worker is not asked for its
# connections: it may be stopped, and clients in its backlog would wait.
_SILENT = 3 * BEAT


class WorkerPhase(Enum):
    """The phase of a worker process."""

    STARTING = "starting"  # spawned; it has not sent `ready`
    READY = "ready"  # every listener accepts
    DRAINING = "draining"  # `drain` was sent
    GONE = "gone"  # reaped


_MOVES = {
    WorkerPhase.STARTING: {WorkerPhase.READY, WorkerPhase.DRAINING, WorkerPhase.GONE},
    WorkerPhase.READY: {WorkerPhase.DRAINING, WorkerPhase.GONE},
    WorkerPhase.DRAINING: {WorkerPhase.GONE},
    WorkerPhase.GONE: set[WorkerPhase](),
}


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """The settings and the `start` message of a generation of workers.

    `start` is called with the slot and the number of slots, and returns the value of the `start` message.
    `drain_timeout`, `hang_timeout` and `max_age` are in seconds, `max_memory` in bytes; 0 is no limit for the last
    three. With `hub_required`, the pool is not ready for traffic without a worker whose hub is up. With
    `watch_certificates`, workers are replaced when certificate files have changed.
    """

    start: Callable[[int, int], Any]
    drain_timeout: float
    hang_timeout: float
    max_age: float
    max_memory: int
    hub_required: bool = False
    watch_certificates: bool = False


class Supervisor(Protocol):
    """The interface to which a WorkerProcess reports."""

    reactor: Any
    log: Logger

    @property
    def start_deadline(self) -> float:
        """Seconds after its spawning until a worker that is not ready is killed."""

    def worker_ready(self, worker: WorkerProcess) -> None:
        """The worker serves."""

    def worker_leaves(self, worker: WorkerProcess) -> None:
        """The worker received a stop signal, and asks to be replaced."""

    def worker_joins_mesh(self, worker: WorkerProcess) -> None:
        """The worker asks for links to the other workers."""

    def peer_problem(self, worker: WorkerProcess, incarnation: int, problem: str) -> None:
        """The worker reports that the worker of this incarnation violates the protocol of links or does not read."""

    def worker_exited(self, worker: WorkerProcess) -> None:
        """The process has ended. Messages may still be read."""

    def worker_gone(self, worker: WorkerProcess, reason: Failure) -> None:
        """The process has ended, and all its messages are handled."""

    def answered(self, worker: WorkerProcess, number: int, rows: list[list[Any]]) -> None:
        """The worker has answered this question with rows of its connections."""

    def publish(self, event: LogEvent) -> None:
        """The worker has logged a record."""

    def access(self, lines: list[str]) -> None:
        """The worker has sent lines for the access log."""


class WorkerProcess(ProcessProtocol):
    """One process of a slot, from its spawning to its end.

    `messages` decodes its messages, `counter_bounds` bounds the counters that are shown, and `link_channel` passes it
    the sockets of its links.
    """

    transport: Any  # IProcessTransport does not declare pipes and closeChildFD

    def __init__(
        self,
        supervisor: Supervisor,
        slot: int,
        spec: WorkerSpec,
        *,
        messages: WorkerMessages,
        counter_bounds: SlotCounters,
        link_channel: LinkChannel,
    ) -> None:
        self.supervisor = supervisor
        self.slot = slot  # the number
        self.spec = spec
        self.phase = WorkerPhase.STARTING
        self.began: float = supervisor.reactor.seconds()
        self.last_heartbeat: float = self.began  # the time of the last heartbeat
        self.counters: dict[CounterKey, float] = {}
        self.counted: float | None = None  # time.time() of the last counters
        self.problem = ""  # the text of its `failed` message
        self.age = spec.max_age * random.uniform(0.9, 1.1)  # at which it is replaced; random, so not all at once
        self.wants_to_leave = False
        self._messages = messages
        self._counter_bounds = counter_bounds
        self.link_channel = link_channel
        self._asked_at: dict[int, float] = {}  # the time of each question without an answer, by number
        self._intakes: dict[int, Intake] = {}  # by descriptor
        self._printed = {1: PrintedLines(), 2: PrintedLines()}
        self._stack_requested = False
        self._aborted = False
        self._receives = True  # its control channel is open
        self._exited = False
        self._end_call: Any = None
        self._reason: Failure | None = None  # why its process has ended
        self.pid = 0

    def connectionMade(self) -> None:
        self.pid = self.transport.pid
        self._intakes = {
            CONTROL_OUT: self._intake(CONTROL_OUT, self._messages, self._received),
            # The levels are those of twistd for both outputs.
            1: self._intake(1, self._printed[1], self._prints),
            2: self._intake(2, self._printed[2], self._prints_error),
        }

    def _intake(self, descriptor: int, decoder: Any, take: Callable[[Any], None]) -> Intake:
        def switch(method: str) -> None:
            pipe = self.transport.pipes.get(descriptor)
            if pipe is not None:
                getattr(pipe, method)()

        return Intake(
            self.supervisor.reactor,
            decoder,
            take=take,
            fail=self._violates,
            pause=lambda: switch("stopReading"),
            resume=lambda: switch("startReading"),
        )

    def move(self, phase: WorkerPhase) -> None:
        """Enter a phase. Raises RuntimeError if it cannot follow the current one."""
        if phase not in _MOVES[self.phase]:
            raise RuntimeError(f"a worker that is {self.phase.value} cannot become {phase.value}")
        self.phase = phase

    def __str__(self) -> str:
        return f"worker {self.slot} (pid {self.pid})"

    @property
    def identity(self) -> dict[str, object]:
        """The fields that identify this worker in events."""
        return {"worker": str(self), "slot": self.slot, "pid": self.pid}

    # --- from the supervisor to the worker ---

    def send(self, word: str, value: object = None) -> None:
        """Send a message of the control protocol."""
        if self._receives:
            self.transport.writeToChild(CONTROL_IN, encode(word, value))

    def ask(self, number: int, sort: str, count: int) -> bool:
        """Ask for its open connections. Return whether an answer is expected."""
        if not self._receives or len(self._asked_at) >= _MOST_ASKED:
            return False
        self._asked_at[number] = self.supervisor.reactor.seconds()
        self._messages.ask(number, count)
        self.send("rows", {"id": number, "sort": sort, "count": count})
        return True

    def abort_drain(self) -> None:
        """Tell the worker to abort its connections. It is killed if it does not end."""
        if not self._aborted:
            self._aborted = True
            self.send("abort_drain")
        self.end_in(_ABORT)

    def drain(self, finish: tuple[str, ...] = ()) -> None:
        """Tell the worker to drain. It serves the backlogs of its sockets of the kinds `finish` first."""
        if self.phase in (WorkerPhase.STARTING, WorkerPhase.READY):
            self.move(WorkerPhase.DRAINING)
            self.send("drain", finish)
            self.end_in(self.spec.drain_timeout + KILL_AFTER)

    def give_up(self) -> None:
        """End a successor that is not needed any more. Its predecessor serves the backlogs.

        While a successor holds copies of the sockets, clients are neither served nor refused, and loading certificates
        may take seconds. SIGTERM ends an interpreter that does not read messages yet. Later it is harmless.
        """
        self.drain()
        self.signal(signal.SIGTERM)

    def end_in(self, seconds: float) -> None:
        """Kill the process if it has not ended after so many seconds. An earlier deadline stays."""
        reactor = self.supervisor.reactor
        if self._end_call is not None and self._end_call.active():
            if self._end_call.getTime() <= reactor.seconds() + seconds:
                return
            self._end_call.cancel()
        self._end_call = reactor.callLater(seconds, self._end)

    def _end(self) -> None:
        self.signal(signal.SIGKILL)
        if self._exited:
            for descriptor in (1, 2, CONTROL_IN, CONTROL_OUT):
                self.transport.closeChildFD(descriptor)

    def signal(self, number: int) -> None:
        """Send a signal to the process."""
        with contextlib.suppress(ProcessExitedAlready):  # while its pipes are still read
            self.transport.signalProcess(number)

    def extend_deadline(self, seconds: float) -> None:
        """Extend its deadlines by so many seconds, in which the supervisor did not run."""
        self.last_heartbeat += seconds
        self.began += seconds
        self._asked_at = {number: when + seconds for number, when in self._asked_at.items()}

    def check_health(self, now: float) -> None:
        """Kill the worker if it hangs. Called once in each heartbeat interval."""
        for intake in self._intakes.values():
            intake.beat()
        hang_timeout = self.spec.hang_timeout
        if self.phase is WorkerPhase.STARTING:
            if now - self.began >= self.supervisor.start_deadline:
                WORKER_START_TIMED_OUT.log(self.supervisor.log, **self.identity, seconds=self.supervisor.start_deadline)
                self.signal(signal.SIGKILL)
        elif self._stack_requested:
            self.signal(signal.SIGKILL)
        elif hang_timeout and now - self.last_heartbeat >= hang_timeout:
            WORKER_HUNG.log(self.supervisor.log, **self.identity, seconds=now - self.last_heartbeat)
            self._stack_requested = True  # it is killed at the next check
            self.signal(signal.SIGUSR2)
        elif hang_timeout and self._asked_at and now - min(self._asked_at.values()) >= hang_timeout:
            # It sends heartbeats, but does not read its messages.
            WORKER_UNRESPONSIVE.log(self.supervisor.log, **self.identity, seconds=hang_timeout)
            self.signal(signal.SIGKILL)

    def is_silent(self, now: float) -> bool:
        """Whether it has sent no heartbeat for `_SILENT` seconds."""
        return now - self.last_heartbeat >= _SILENT

    def is_overdue(self, now: float) -> bool:
        """Whether it still runs although it should have been killed."""
        hang_timeout = self.spec.hang_timeout
        return (
            self.phase is not WorkerPhase.STARTING
            and hang_timeout > 0
            and now - self.last_heartbeat >= hang_timeout + _OVERDUE
        )

    # --- from the worker to the supervisor ---

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._intakes[childFD].feed(data)

    def _violates(self, problem: Exception) -> None:
        """Kill the worker: it violated the protocol, or the supervisor cannot handle its message."""
        if isinstance(problem, ProtocolViolation):
            WORKER_VIOLATION.log(self.supervisor.log, **self.identity, problem=str(problem))
        else:
            WORKER_MESSAGE_FAILED.log(self.supervisor.log, **self.identity, problem=ascii(problem)[:200])
        self._intakes[CONTROL_OUT].close()
        self.transport.closeChildFD(CONTROL_OUT)
        self.signal(signal.SIGKILL)

    def _received(self, message: Message) -> None:
        supervisor = self.supervisor
        match message:
            case Access():
                supervisor.access(message.lines)
            case Records():
                for record in message.records:
                    supervisor.publish(as_event(record, self.slot))
            case Beat():
                # Only this message shows that the reactor of the worker runs.
                self.last_heartbeat = supervisor.reactor.seconds()
                self.counted = time.time()
                self._counter_bounds.reserve(message.counters)
                for key, count in message.counters.items():
                    # A total that decreases would decrease the total of the service.
                    self.counters[key] = max(count, self.counters.get(key, 0)) if key.is_total else count
            case Rows():
                self._asked_at.pop(message.number, None)
                supervisor.answered(self, message.number, message.rows)
            case Failed():
                self.problem = message.problem
            case Leave():
                supervisor.worker_leaves(self)
            case JoinMesh():
                supervisor.worker_joins_mesh(self)
            case PeerProblem():
                supervisor.peer_problem(self, message.incarnation, message.problem)
            case Ready():
                if self.phase is WorkerPhase.STARTING:  # otherwise `drain` was sent before
                    self.last_heartbeat = supervisor.reactor.seconds()
                    self.move(WorkerPhase.READY)
                    supervisor.worker_ready(self)

    def _prints(self, line: Line) -> None:
        """Log a line of its standard output."""
        WORKER_PRINTED.log(self.supervisor.log, **self.identity, line=line.text)

    def _prints_error(self, line: Line) -> None:
        """Log a line of its standard error, which is often the traceback of a crash."""
        WORKER_PRINTED_ERROR.log(self.supervisor.log, **self.identity, line=line.text)

    def childConnectionLost(self, childFD: int) -> None:
        if childFD in (CONTROL_IN, CONTROL_OUT):  # the worker is about to end, or is faulty
            self._receives = False
            self.end_in(_ABORT)

    def processExited(self, reason: Failure) -> None:
        self._exited = True
        self.supervisor.worker_exited(self)
        self.end_in(_PIPES)

    def processEnded(self, reason: Failure) -> None:
        self._reason = reason
        for lines in self._printed.values():
            lines.end()
        self._finish(list(self._intakes.values()))

    def _finish(self, intakes: list[Intake]) -> None:
        """Process the remaining input, then report the end of the process."""
        if intakes:
            intakes[0].finish(lambda: self._finish(intakes[1:]))
        else:
            if self._end_call is not None and self._end_call.active():
                self._end_call.cancel()
            self.move(WorkerPhase.GONE)
            assert self._reason is not None
            self.supervisor.worker_gone(self, self._reason)
