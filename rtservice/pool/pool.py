"""The supervisor: bind and keep the sockets; spawn, watch, reload and replace a worker for each slot."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import CancelledError, Deferred, succeed
from twisted.internet.error import ProcessDone, ProcessExitedAlready
from twisted.internet.protocol import ProcessProtocol
from twisted.internet.task import LoopingCall
from twisted.logger import LogEvent, Logger, LogLevel, globalLogPublisher
from twisted.python.failure import Failure

from rtservice.counted import counted
from rtservice.net.description import ListenError
from rtservice.net.listener import Listener
from rtservice.net.tls import Steps, fingerprint, fingerprinting
from rtservice.pool.control import (
    BEAT,
    CONTROL_IN,
    CONTROL_OUT,
    FIRST_SOCKET,
    ProtocolViolation,
    encode,
)
from rtservice.pool.intake import Intake
from rtservice.pool.printed import Line, PrintedLines
from rtservice.pool.published import as_event
from rtservice.pool.worker_counters import SlotCounters
from rtservice.pool.worker_messages import (
    Access,
    Beat,
    Failed,
    Leave,
    Message,
    Ready,
    Records,
    Rows,
    WorkerMessages,
)
from rtservice.process.certificates import certificates_of, logging_certificates
from rtservice.process.counters import (
    DRAIN_ABORTED,
    DRAIN_ENDED,
    DROPPED,
    MEMORY,
    OPEN_CONNECTIONS,
    CounterKey,
    Lag,
    add,
    process_counters,
)
from rtservice.process.orphans import Reaper
from rtservice.process.registry import first_rows
from rtservice.process.server import StartError, one_line, traceback_level
from rtservice.process.signals import Repeats, release
from rtservice.process.slices import in_slices
from rtservice.process.status_server import StatusServer
from rtservice.process.systemd import Notifier

# Seconds that a worker may take until it is ready: an interpreter that starts on a machine that is very busy. And for
# each certificate, which takes 1 to 3 ms, and workers load them all at the same time.
_START_DEADLINE, _START_OF_CERTIFICATE = 60.0, 0.01

# A slot whose worker dies waits before the next: seconds, doubled for each death, and forgotten after some of health.
_BACKOFF_LEAST, _BACKOFF_MOST, _HEALTHY = 0.1, 30.0, 60.0

# A worker that is to end has this long after its own deadlines, in seconds, until it is killed.
_KILL_AFTER = 40.0

_SIGNALS = frozenset(signal.Signals)

# How many questions of a worker may be without an answer. One more is not sent: a worker that does not read its channel
# must not cost memory.
_MOST_ASKED = 16

# Seconds that a worker has to end when nobody waits any longer, or it has nothing to say any more.
_HURRY = 5.0

# Seconds that the pipes of a process that is dead are read on, should another process hold them open.
_PIPES = 1.0

# Seconds that a worker is still there after it was to be killed: then the service manager is told of no life either.
_DEAF = 30.0

# Seconds without a sign of life of a worker from which on new clients are left to the others: it may be stopped, and
# what is not accepted has to wait.
_SILENT = 3 * BEAT

# Seconds between two looks that show that this process did not run.
_STALL = 5.0

# Seconds that workers have to say which connections are open.
_ANSWER = 2.0


class Phase(Enum):
    """Where a worker process stands."""

    STARTING = "starting"  # spawned; it has not said anything yet
    READY = "ready"  # every listener accepts
    DRAINING = "draining"  # told to end
    GONE = "gone"  # reaped


_MOVES = {
    Phase.STARTING: {Phase.READY, Phase.DRAINING, Phase.GONE},
    Phase.READY: {Phase.DRAINING, Phase.GONE},
    Phase.DRAINING: {Phase.GONE},
    Phase.GONE: set[Phase](),
}


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """What a generation of workers is started with.

    `start` makes the value of a worker's `start` message, of its slot and the number of slots. `drain_timeout`,
    `hang_timeout` and `max_age` are in seconds, `max_memory` in bytes; 0 of the last three is never.
    """

    start: Callable[[int, int], Any]
    drain_timeout: float
    hang_timeout: float
    max_age: float
    max_memory: int
    watched: tuple[str, ...] = ()  # files whose change reloads


def backoff(deaths: int, jitter: float) -> float:
    """Seconds to wait after so many deaths in a row (1 or more); `jitter` is from 0 to 1."""
    return min(_BACKOFF_MOST, _BACKOFF_LEAST * 2.0 ** min(deaths - 1, 20)) * (0.75 + jitter / 2)


class PendingQuery:
    """What workers were asked, and have answered so far."""

    def __init__(self) -> None:
        self.waiting: list[WorkerProcess] = []
        self.missing: list[WorkerProcess] = []  # which are not waited for
        self.rows: list[list[Any]] = []
        self.answer: Deferred[tuple[list[list[Any]], list[int]]] = Deferred()
        self.deadline: Any = None


class WorkerProcess(ProcessProtocol):
    """One process of a slot, from its spawning to its end."""

    transport: Any  # IProcessTransport leaves out half of what Twisted's processes have

    def __init__(self, supervisor: WorkerPool, slot: Slot, plan: WorkerSpec) -> None:
        self.supervisor = supervisor
        self.slot = slot
        self.plan = plan
        self.phase = Phase.STARTING
        self.began = self.heard = supervisor.reactor.seconds()
        self.counters: dict[CounterKey, float] = {}
        self.counted: float | None = None  # when, as time.time()
        self.problem = ""  # why it could not start, in its own words
        self.age = plan.max_age * random.uniform(0.9, 1.1)  # at which it is replaced: not all at once
        self.wants_to_leave = False
        self._messages = WorkerMessages(
            slot=slot.number, listeners=supervisor.listener_names, access=supervisor.logs_access
        )
        self._asked_at: dict[int, float] = {}  # when it was asked what it has not answered, by question
        self._intakes: dict[int, Intake] = {}  # by descriptor
        self._printed = {1: PrintedLines(), 2: PrintedLines()}
        self._dumped = False
        self._hurried = False
        self._listens = True
        self._exited = False
        self._end_call: Any = None
        self._reason: Failure | None = None  # why its process has ended
        self._pid = 0

    def connectionMade(self) -> None:
        self._pid = self.transport.pid
        self._intakes = {
            CONTROL_OUT: self._intake(CONTROL_OUT, self._messages, self._received),
            # As twistd has it.
            1: self._intake(1, self._printed[1], lambda line: self._prints(LogLevel.info, line)),
            2: self._intake(2, self._printed[2], lambda line: self._prints(LogLevel.error, line)),
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

    def move(self, phase: Phase) -> None:
        """Go on to a phase; raises RuntimeError for one that does not come after this."""
        if phase not in _MOVES[self.phase]:
            raise RuntimeError(f"a worker that is {self.phase.value} cannot become {phase.value}")
        self.phase = phase

    def __str__(self) -> str:
        return f"worker {self.slot.number} (pid {self._pid})"

    def _log_error(self, text: str, **fields: object) -> None:
        self._log(LogLevel.error, text, **fields)

    def _log(self, level: Any, text: str, **fields: object) -> None:
        self.supervisor.log.emit(level, "{worker} " + text, worker=str(self), slot=self.slot.number, **fields)

    # --- to it ---

    def send(self, word: str, value: object = None) -> None:
        """Send a message."""
        if self._listens:
            self.transport.writeToChild(CONTROL_IN, encode(word, value))

    def ask(self, number: int, sort: str, count: int) -> bool:
        """Ask which connections it has; gives whether it will be waited for."""
        if not self._listens or len(self._asked_at) >= _MOST_ASKED:
            return False
        self._asked_at[number] = self.supervisor.reactor.seconds()
        self._messages.ask(number, count)
        self.send("rows", {"id": number, "sort": sort, "count": count})
        return True

    def abort_drain(self) -> None:
        """Have it end its drain now, or be killed."""
        if not self._hurried:
            self._hurried = True
            self.send("hurry")
        self.end_in(_HURRY)

    def drain(self, finish: tuple[str, ...] = ()) -> None:
        """Have it end, when the queues of these kinds of its sockets are served."""
        if self.phase in (Phase.STARTING, Phase.READY):
            self.move(Phase.DRAINING)
            self.send("drain", finish)
            self.end_in(self.plan.drain_timeout + _KILL_AFTER)

    def give_up(self) -> None:
        """Have a successor end, whose queues the worker in charge serves.

        Until it closes its copies of the sockets, clients are neither served nor refused: it may load certificates for
        seconds. SIGTERM ends an interpreter that does not read messages yet, and is harmless to one that does.
        """
        self.drain()
        self.signal(signal.SIGTERM)

    def end_in(self, seconds: float) -> None:
        """Kill it then, if it is there still; a time that is said already stays when it is earlier."""
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
        """Send a signal."""
        with contextlib.suppress(ProcessExitedAlready):  # what it has written is still being read
            self.transport.signalProcess(number)

    def extend_deadline(self, seconds: float) -> None:
        """Do not hold it against it that it was not heard for so long."""
        self.heard += seconds
        self.began += seconds
        self._asked_at = {number: when + seconds for number, when in self._asked_at.items()}

    def check_health(self, now: float) -> None:
        """See whether it is alive. Called once in a beat."""
        for intake in self._intakes.values():
            intake.beat()
        hang_timeout = self.plan.hang_timeout
        if self.phase is Phase.STARTING:
            if now - self.began >= self.supervisor.start_deadline:
                self._log_error(
                    "is not ready after {seconds:g} s, and is killed", seconds=self.supervisor.start_deadline
                )
                self.signal(signal.SIGKILL)
        elif self._dumped:
            self.signal(signal.SIGKILL)
        elif hang_timeout and now - self.heard >= hang_timeout:
            self._log_error(
                "gave no sign of life for {seconds:.1f} s: it is to print its stack, and is killed",
                seconds=now - self.heard,
            )
            self._dumped = True  # it has until the next look
            self.signal(signal.SIGUSR2)
        elif hang_timeout and self._asked_at and now - min(self._asked_at.values()) >= hang_timeout:
            # It sends heartbeats, and does not read.
            self._log_error("has not answered for {seconds:.1f} s, and is killed", seconds=hang_timeout)
            self.signal(signal.SIGKILL)

    def is_deaf(self, now: float) -> bool:
        """Whether it is there although it should have been killed."""
        hang_timeout = self.plan.hang_timeout
        return self.phase is not Phase.STARTING and hang_timeout > 0 and now - self.heard >= hang_timeout + _DEAF

    # --- from it ---

    def childDataReceived(self, childFD: int, data: bytes) -> None:
        self._intakes[childFD].feed(data)

    def _violates(self, problem: Exception) -> None:
        """It sent what it must not send, or what this process cannot handle: either harms nobody else."""
        if isinstance(problem, ProtocolViolation):
            self._log_error("violated the control protocol, and is killed: {problem}", problem=str(problem))
        else:
            self._log_error("sent what cannot be handled, and is killed: {problem}", problem=ascii(problem)[:200])
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
                    supervisor.publish(as_event(record, self.slot.number))
            case Beat():
                # Of all that it sends, only this says that its reactor is alive.
                self.heard = supervisor.reactor.seconds()
                self.counted = time.time()
                supervisor.counters_of(self.slot).admit(message.counters)
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
            case Ready():
                if self.phase is Phase.STARTING:  # or it was told to drain before
                    self.heard = supervisor.reactor.seconds()
                    self.move(Phase.READY)
                    supervisor.worker_ready(self)

    def _prints(self, level: Any, line: Line) -> None:
        """What it, or the interpreter that it is, prints: its last words, most often."""
        self._log(level, "printed: {line}", line=line.text)

    def childConnectionLost(self, childFD: int) -> None:
        if childFD in (CONTROL_IN, CONTROL_OUT):  # it is about to end, or out of its mind
            self._listens = False
            self.end_in(_HURRY)

    def processExited(self, reason: Failure) -> None:
        self._exited = True
        self.end_in(_PIPES)

    def processEnded(self, reason: Failure) -> None:
        self._reason = reason
        for lines in self._printed.values():
            lines.end()
        self._finish(list(self._intakes.values()))

    def _finish(self, intakes: list[Intake]) -> None:
        """Take what was received and not taken, and be gone then."""
        if intakes:
            intakes[0].finish(lambda: self._finish(intakes[1:]))
        else:
            if self._end_call is not None and self._end_call.active():
                self._end_call.cancel()
            self.move(Phase.GONE)
            assert self._reason is not None
            self.supervisor.worker_gone(self, self._reason)


class Slot:
    """A place for a worker: the one in charge, its successor while that starts, and those that still drain."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.old: list[WorkerProcess] = []
        self.deaths = 0  # in a row
        self.respawn: Any = None  # the delayed call that spawns the next worker
        self.leaving = False
        # Replacements in a row that its workers themselves caused, and the time before which there is no other.
        self.replacements = 0
        self.replace_after = 0.0

    def workers(self) -> list[WorkerProcess]:
        """Every process of the slot."""
        return [worker for worker in (self.worker, self.successor, *self.old) if worker is not None]

    @property
    def ready(self) -> bool:
        return self.worker is not None and self.worker.phase is Phase.READY

    def accepts(self, now: float) -> bool:
        """Whether new clients are served at once here."""
        return self.ready and not self.leaving and self.worker is not None and now - self.worker.heard < _SILENT


class WorkerPool(Service):
    """Serves with a worker process for each of `slots` slots.

    `listeners` have a socket for each slot where they can (Listener.slot_sockets). `command` starts a worker. `access`
    takes a line that a worker has for the access log; one that has none is not to be sent any. `report`, `check`,
    `notifier`, `status_server` and `dropped` are as in Server. `reload` gives the steps, which are taken in slices, to
    the WorkerSpec of the next generation, or to None if nothing can be reloaded, which it has logged then.

    Signals: SIGTERM and SIGINT drain, and a second one ends that; SIGHUP reloads; SIGTTIN adds a slot and SIGTTOU
    removes one.
    """

    name = "rtservice"

    def __init__(
        self,
        *,
        listeners: list[Listener],
        slots: int,
        plan: WorkerSpec,
        command: list[str],
        log: Logger,
        notifier: Notifier,
        report: Callable[[str | None], None],
        check: Callable[[], str | None],
        reload: Callable[[], Steps[WorkerSpec | None]],
        access: Callable[[str], None] | None = None,
        status_server: StatusServer | None = None,
        dropped: Callable[[], int] = lambda: 0,
    ) -> None:
        self.log = log
        self._access = access
        self.reactor: Any = None
        self.slots = [Slot(number) for number in range(slots)]
        self.exit_status = 0
        self._ended: dict[int, dict[CounterKey, float]] = {}  # by slot: the totals of its ended workers
        self._slot_counters: dict[int, SlotCounters] = {}  # by slot
        self._starts: dict[int, int] = {}  # by slot
        self._exits: dict[int, dict[str, int]] = {}  # by slot and reason
        self._pending_queries: dict[int, PendingQuery] = {}
        self._asked = 0
        self._lag = Lag()
        self._status_server = StatusServer(log) if status_server is None else status_server
        self._dropped = dropped
        self._started = time.time()
        self._listeners = listeners
        self.listener_names = frozenset(listener.name for listener in listeners)
        self.logs_access = access is not None
        self._wanted = slots
        self._spec = plan
        self._command = command
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._notifier = notifier
        self._report: Callable[[str | None], None] | None = report
        self._check = check
        self._reload = reload
        self._seen = fingerprint(plan.watched)
        self._refusal = ""  # why the system had no process for a worker
        self._rolling: list[Slot] = []  # whose workers are still to be replaced
        self._reload_asked = False  # too early, or while another one is read
        self._slices: Deferred[None] | None = None  # a reload that is read, or a look at the certificates
        self._reloading = False
        self._looking = LoopingCall(self._beat)
        self._watchdog = LoopingCall(self._watch)
        self._repeats = Repeats(lambda: self.reactor.seconds())
        self._reaper = Reaper()
        self._looked = 0.0
        self._patient_until = 0.0  # after a replacement that failed
        self._serving = False
        self._ending = False  # the reactor is told to stop
        self._stopped: Deferred[None] | None = None
        self._stop_began = 0.0
        self._drained_before: dict[CounterKey, float] = {}  # the totals when the stop began
        self._accepting: list[int] = []  # the slots among which new clients are spread

    # --- start ---

    def startService(self) -> None:
        """Spawn the workers. The reactor is needed from here on. Raises StartError."""
        from twisted.internet import reactor

        problem = self._check()
        if problem is not None:
            self.log.critical("cannot start: {problem}", problem=problem)
            self._reported(problem)
            self.abandon()
            raise StartError(problem)
        super().startService()
        self.reactor = reactor
        signals = {signal.SIGHUP: self.reload, signal.SIGTTIN: self.add_slot, signal.SIGTTOU: self.remove_slot}
        for number, action in signals.items():
            self._on_signal(number, action)
        reactor.callWhenRunning(self._begin)

    def abandon(self) -> None:
        """As in Server."""
        for listener in self._listeners:
            self._remove_file(listener)
            listener.close()
        self._status_server.stop()

    def _on_signal(self, number: int, action: Callable[[], None]) -> None:
        signal.signal(number, lambda number, frame: self.reactor.callFromThread(action))

    def _begin(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        release()
        if not self.running:
            return
        try:
            self._start()
        except BaseException:  # the reactor would log it, and go on
            failure = Failure()
            self.log.failure("the start failed", failure, traceback_level(failure.value))
            self.fail(f"the workers cannot be started: {one_line(failure)}")

    def _start(self) -> None:
        self._reaper.start(self.reactor)
        self._looking.clock = self._watchdog.clock = self.reactor
        self._looking.start(BEAT, now=False)
        self._looked = self.reactor.seconds()
        self._status_server.start(self.reactor)
        self._lag.start(self.reactor)
        if self.start_deadline > _START_DEADLINE:  # the manager's own deadline is meant for an interpreter, too
            self._notifier.extend_timeout(self.start_deadline)
        for slot in self.slots:
            slot.worker = self._spawn(slot)
            if slot.worker is None:
                self.fail(self._refusal)
                return

    def _spawn(self, slot: Slot) -> WorkerProcess | None:
        """A new process for a slot; None when there can be none, which is logged, or ends a start."""
        worker = WorkerProcess(self, slot, self._spec)
        try:
            self._spawn_process(worker)
        except OSError as problem:
            # Most often it is the user of --uid who may not run the interpreter.
            self._refusal = f"no worker can be spawned: {self._command[0]}: {problem.strerror}"
            if self._serving:
                self.log.error("slot {slot}: {problem}", slot=slot.number, problem=self._refusal)
            return None
        add(self._starts, {slot.number: 1})
        worker.send("start", self._spec.start(slot.number, len(self.slots)))
        return worker

    def _spawn_process(self, worker: WorkerProcess) -> None:
        with open(os.devnull, "rb") as nothing:
            descriptors: dict[int, Any] = {0: nothing.fileno(), 1: "r", 2: "r", CONTROL_IN: "w", CONTROL_OUT: "r"}
            for place, listener in enumerate(self._listeners):
                descriptors[FIRST_SOCKET + place] = listener.of_slot(worker.slot.number).fileno()
            self.reactor.spawnProcess(worker, self._command[0], self._command, self._environment, childFDs=descriptors)

    # --- what workers do ---

    def worker_ready(self, worker: WorkerProcess) -> None:
        """It serves."""
        slot = worker.slot
        if slot.successor is worker:
            assert slot.worker is not None
            slot.old.append(slot.worker)
            slot.worker.drain()
            slot.worker, slot.successor = worker, None
        self.log.info("{worker} is ready", worker=str(worker), slot=slot.number)
        if not self._serving and all(one.ready for one in self.slots):
            self._serving = True
            for listener in self._listeners:
                self.log.info("listening on {listener}", listener=listener.name)
            if self._notifier.watchdog_interval is not None:
                self._watchdog.start(self._notifier.watchdog_interval)
            self._notifier.ready(self.status)
            self._reported(None)
            # With the reload that was asked for meanwhile after it.
            self._take(logging_certificates(self.log, self._listeners), "logging the certificates")
        self._reconcile()

    def worker_leaves(self, worker: WorkerProcess) -> None:
        """It was asked to end, and can be replaced first."""
        slot = worker.slot
        if worker is slot.worker and slot.ready and slot.successor is None and slot not in self._rolling:
            worker.wants_to_leave = True
            self._replace_for_its_worker(slot, self.reactor.seconds())

    def _replace_for_its_worker(self, slot: Slot, now: float) -> bool:
        """Replace a worker for what it says itself, unless it is too soon: gives whether it is replaced.

        A worker that says so as soon as it is ready would otherwise have processes spawned without a pause.
        """
        worker = slot.worker
        if worker is None or now < slot.replace_after or not (worker.wants_to_leave or self._has_grown(worker)):
            return False
        worker.wants_to_leave = False
        if now - worker.began >= _HEALTHY:
            slot.replacements = 0
        slot.replacements += 1
        slot.replace_after = now + backoff(slot.replacements, random.random())
        self.replace([slot])
        return True

    def worker_gone(self, worker: WorkerProcess, reason: Failure) -> None:
        """Its process has ended."""
        slot = worker.slot
        self._count(worker, reason)
        how = "has ended" if reason.check(ProcessDone) else f"has ended: {reason.getErrorMessage()}"
        self.log.info("{worker} {how}", worker=str(worker), how=how, slot=slot.number)
        if worker in slot.old:
            slot.old.remove(worker)
        elif worker is slot.successor:
            slot.successor = None
            # Unless that was for a plan that is not wanted any more.
            if self._stopped is None and worker.plan is self._spec:
                self._stop_rolling(f"{worker} cannot take over: {worker.problem or how}")
        elif worker is slot.worker:
            slot.worker, slot.successor = slot.successor, None
            if self._stopped is not None or (slot.leaving and reason.check(ProcessDone)):
                pass
            elif not self._serving:
                self.fail(worker.problem or f"{worker} {how}")
            elif slot.worker is None:
                slot.leaving = False  # it was not served to its end, and leaves once it has a worker
                self._respawn_later(slot, worker)
        self._reconcile()

    def _count(self, worker: WorkerProcess, reason: Failure) -> None:
        """Keep what a worker counted until its end, and how it ended."""
        number = worker.slot.number
        ended = self._ended.setdefault(number, {})
        for key, count in worker.counters.items():
            if key.name == "phase" and count:  # these connections were open until then
                add(ended, {CounterKey("closed", "worker ended", key.listener): count})
            elif key.is_total:
                self.counters_of(worker.slot).add(ended, {key: count})
        how = "failed" if worker.problem or not reason.check(ProcessDone) else "ended"
        if (killed := getattr(reason.value, "signal", None)) is not None:
            # Real-time signals have no names in Python, but for the first and the last.
            how = signal.Signals(killed).name if killed in _SIGNALS else f"signal {killed}"
        add(self._exits.setdefault(number, {}), {how: 1})
        for question in list(self._pending_queries):
            self.answered(worker, question, [])

    def counters_of(self, slot: Slot) -> SlotCounters:
        """Return what bounds the counters of a slot."""
        return self._slot_counters.setdefault(slot.number, SlotCounters())

    def _respawn_later(self, slot: Slot, worker: WorkerProcess | None) -> None:
        if worker is not None and self.reactor.seconds() - worker.began >= _HEALTHY:
            slot.deaths = 0
        slot.deaths += 1
        seconds = backoff(slot.deaths, random.random())
        self.log.error(
            "slot {slot} gets a new worker in {seconds:.1f} s{problem}",
            slot=slot.number,
            seconds=seconds,
            problem=f": {worker.problem}" if worker is not None and worker.problem else "",
        )
        slot.respawn = self.reactor.callLater(seconds, self._respawn, slot)

    def _respawn(self, slot: Slot) -> None:
        slot.respawn = None
        slot.worker = self._spawn(slot)
        if slot.worker is None:
            self._respawn_later(slot, None)

    def publish(self, event: LogEvent) -> None:
        """Log a record of a worker's."""
        globalLogPublisher(event)

    def access(self, lines: list[str]) -> None:
        """Write a worker's lines to the access log."""
        assert self._access is not None
        for line in lines:
            self._access(line)

    def _workers(self) -> list[WorkerProcess]:
        return [worker for slot in self.slots for worker in slot.workers()]

    def _beat(self) -> None:
        # Nothing that goes wrong in one look is to prevent the next.
        with self.log.failuresHandled("a look at the workers failed"):
            self._check_workers()

    def _check_workers(self) -> None:
        now = self.reactor.seconds()
        away = now - self._looked
        self._looked = now
        for worker in self._workers():
            if away > _STALL:  # it is this process that was away, and heard nobody
                worker.extend_deadline(away)
            worker.check_health(now)
        self._spread()
        if self._notifier.connected:
            self._notifier.status(self.status)
        if self._stopped is not None:
            self._notifier.extend_timeout(_KILL_AFTER)
        elif self._serving and not self._is_rolling() and now >= self._patient_until:
            if self._spec.watched and self._slices is None:
                self._take(self._look_at_certificates(), "a look at the certificates")
                if self._is_rolling():
                    return
            for slot in self.slots:
                if slot.ready and (self._replace_if_old(slot, now) or self._replace_for_its_worker(slot, now)):
                    break

    def _replace_if_old(self, slot: Slot, now: float) -> bool:
        worker = slot.worker
        assert worker is not None
        if not worker.plan.max_age or now - worker.began < worker.age:
            return False
        self.log.info("{worker} has reached its age", worker=str(worker))
        self.replace([slot])
        return True

    def _has_grown(self, worker: WorkerProcess) -> bool:
        memory = worker.counters.get(MEMORY, 0)
        if not worker.plan.max_memory or memory <= worker.plan.max_memory:
            return False
        self.log.info("{worker} has {memory} MiB of memory", worker=str(worker), memory=int(memory) >> 20)
        return True

    def _watch(self) -> None:
        """Tell the service manager that all is well, if it is."""
        now = self.reactor.seconds()
        if not any(worker.is_deaf(now) for worker in self._workers()):
            self._notifier.watchdog()

    @property
    def status(self) -> str:
        """One line on how it stands."""
        ready = sum(slot.ready for slot in self.slots)
        count = sum(worker.counters.get(OPEN_CONNECTIONS, 0) for worker in self._workers())
        state = "draining" if self._stopped is not None else "serving" if self._serving else "starting"
        return f"{state}: {ready} of {counted(len(self.slots), 'worker')} ready, {counted(count, 'connection')} open"

    @property
    def standing(self) -> str:
        """As in Server."""
        return self.status

    def refresh(self) -> Deferred[None]:
        """As in Server; workers count by themselves."""
        return succeed(None)

    @property
    def ready(self) -> bool:
        """Whether it is a place to send clients to."""
        return self._serving and self._stopped is None and any(slot.ready for slot in self.slots)

    @property
    def totals(self) -> dict[CounterKey, float]:
        """What ended workers counted, all together."""
        totals: dict[CounterKey, float] = {}
        for counters in self._ended.values():
            add(totals, counters)
        return totals

    @property
    def start_deadline(self) -> float:
        """Seconds that a worker may take until it is ready."""
        count = sum(len(listener.certificates) for listener in self._listeners)
        return _START_DEADLINE + int(_START_OF_CERTIFICATE * count * len(self.slots))

    def overview(self) -> dict[str, Any]:
        """How the service stands, as plain data: see Server."""
        now = time.time()
        slots = {slot.number: slot for slot in self.slots}
        return {
            "state": "draining" if self._stopped is not None else "serving" if self._serving else "starting",
            "ready": self.ready,
            "status": self.status,
            "time": now,
            "started": self._started,
            "listeners": [listener.name for listener in self._listeners],
            "certificates": certificates_of(self._listeners, now),
            "workers": [self._seen_worker(number, slots.get(number)) for number in sorted(slots | self._ended)],
            "supervisor": {**self._lag.counters(), **process_counters(), DROPPED: self._dropped()},
            "starts": self._starts,
            "exits": self._exits,
        }

    def _seen_worker(self, number: int, slot: Slot | None) -> dict[str, Any]:
        """One slot: its totals of all times, and who is there."""
        counters = dict(self._ended.get(number, {}))
        for worker in slot.workers() if slot is not None else ():
            self.counters_of(worker.slot).add(counters, worker.counters)
        current = slot.worker if slot is not None else None
        return {
            "worker": number,
            "pid": current.transport.pid if current is not None else None,
            "phase": current.phase.value if current is not None else "gone" if slot is None else "waiting",
            "age": self.reactor.seconds() - current.began if current is not None else None,
            "counted": current.counted if current is not None else None,
            "counters": counters,
        }

    def rows(self, sort: str, count: int) -> Deferred[tuple[list[list[Any]], list[int]]]:
        """Which connections are open, asked of every worker: see Server."""
        self._asked += 1
        question = self._pending_queries[self._asked] = PendingQuery()
        question.answer.addCallback(lambda found: (first_rows(found[0], sort, count), found[1]))
        question.deadline = self.reactor.callLater(_ANSWER, self._give, self._asked)
        for worker in self._workers():
            if worker.phase is not Phase.STARTING:
                # A worker that is silent already is not waited for.
                silent = self.reactor.seconds() - worker.heard >= _SILENT
                asked = not silent and worker.ask(self._asked, sort, count)
                (question.waiting if asked else question.missing).append(worker)
        answer = question.answer
        if not question.waiting:
            self._give(self._asked)
        return answer

    def answered(self, worker: WorkerProcess, number: int, rows: list[list[Any]]) -> None:
        """A worker has said which connections it has."""
        question = self._pending_queries.get(number)
        if question is not None and worker in question.waiting:
            question.waiting.remove(worker)
            question.rows += [[worker.slot.number, *row] for row in rows]
            if not question.waiting:
                self._give(number)

    def _give(self, number: int) -> None:
        question = self._pending_queries.pop(number)
        if question.deadline.active():
            question.deadline.cancel()
        missing = [worker.slot.number for worker in (*question.waiting, *question.missing)]
        question.answer.callback((question.rows, missing))

    # --- replacing ---

    def reload(self) -> None:
        """Replace every worker by one with the settings, certificates and code of now. Called for SIGHUP."""
        self._reload_asked = not self._serving or self._slices is not None
        if self._stopped is not None or self._reload_asked:
            return
        self._take(self._reload_steps(), "a reload")

    def _reload_steps(self) -> Steps[None]:
        self.log.info("reloading")
        self._notifier.reloading()
        # Before they are read, so that no change is missed.
        self._seen = yield from fingerprinting(self._spec.watched)
        plan = yield from self._reload()
        if plan is None:
            self._notifier.ready(self.status)
            return
        if plan.watched != self._spec.watched:
            self._seen = yield from fingerprinting(plan.watched)
        self._spec = plan
        yield from logging_certificates(self.log, self._listeners)
        self._reloading = True
        self.replace(self.slots)

    def _look_at_certificates(self) -> Steps[None]:
        """Reload if files have changed since they were last read."""
        if (yield from fingerprinting(self._spec.watched)) != self._seen:
            self.log.info("certificates have changed")
            yield from self._reload_steps()

    def _take(self, steps: Steps[None], what: str) -> None:
        """Take these steps in slices. There is one such work at a time; a reload asked for meanwhile follows it."""

        def over(result: object) -> None:
            self._slices = None
            if isinstance(result, Failure):
                if result.check(CancelledError):
                    self.log.info("{what} is given up: the service stops", what=what)
                else:
                    self.log.failure("{what} failed", result, what=what)
                    self._notifier.ready(self.status)  # or the service manager would wait for ever
            if self._reload_asked:
                self.reload()

        slices = self._slices = in_slices(steps, self.reactor)
        slices.addBoth(over)  # which may be at once

    def replace(self, slots: list[Slot]) -> None:
        """Replace the workers of these slots, one after the other: each serves before the old one drains."""
        if self._stopped is None and self._serving:
            self._rolling = [*slots, *(slot for slot in self._rolling if slot not in slots)]
            self._reconcile()

    def _stop_rolling(self, why: str) -> None:
        """A new worker fails: those that serve stay, and are not disturbed again for a while."""
        self._rolling.clear()
        self._patient_until = self.reactor.seconds() + _BACKOFF_MOST
        self.log.error("workers are not replaced: {why}", why=why)
        if self._reloading:
            self._reloading = False
            self._notifier.ready(self.status)

    def _is_rolling(self) -> bool:
        return bool(self._rolling) or any(slot.successor is not None for slot in self.slots)

    def _reconcile(self) -> None:
        """Do what is to be done next, whenever something has happened."""
        if self._stopped is not None:
            if not any(slot.workers() for slot in self.slots) and not self._stopped.called:
                self._stopped.callback(None)
            return
        self._spread()
        if not self._serving or any(slot.successor is not None for slot in self.slots):
            return
        while self._rolling:
            slot = self._rolling.pop(0)
            # One without a worker gets one of the new plan anyway.
            if slot.worker is not None and not slot.leaving and (slot.ready or slot.worker.plan is not self._spec):
                slot.successor = self._spawn(slot)
                if slot.successor is not None:
                    return
                self._stop_rolling(self._refusal)
        if self._reloading:
            self._reloading = False
            self.log.info("reloaded: {status}", status=self.status)
            self._notifier.ready(self.status)
        self._adjust()

    # --- more and fewer slots ---

    def _spread(self) -> None:
        """Have new clients go where one is served at once: in another queue they would wait for a worker to start."""
        if self._stopped is not None or not self._serving:
            return
        now = self.reactor.seconds()
        accepting = [slot.number for slot in self.slots if slot.accepts(now)]
        accepting = accepting or [slot.number for slot in self.slots if not slot.leaving]
        if accepting != self._accepting:
            self._accepting = accepting
            for listener in self._listeners:
                listener.balance_over(accepting)

    def add_slot(self) -> None:
        """One more worker. Called for SIGTTIN."""
        self._wanted += 1
        self._reconcile()

    def remove_slot(self) -> None:
        """One worker less. Called for SIGTTOU."""
        if self._wanted == 1:
            self.log.warn("SIGTTOU: the last worker stays")
            return
        self._wanted -= 1
        self._reconcile()

    def _adjust(self) -> None:
        last = self.slots[-1]
        if last.leaving:
            if not last.workers():
                self._drop(last)
        elif len(self.slots) > self._wanted:
            # Without a worker its queue would be lost: it gets one first.
            if last.ready:
                self._leave(last)
        elif len(self.slots) < self._wanted:
            self._add()

    def _add(self) -> None:
        added: list[Listener] = []
        try:
            for listener in self._listeners:
                listener.add_slot()
                added.append(listener)
        except ListenError as problem:
            for listener in added:
                listener.remove_slot()
            self._wanted = len(self.slots)
            self.log.error("no worker can be added: {problem}", problem=problem)
            return
        slot = Slot(len(self.slots))
        self.slots.append(slot)
        self._respawn(slot)
        self._share()

    def _leave(self, slot: Slot) -> None:
        slot.leaving = True
        self._spread()
        assert slot.worker is not None
        slot.worker.drain(("slot",))

    def _drop(self, slot: Slot) -> None:
        for listener in self._listeners:
            listener.remove_slot()
        self.slots.remove(slot)
        self.log.info("slot {slot} is gone", slot=slot.number)
        self._share()
        self._reconcile()

    def _share(self) -> None:
        for worker in self._workers():
            worker.send("share", len(self.slots))

    # --- stop ---

    def fail(self, problem: str) -> None:
        """End the process: it cannot serve as it was asked to."""
        if not self._ending:
            self.log.critical("cannot start: {problem}", problem=problem)
            self.exit_status = 1
            self._reported(problem)
            self._stop_reactor()
            self.abort_drain()

    def _stop_reactor(self) -> None:
        self._ending = True  # before stopService is called, which is a turn of the reactor later
        self.reactor.stop()

    def _reported(self, problem: str | None) -> None:
        report, self._report = self._report, None
        if report is not None:
            report(problem)

    def _signalled(self, number: int, frame: object) -> None:
        if not self._repeats.is_repeat(number):
            self.reactor.callFromThread(self._stop, number)

    def _stop(self, number: int) -> None:
        name = signal.Signals(number).name
        if not self._ending:
            self.log.info("{signal}: stopping", signal=name)
            self._stop_reactor()
        else:
            self.log.info("{signal}: not waiting any longer", signal=name)
            self.exit_status = self.exit_status or 128 + number
            self.abort_drain()

    def abort_drain(self) -> None:
        """End a drain now."""
        for worker in self._workers():
            worker.abort_drain()

    def stopService(self) -> Deferred[None]:
        """Drain all workers, within one deadline. Fires when the last one has ended."""
        self._ending = True
        if self._stopped is None:
            super().stopService()
            self._reported("told to stop before every worker was ready")
            self._stopped = Deferred()
            self._stopped.addCallback(self._all_gone)
            if self._slices is not None:
                self._slices.cancel()
            self._notifier.stopping(self.status)
            self._stop_began = self.reactor.seconds()
            self._drained_before = self.totals
            for listener in self._listeners:
                self._remove_file(listener)
            for slot in self.slots:
                if slot.respawn is not None:
                    slot.respawn.cancel()
                    slot.respawn, slot.worker = None, self._spawn(slot)  # there may be somebody in its queue
                if slot.successor is not None:
                    slot.successor.give_up()
                for worker in slot.workers():
                    worker.drain(("slot", "own"))
            # No worker is spawned from here on. Each has its sockets and serves their queues; once it closes them, who
            # comes is refused, and a successor can listen.
            for listener in self._listeners:
                if not listener.shared:
                    listener.close()
            self._reconcile()
        done: Deferred[None] = Deferred()
        self._stopped.chainDeferred(done)
        return done

    def _all_gone(self, result: None) -> None:
        ended, aborted = (
            self.totals.get(key, 0) - self._drained_before.get(key, 0) for key in (DRAIN_ENDED, DRAIN_ABORTED)
        )
        self.log.info(
            "drained: {ended} ended, {aborted} aborted, {seconds:.1f} s",
            ended=ended,
            aborted=aborted,
            seconds=self.reactor.seconds() - self._stop_began,
        )
        for repeated in (self._looking, self._watchdog):
            if repeated.running:
                repeated.stop()
        self._lag.stop()
        self._reaper.stop()
        for number in list(self._pending_queries):
            self._give(number)
        self._status_server.stop()
        for listener in self._listeners:
            listener.close()

    def _remove_file(self, listener: Listener) -> None:
        try:
            listener.remove_file()
        except OSError as problem:
            self.log.warn(
                "{listener}: its socket file stays: {problem}", listener=listener.name, problem=problem.strerror
            )
