"""The supervisor, with a clock and processes that the tests move."""

import io
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated, ReactorNotRunning
from twisted.internet.task import Clock
from twisted.logger import LegacyLogObserverWrapper, Logger, LogLevel, formatEvent
from twisted.python.failure import Failure
from twisted.python.log import textFromEventDict

from rtservice.net.description import ListenError
from rtservice.net.tls import Steps
from rtservice.pool import pool as supervisor_module
from rtservice.pool.control import BEAT, CONTROL_IN, CONTROL_OUT, FIRST_SOCKET, SupervisorMessages, encode
from rtservice.pool.pool import Phase, WorkerPool, WorkerProcess, WorkerSpec, backoff
from rtservice.pool.worker_messages import encode_records, finished_record
from rtservice.process.counters import add
from rtservice.process.server import StartError
from rtservice.process.slices import in_slices


class Reactor(Clock):
    """A clock with processes. What is to stop it stops the service a turn later, as Twisted's does."""

    def __init__(self) -> None:
        super().__init__()
        self.processes: list[Process] = []
        self.refuse: OSError | None = None
        self.stopped = False
        self.before_stop: Callable[[], Any] = lambda: None

    def spawnProcess(
        self, protocol: Any, executable: str, arguments: list[str], environment: Any, childFDs: Any
    ) -> None:
        if self.refuse is not None:
            raise self.refuse
        process = Process(self, protocol, childFDs, environment, 1000 + len(self.processes))
        self.processes.append(process)
        protocol.makeConnection(process)

    def callWhenRunning(self, function: Callable[[], Any]) -> None:
        function()

    def callFromThread(self, function: Callable[..., Any], *arguments: Any) -> None:
        function(*arguments)

    def stop(self) -> None:
        if self.stopped:
            raise ReactorNotRunning
        self.stopped = True
        self.callLater(0, self.before_stop)


class Pipe:
    """The supervisor's end of a pipe."""

    reads = True

    def startReading(self) -> None:
        self.reads = True

    def stopReading(self) -> None:
        self.reads = False


class Process:
    """A process as its parent sees it: raises where Twisted's does when it is dead, wholly or in part."""

    def __init__(
        self, reactor: Reactor, protocol: Any, descriptors: dict[int, Any], environment: Any, pid: int
    ) -> None:
        self.reactor = reactor
        self.protocol = protocol
        self.descriptors = descriptors
        self.environment = environment
        self.pid: int | None = pid
        self.pipes = {number: Pipe() for number, kind in descriptors.items() if kind in ("r", "w")}
        self.signals: list[int] = []
        self.told: list[tuple[str, Any]] = []
        self._messages = SupervisorMessages(1_000_000)
        self._reason: Failure | None = None

    # --- what the supervisor does to it ---

    def writeToChild(self, descriptor: int, data: bytes) -> None:
        if descriptor not in self.pipes:
            raise KeyError(descriptor)
        self.told += self._messages.feed(data)

    def signalProcess(self, number: int) -> None:
        if self.pid is None:
            raise ProcessExitedAlready
        self.signals.append(number)

    def closeChildFD(self, descriptor: int) -> None:
        if descriptor in self.pipes:
            self.loses(descriptor)

    @property
    def paused(self) -> set[int]:
        """The descriptors that are not read for now."""
        return {number for number, pipe in self.pipes.items() if not pipe.reads}

    # --- what it does itself ---

    def says(self, word: str, value: Any = None) -> None:
        self.writes(encode(word, value))

    def logs(self, text: str, **fields: Any) -> None:
        event = {"log_format": text, "log_level": LogLevel.info, "log_namespace": "its.own", "log_time": 1.0, **fields}
        self.writes(encode_records([finished_record(event, formatEvent(event) or "")]))

    def writes(self, data: bytes, descriptor: int = CONTROL_OUT) -> None:
        self.protocol.childDataReceived(descriptor, data)

    def exits(self, status: int = 0, killed: int | None = None) -> None:
        """It is reaped; its pipes are open still."""
        self.pid = None
        self._reason = Failure(ProcessTerminated(status, killed) if status or killed else ProcessDone(0))
        self.protocol.processExited(self._reason)
        self._end_if_over()

    def loses(self, descriptor: int) -> None:
        del self.pipes[descriptor]
        self.protocol.childConnectionLost(descriptor)
        self._end_if_over()

    def dies(self, status: int = 0) -> None:
        """All of it."""
        self.exits(status)
        for descriptor in sorted(self.pipes):
            self.loses(descriptor)

    def _end_if_over(self) -> None:
        if not self.pipes and self._reason is not None:
            self.protocol.processEnded(self._reason)

    def words(self) -> list[str]:
        return [word for word, _ in self.told]

    @property
    def killed(self) -> bool:
        return signal.SIGKILL in self.signals


class Notifier:
    """Records what the service manager is told."""

    watchdog_interval: float | None = 1.0
    connected = True

    def __init__(self) -> None:
        self.said: list[str] = []
        self.statuses: list[str] = []
        self.signs = 0

    def ready(self, status: str) -> None:
        self.said.append("READY")

    def reloading(self) -> None:
        self.said.append("RELOADING")

    def stopping(self, status: str) -> None:
        self.said.append("STOPPING")

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def extend_timeout(self, seconds: float) -> None:
        self.said.append("EXTEND")

    def watchdog(self) -> None:
        self.signs += 1


class Slots:
    """A listener that records what is done to its sockets."""

    name = "tcp:127.0.0.1:1"
    shared = False
    certificates = ()
    revocation = None
    warnings = ()

    def __init__(self, slots: int) -> None:
        self.slot_sockets = slots
        self.done: list[str] = []
        self.problem: ListenError | None = None

    def of_slot(self, slot: int) -> "Slots":
        assert slot < self.slot_sockets
        assert "close" not in self.done
        self.asked = slot
        return self

    def fileno(self) -> int:
        return 100 + self.asked

    def add_slot(self) -> None:
        if self.problem is not None:
            raise self.problem
        self.slot_sockets += 1
        self.done.append("add")

    def balance_over(self, slots: Sequence[int]) -> None:
        if list(slots) == list(range(self.slot_sockets - 1)):
            self.done.append("leave out")
        elif len(slots) < self.slot_sockets:
            self.done.append(f"spread over {list(slots)}")

    def remove_slot(self) -> None:
        self.slot_sockets -= 1
        self.done.append("drop")

    def remove_file(self) -> None:
        self.done.append("remove file")

    def close(self) -> None:
        self.done.append("close")


PLAN: dict[str, Any] = {"drain_timeout": 10.0, "hang_timeout": 30.0, "max_age": 0.0, "max_memory": 0}


class World:
    """A supervisor and all that is around it."""

    def __init__(self, slots: int, problem: str | None = None, **plan: Any) -> None:
        self.reactor = Reactor()
        self.events: list[Any] = []
        self.reports: list[str | None] = []
        self.notifier: Any = Notifier()
        self.listener: Any = Slots(slots)
        self.plan = self.planned(**plan)
        self.next_plan: WorkerSpec | None = self.plan
        self.reloads = 0
        self.reload_steps = 0  # each of which takes a slice, if there are any
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        self.service = WorkerPool(
            listeners=[self.listener],
            slots=slots,
            plan=self.plan,
            command=["python", "-m", "worker"],
            log=Logger(observer=self.events.append),
            notifier=self.notifier,
            report=self.reports.append,
            check=lambda: problem,
            reload=self._reload,
        )
        self.done: list[Any] = []
        self.reactor.before_stop = lambda: self.service.stopService().addBoth(self.done.append)

    def planned(self, generation: int = 1, **plan: Any) -> WorkerSpec:
        def start(slot: int, slots: int) -> Any:
            return {"slot": slot, "slots": slots, "generation": generation}

        return WorkerSpec(start=start, **{**PLAN, **plan})

    def _reload(self) -> Steps[WorkerSpec | None]:
        self.reloads += 1
        for _ in range(self.reload_steps):
            yield
        return self.next_plan

    @property
    def processes(self) -> list[Process]:
        return self.reactor.processes

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.protocol.phase is not Phase.GONE]

    def send(self, number: int) -> None:
        self.handlers[number](number, None)

    def serve(self) -> list[Process]:
        """Start, and have all be ready."""
        self.service.startService()
        started = list(self.processes)
        for process in started:
            process.says("ready")
        return started

    def pass_time(self, seconds: float, *, silent: tuple[Process, ...] = ()) -> None:
        """Let time pass, in which all but these give signs of life."""
        for _ in range(int(seconds / BEAT)):
            for process in self.alive():
                if process not in silent and process.protocol.phase is not Phase.STARTING:
                    process.says("beat", {"open": 0, **process.protocol.counters})
            self.reactor.advance(BEAT)

    def texts(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.events]

    def logged(self, text: str) -> bool:
        return any(text in one for one in self.texts())


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., World]]:
    """Makes a World; nothing in it may fail unseen, and nothing may be left to be called in one that has stopped."""
    made: list[World] = []

    def make(slots: int = 2, **given: Any) -> World:
        one = World(slots, **given)
        made.append(one)
        monkeypatch.setattr("twisted.internet.reactor", one.reactor)
        monkeypatch.setattr(signal, "signal", one.handlers.__setitem__)
        monkeypatch.setattr(supervisor_module, "globalLogPublisher", one.events.append)
        return one

    # In the middle of what chance may choose.
    monkeypatch.setattr(supervisor_module.random, "random", lambda: 0.5)
    monkeypatch.setattr(supervisor_module.random, "uniform", lambda low, high: (low + high) / 2)
    yield make
    for one in made:
        assert not [event["log_failure"] for event in one.events if "log_failure" in event]
        if one.done:
            assert one.done == [None]
            assert one.reactor.getDelayedCalls() == []


# --- phases ---


def test_a_worker_goes_through_its_phases_and_no_other_way(world) -> None:
    allowed = {
        (Phase.STARTING, Phase.READY),
        (Phase.STARTING, Phase.DRAINING),
        (Phase.STARTING, Phase.GONE),
        (Phase.READY, Phase.DRAINING),
        (Phase.READY, Phase.GONE),
        (Phase.DRAINING, Phase.GONE),
    }
    one = world()
    one.service.startService()
    for before in Phase:
        for after in Phase:
            worker = WorkerProcess(one.service, one.service.slots[0], one.plan)
            worker.phase = before
            if (before, after) in allowed:
                worker.move(after)
                assert worker.phase is after
            else:
                with pytest.raises(RuntimeError, match=f"that is {before.value} cannot become {after.value}"):
                    worker.move(after)


# --- start ---


def test_every_slot_gets_a_process_with_its_own_sockets_and_what_to_serve(world) -> None:
    one = world(3)
    one.service.startService()
    assert [process.descriptors[FIRST_SOCKET] for process in one.processes] == [100, 101, 102]
    for number, process in enumerate(one.processes):
        assert process.told == [("start", {"slot": number, "slots": 3, "generation": 1})]
        assert {key: process.descriptors[key] for key in (1, 2, 3, 4)} == {1: "r", 2: "r", 3: "w", 4: "r"}
        assert set(process.descriptors) == {0, 1, 2, 3, 4, FIRST_SOCKET}


def test_it_serves_once_all_are_ready_and_says_so_once(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].says("ready")
    assert one.reports == []
    assert one.notifier.said == []
    one.processes[0].says("ready")
    one.processes[0].says("ready")
    assert one.reports == [None]
    assert one.notifier.said == ["READY"]
    assert one.logged("listening on tcp:127.0.0.1:1")
    assert one.service.status == "serving: 2 of 2 workers ready, 0 connections open"


def test_the_status_counts_workers_and_connections(world) -> None:
    one = world(3)
    one.service.startService()
    assert one.service.status == "starting: 0 of 3 workers ready, 0 connections open"
    first, second, third = one.processes
    for process in one.processes:
        process.says("ready")
    first.says("beat", {"open": 2})
    second.says("beat", {"open": 3, "memory": 7})
    third.dies(1)
    one.reactor.advance(BEAT)
    assert one.notifier.statuses[-1] == "serving: 2 of 3 workers ready, 5 connections open"
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.service.status == "draining: 0 of 3 workers ready, 5 connections open"


def test_a_worker_that_cannot_start_ends_the_start_with_its_reason(world) -> None:
    one = world()
    one.service.startService()
    one.processes[0].says("ready")
    one.processes[1].says("failed", "the greeting is a secret")
    one.processes[1].dies(1)
    assert one.reports == ["the greeting is a secret"]
    assert one.service.exit_status == 1
    assert one.reactor.stopped
    one.reactor.advance(0)
    assert one.processes[0].words() == ["start", "hurry", "drain"]
    one.processes[0].dies()
    assert one.done == [None]


def test_a_start_that_failed_waits_a_few_seconds_for_the_others_and_no_longer(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].dies(1)
    one.reactor.pump([0, 4.9])
    assert not one.processes[0].killed
    one.reactor.advance(0.2)
    assert one.processes[0].killed
    one.processes[0].dies(9)
    assert one.done == [None]


def test_a_worker_that_dies_at_the_start_without_a_word_ends_it_too(world) -> None:
    one = world()
    one.service.startService()
    one.processes[1].dies(3)
    one.processes[0].dies(3)
    assert one.reports == [
        "worker 1 (pid 1001) has ended: A process has ended with a probable error condition: "
        "process ended with exit code 3."
    ]
    assert one.service.exit_status == 1
    assert len(one.processes) == 2


def test_a_service_that_serves_is_not_ended_by_a_worker_that_cannot_start(world) -> None:
    one = world()
    _, second = one.serve()
    second.dies(9)
    for _ in range(10):
        one.pass_time(40)
        one.processes[-1].says("failed", "no certificate")
        one.processes[-1].dies(1)
    assert not one.reactor.stopped
    assert one.service.exit_status == 0
    assert one.reports == [None]
    assert one.logged("slot 1 gets a new worker in 30.0 s: no certificate")


def test_a_start_for_which_the_system_has_no_process_fails_with_one_line(world) -> None:
    one = world()
    one.reactor.refuse = BlockingIOError(11, "Resource temporarily unavailable")
    one.service.startService()
    assert one.reports == ["no worker can be spawned: python: Resource temporarily unavailable"]
    one.reactor.advance(0)
    assert one.done == [None]
    assert one.service.exit_status == 1


@pytest.mark.parametrize("error", [LookupError("no page"), SystemExit(0), ValueError("embedded\nnull byte")], ids=repr)
def test_whatever_fails_as_workers_are_started_ends_the_start_with_one_line(world, monkeypatch, error) -> None:
    def refuse(*given: object, **more: object) -> None:
        raise error

    one = world()
    monkeypatch.setattr(one.reactor, "spawnProcess", refuse)
    one.service.startService()
    text = str(error).replace("\n", " ")
    assert one.reports == [f"the workers cannot be started: {type(error).__name__}: {text}"]
    assert one.service.exit_status == 1
    assert [event["log_level"].name for event in one.events if "log_failure" in event] == ["error"]
    one.events.clear()  # they were to be there
    one.reactor.advance(0)
    assert one.done == [None]


def test_a_start_that_is_abandoned_leaves_no_socket_and_no_file(world) -> None:
    one = world()
    one.service.abandon()
    assert one.listener.done == ["remove file", "close"]


def test_what_the_check_finds_is_reported_before_anything_is_spawned(world) -> None:
    one = world(problem="the process still runs as root")
    with pytest.raises(StartError, match="still runs as root"):
        one.service.startService()
    assert one.reports == ["the process still runs as root"]
    assert one.processes == []
    assert one.handlers == {}
    assert one.listener.done == ["remove file", "close"]


def test_a_stop_before_all_are_ready_is_reported_as_a_start_that_did_not_happen(world) -> None:
    one = world()
    one.service.startService()
    one.processes[0].says("ready")
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.reports == ["told to stop before every worker was ready"]
    for process in one.processes:
        process.dies()
    assert one.done == [None]
    assert one.service.exit_status == 0


def test_a_worker_that_is_not_ready_within_a_minute_is_killed(world) -> None:
    one = world()
    first, _ = one.serve()
    first.dies(9)
    one.pass_time(1)
    late = one.processes[-1]
    for _ in range(59):
        late.logs("still busy")  # to be heard is not to be ready
        one.pass_time(1)
    assert late.signals == []
    one.pass_time(1)
    assert late.signals == [signal.SIGKILL]
    assert one.logged("is not ready after 60 s, and is killed")


# --- deaths ---


def test_the_back_off_doubles_from_a_tenth_of_a_second_to_half_a_minute() -> None:
    assert [round(backoff(deaths, 0.5), 1) for deaths in range(1, 12)] == [
        *(0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0)
    ]
    assert backoff(10**9, 0.5) == 30.0


def test_the_jitter_is_a_quarter_either_way() -> None:
    assert backoff(1, 0) == pytest.approx(0.075)
    assert backoff(1, 1) == pytest.approx(0.125)
    assert backoff(50, 1) == pytest.approx(37.5)


def test_a_worker_that_dies_is_replaced_after_its_back_off(world) -> None:
    one = world()
    first, second = one.serve()
    waits = []
    for _ in range(4):
        one.processes[-1].dies(9)
        count = len(one.processes)
        waits.append(round(one.service.slots[1].respawn.getTime() - one.reactor.seconds(), 3))
        one.reactor.advance(waits[-1] - 0.01)
        assert len(one.processes) == count
        one.reactor.advance(0.02)
        one.processes[-1].says("ready")
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert one.processes[-1].told[0] == ("start", {"slot": 1, "slots": 2, "generation": 1})
    assert one.service.slots[1].ready
    assert first.signals == second.signals == []


def test_a_minute_of_health_forgets_the_deaths_before(world) -> None:
    one = world()
    one.serve()
    for _ in range(3):
        one.processes[-1].dies(9)
        one.pass_time(1)
        one.processes[-1].says("ready")
    one.pass_time(60)
    one.processes[-1].dies(9)
    assert one.texts()[-1] == "slot 1 gets a new worker in 0.1 s"


def test_a_respawn_for_which_there_is_no_process_is_tried_again(world) -> None:
    one = world()
    _, second = one.serve()
    one.reactor.refuse = OSError(12, "Cannot allocate memory")
    second.dies(9)
    one.pass_time(5)
    assert len(one.processes) == 2
    one.reactor.refuse = None
    one.pass_time(5)
    one.processes[-1].says("ready")
    assert [slot.ready for slot in one.service.slots] == [True, True]


def test_a_signal_that_has_no_name_is_one_like_any_other(world) -> None:
    one = world()
    _, second = one.serve()
    second.exits(killed=signal.SIGRTMIN + 6)
    for descriptor in sorted(second.pipes):
        second.loses(descriptor)
    assert one.service.overview()["exits"] == {1: {f"signal {signal.SIGRTMIN + 6}": 1}}
    assert one.logged("slot 1 gets a new worker in")


def test_nothing_is_sent_to_a_process_that_is_dead_and_whose_output_is_still_read(world) -> None:
    one = world()
    first, second = one.serve()
    second.loses(CONTROL_IN)
    second.exits(9)
    one.reactor.advance(BEAT)
    one.send(signal.SIGTTIN)  # which all are told of
    assert first.words() == ["start", "share"]
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    one.send(signal.SIGTERM)
    for process in one.alive():
        for descriptor in sorted(process.pipes):
            process.loses(descriptor)
        if process.pid is not None:
            process.exits()
    assert one.done == [None]


def test_last_words_are_read_before_a_slot_gets_its_next_worker(world) -> None:
    one = world()
    _, second = one.serve()
    second.exits(11)
    second.writes(b"Fatal Python error\n", 2)
    second.says("beat", {"ended": 3})
    for descriptor in sorted(second.pipes):
        second.loses(descriptor)
    assert one.logged("worker 1 (pid 1001) printed: Fatal Python error")
    assert one.service.totals == {"ended": 3}


def test_a_child_that_holds_the_pipes_of_a_dead_worker_does_not_keep_its_slot(world) -> None:
    one = world()
    _, second = one.serve()
    second.exits(9)
    second.loses(CONTROL_IN)
    second.loses(CONTROL_OUT)
    one.reactor.advance(0.9)
    assert second.protocol.phase is Phase.READY
    one.reactor.advance(0.2)
    assert second.protocol.phase is Phase.GONE
    one.reactor.advance(0.2)
    assert len(one.processes) == 3


def test_a_worker_that_closes_its_channel_and_lives_on_is_killed(world) -> None:
    one = world(hang_timeout=0.0)
    _, second = one.serve()
    second.loses(CONTROL_OUT)
    one.reactor.advance(4.9)
    assert second.signals == []
    one.reactor.advance(0.2)
    assert second.signals == [signal.SIGKILL]


# --- hangs ---


def test_a_worker_that_is_not_heard_prints_its_stack_and_is_killed(world) -> None:
    one = world()
    first, second = one.serve()
    one.pass_time(29, silent=(second,))
    assert second.signals == []
    one.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2]
    assert one.logged("gave no sign of life for 30.0 s")
    second.writes(b'  File "x.py", line 1 in loop\n', 2)
    one.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2, signal.SIGKILL]
    assert first.signals == []
    second.dies(9)
    one.pass_time(1)
    one.processes[-1].says("ready")
    assert one.service.slots[1].ready
    assert one.logged('printed:   File "x.py", line 1 in loop')


def test_a_worker_that_hangs_while_it_drains_is_killed_as_well(world) -> None:
    one = world(drain_timeout=1000.0)
    one.serve()
    one.send(signal.SIGTERM)
    one.pass_time(30, silent=tuple(one.processes))
    assert all(process.signals == [signal.SIGUSR2] for process in one.processes)
    one.pass_time(1, silent=tuple(one.processes))
    assert all(process.killed for process in one.processes)


def test_without_a_hang_timeout_nobody_is_killed_for_silence(world) -> None:
    one = world(hang_timeout=0.0)
    one.serve()
    one.pass_time(500, silent=tuple(one.processes))
    assert all(process.signals == [] for process in one.processes)
    assert one.notifier.signs > 490


def test_a_parent_that_was_away_kills_nobody(world) -> None:
    one = world()
    first, second = one.serve()
    second.dies(9)
    one.pass_time(1)
    starting = one.processes[-1]
    one.reactor.advance(1000)
    assert first.signals == starting.signals == []
    one.pass_time(20)
    starting.says("ready")
    one.pass_time(100)
    assert first.signals == starting.signals == []


def test_the_service_manager_hears_nothing_of_a_parent_whose_workers_cannot_be_killed(world) -> None:
    one = world()
    first, _ = one.serve()
    one.pass_time(50, silent=(first,))
    assert one.notifier.signs >= 50
    one.pass_time(10, silent=(first,))
    before = one.notifier.signs
    one.pass_time(50, silent=(first,))
    assert one.notifier.signs == before


def test_one_look_that_fails_does_not_end_the_others(world, monkeypatch) -> None:
    one = world()
    _, second = one.serve()
    monkeypatch.setattr(one.notifier, "status", lambda text: 1 / 0)
    one.reactor.advance(BEAT)
    monkeypatch.undo()
    assert [event.pop("log_failure").type for event in one.events if "log_failure" in event] == [ZeroDivisionError]
    one.pass_time(32, silent=(second,))
    assert second.killed


# --- replacement ---


def roll(one: World) -> None:
    """Answer as workers do that can be replaced, until there is nothing left to do."""
    while busy := [p for p in one.alive() if p.protocol.phase is Phase.STARTING or "drain" in p.words()]:
        for process in busy:
            if process.protocol.phase is Phase.STARTING:
                process.says("ready")
            else:
                process.dies()


def test_a_reload_replaces_one_after_the_other_and_each_serves_before_the_old_one_drains(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING"]
    assert len(one.processes) == 3
    third = one.processes[2]
    assert third.told == [("start", {"slot": 0, "slots": 2, "generation": 2})]
    assert third.descriptors[FIRST_SOCKET] == first.descriptors[FIRST_SOCKET]
    assert first.words() == ["start"]
    third.says("ready")
    # Its queue is the successor's: no kind of socket is to be served to its end.
    assert first.told[1:] == [("drain", [])]
    assert second.words() == ["start"]
    assert len(one.processes) == 4
    fourth = one.processes[3]
    assert fourth.told[0][1]["slot"] == 1
    assert one.notifier.said == ["READY", "RELOADING"]
    fourth.says("ready")
    assert second.words() == ["start", "drain"]
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    first.dies()
    second.dies()
    one.pass_time(200)
    assert one.alive() == [third, fourth]
    assert third.signals == fourth.signals == []


def test_an_old_worker_that_does_not_end_is_killed_after_its_deadlines(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    one.pass_time(49)
    assert not first.killed
    one.pass_time(2)
    assert first.killed
    assert not one.processes[-1].killed


def test_a_successor_that_fails_leaves_the_old_one_and_ends_the_reload(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    one.processes[-1].says("failed", "bad code")
    one.processes[-1].dies(1)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert one.logged("workers are not replaced: worker 0 (pid 1002) cannot take over: bad code")
    one.pass_time(100)
    assert one.alive() == [first, second]
    assert first.words() == second.words() == ["start"]
    assert not one.reactor.stopped


def test_a_reload_for_which_there_is_no_process_leaves_the_old_ones(world) -> None:
    one = world()
    one.serve()
    one.reactor.refuse = OSError(11, "Resource temporarily unavailable")
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert one.logged("workers are not replaced: no worker can be spawned: python: Resource temporarily unavailable")
    assert [slot.ready for slot in one.service.slots] == [True, True]


def test_a_reload_that_finds_a_mistake_touches_nobody(world) -> None:
    one = world()
    one.serve()
    one.next_plan = None
    one.send(signal.SIGHUP)
    assert one.notifier.said == ["READY", "RELOADING", "READY"]
    assert len(one.processes) == 2


def test_a_reload_during_a_reload_replaces_all_again_by_the_newest(world) -> None:
    one = world()
    one.serve()
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    one.next_plan = one.planned(3)
    one.send(signal.SIGHUP)
    roll(one)
    assert [slot.worker.plan.start(0, 0)["generation"] for slot in one.service.slots] == [3, 3]
    assert one.notifier.said == ["READY", "RELOADING", "RELOADING", "READY"]
    assert len(one.alive()) == 2


def test_a_second_reload_repairs_what_the_first_would_have_broken(world) -> None:
    one = world()
    one.serve()
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    bad = one.processes[-1]
    one.next_plan = one.planned(3)
    one.send(signal.SIGHUP)
    bad.dies(1)
    roll(one)
    assert [slot.worker.plan.start(0, 0)["generation"] for slot in one.service.slots] == [3, 3]
    assert one.notifier.said[-1] == "READY"


def test_a_reload_that_is_asked_for_before_all_are_ready_comes_then(world) -> None:
    one = world()
    one.service.startService()
    one.send(signal.SIGHUP)
    assert one.reloads == 0
    one.next_plan = one.planned(2)
    for process in list(one.processes):
        process.says("ready")
    assert one.reloads == 1
    roll(one)
    assert one.reloads == 1
    assert [slot.worker.plan.start(0, 0)["generation"] for slot in one.service.slots] == [2, 2]


@pytest.fixture
def slow(monkeypatch):
    """Makes each step of a reload a slice."""
    monkeypatch.setattr(supervisor_module, "in_slices", partial(in_slices, size=0.0, pause=0.1))


def test_a_reload_that_is_read_in_slices_leaves_the_workers_alone_until_all_is_read(world, slow) -> None:
    one = world()
    one.serve()
    one.reload_steps, one.next_plan = 10, one.planned(2)
    one.send(signal.SIGHUP)
    for _ in range(9):
        one.reactor.advance(0.1)
        assert (one.reloads, len(one.processes)) == (1, 2)
    one.reactor.advance(0.1)
    roll(one)
    assert [slot.worker.plan.start(0, 0)["generation"] for slot in one.service.slots] == [2, 2]
    assert [word for word in one.notifier.said if word != "EXTEND"] == ["READY", "RELOADING", "READY"]


def test_all_signals_while_a_reload_is_read_are_one_more_reload(world, slow) -> None:
    one = world()
    one.serve()
    one.reload_steps, one.next_plan = 10, one.planned(2)
    one.send(signal.SIGHUP)
    one.reactor.advance(0.1)
    for _ in range(3):
        one.send(signal.SIGHUP)
    assert one.reloads == 1
    for _ in range(9):
        one.reactor.advance(0.1)
    assert one.reloads == 2
    one.next_plan = one.planned(3)
    for _ in range(10):
        one.reactor.advance(0.1)
    roll(one)
    assert one.reloads == 2
    assert [slot.worker.plan.start(0, 0)["generation"] for slot in one.service.slots] == [3, 3]


@pytest.mark.parametrize("turns", [0, 1, 5])
def test_a_stop_while_a_reload_is_read_gives_it_up(world, slow, turns) -> None:
    one = world()
    processes = one.serve()
    one.reload_steps, one.next_plan = 10, one.planned(2)
    one.send(signal.SIGHUP)
    for _ in range(turns):
        one.reactor.advance(0.1)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.logged("a reload is given up: the service stops")
    assert one.notifier.said[-1] == "STOPPING"
    for process in processes:
        process.dies(0)
    one.reactor.advance(5)
    assert one.done == [None]
    assert len(one.processes) == 2


def test_certificates_that_change_again_while_a_reload_is_read_are_read_again(world, slow, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    one = world(1, watched=(str(file),))
    one.serve()
    one.reload_steps = 10
    file.write_text("another")
    one.pass_time(BEAT)
    for _ in range(3):
        one.reactor.advance(0.1)
    assert one.reloads == 1
    file.write_text("and another one")
    one.pass_time(10 * BEAT)
    while one.reloads < 2:
        roll(one)
        one.pass_time(BEAT)
    assert one.reloads == 2


@pytest.mark.parametrize(("count", "seconds"), [(0, 60), (100, 62), (5000, 160)])
def test_a_worker_has_the_more_time_to_start_the_more_certificates_it_loads(world, count, seconds) -> None:
    one = world(2)
    one.listener.certificates = (None,) * count
    one.service.startService()
    one.pass_time(seconds - 1.5)
    assert not any(process.killed for process in one.processes)
    one.pass_time(2)
    assert all(process.killed for process in one.processes)
    assert one.logged(f"is not ready after {seconds} s, and is killed")
    assert ("EXTEND" in one.notifier.said) is (count > 0)


def test_a_worker_that_dies_while_its_successor_starts_leaves_it_the_slot(world) -> None:
    one = world()
    first, second = one.serve()
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    successor = one.processes[-1]
    first.dies(9)
    one.pass_time(1)
    successor.says("ready")
    roll(one)
    one.pass_time(1)
    assert not successor.killed
    assert one.service.slots[0].worker is successor.protocol
    assert second not in one.alive()
    assert len(one.processes) == 4
    assert one.notifier.said == ["READY", "RELOADING", "READY"]


def test_a_worker_and_its_successor_that_both_die_are_replaced_like_any_other(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    first.dies(9)
    one.processes[-1].dies(9)
    one.pass_time(1)
    one.processes[-1].says("ready")
    assert one.service.slots[0].ready
    assert len(one.alive()) == 1


def test_a_stop_ends_a_successor_that_starts_at_once_and_the_worker_in_charge_serves_the_queue(world) -> None:
    """The successor has copies of the sockets: until they are closed nobody is refused, and no other can listen."""
    one = world()
    first, second = one.serve()
    one.send(signal.SIGHUP)
    successor = one.processes[2]
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert successor.told[1:] == [("drain", [])]
    assert successor.signals == [signal.SIGTERM]
    for worker in (first, second):
        assert worker.told[1:] == [("drain", ["slot", "own"])]
        assert worker.signals == []


def test_a_stop_has_a_worker_that_starts_alone_in_its_slot_serve_the_queue(world) -> None:
    one = world(1)
    [first] = one.serve()
    first.dies(9)
    one.pass_time(1)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.processes[-1].told[1:] == [("drain", ["slot", "own"])]
    assert one.processes[-1].signals == []


def test_a_worker_that_still_starts_by_the_old_plan_is_replaced_too(world) -> None:
    one = world(1)
    [first] = one.serve()
    first.dies(9)
    one.pass_time(1)
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    assert one.processes[1].told[0][1]["generation"] == 1
    roll(one)
    assert [process.told[0][1]["generation"] for process in one.alive()] == [2]


def test_a_worker_that_was_asked_to_end_is_replaced_first_and_once(world) -> None:
    one = world()
    first, second = one.serve()
    first.says("leave")
    first.says("leave")
    assert len(one.processes) == 3
    one.processes[2].says("ready")
    assert first.words() == ["start", "drain"]
    first.says("leave")
    assert len(one.processes) == 3
    assert one.notifier.said == ["READY"]
    first.dies()
    assert one.alive() == [second, one.processes[2]]


def test_changed_certificates_are_a_reload(world, tmp_path) -> None:
    file = tmp_path / "server.pem"
    file.write_text("one")
    one = world(1, watched=(str(file),))
    one.serve()
    one.pass_time(3)
    assert one.reloads == 0
    file.write_text("another")
    one.pass_time(3)
    assert one.reloads == 1
    roll(one)
    one.pass_time(3)
    assert one.reloads == 1


# --- worn workers ---


def test_workers_of_an_age_are_replaced_one_at_a_time(world) -> None:
    one = world(3, max_age=100.0)
    one.serve()
    one.pass_time(99)
    assert len(one.processes) == 3
    one.pass_time(5)
    assert len(one.processes) == 4
    one.processes[3].says("ready")
    assert one.processes[0].words() == ["start", "drain"]
    one.pass_time(2)
    assert len(one.processes) == 5
    assert one.logged("worker 0 (pid 1000) has reached its age")


def test_the_age_differs_by_a_tenth_from_worker_to_worker(world, monkeypatch) -> None:
    one = world(1, max_age=100.0)
    asked = []
    monkeypatch.setattr(supervisor_module.random, "uniform", lambda *bounds: asked.append(bounds) or 0.9)
    one.serve()
    assert asked == [(0.9, 1.1)]
    one.pass_time(89)
    assert len(one.processes) == 1
    one.pass_time(2)
    assert len(one.processes) == 2


def test_workers_with_too_much_memory_are_replaced_one_at_a_time(world) -> None:
    one = world(3, max_memory=100 << 20)
    first, second, third = one.serve()
    first.says("beat", {"memory": 100 << 20})
    second.says("beat", {"memory": (100 << 20) + 1})
    third.says("beat", {"memory": 200 << 20})
    for _ in range(5):
        one.reactor.advance(BEAT)
    assert [process.told[0][1]["slot"] for process in one.processes[3:]] == [1]
    one.processes[3].says("ready")
    one.reactor.advance(BEAT)
    assert [process.told[0][1]["slot"] for process in one.processes[3:]] == [1, 2]
    assert first.words() == ["start"]


def test_after_a_replacement_that_failed_worn_workers_are_left_alone_for_a_while(world) -> None:
    one = world(1, max_age=10.0)
    one.serve()
    one.pass_time(12)
    one.processes[1].dies(1)
    one.pass_time(28)
    assert len(one.processes) == 2
    one.pass_time(3)
    assert len(one.processes) == 3


# --- slots ---


def test_a_slot_is_added_with_a_socket_and_all_are_told_of_their_share(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGTTIN)
    third = one.processes[2]
    assert one.listener.done == ["add"]
    assert third.descriptors[FIRST_SOCKET] == 102
    assert third.told[0] == ("start", {"slot": 2, "slots": 3, "generation": 1})
    assert first.told[1:] == second.told[1:] == [("share", 3)]
    third.says("ready")
    assert one.service.status.startswith("serving: 3 of 3 workers ready")


def test_several_slots_are_added_in_a_row(world) -> None:
    one = world()
    one.serve()
    for _ in range(3):
        one.send(signal.SIGTTIN)
    assert [process.descriptors[FIRST_SOCKET] for process in one.processes] == [100, 101, 102, 103, 104]
    roll(one)
    assert one.service.status.startswith("serving: 5 of 5 workers ready")


def test_a_slot_that_is_wanted_before_all_are_ready_comes_then(world) -> None:
    one = world()
    one.service.startService()
    one.send(signal.SIGTTIN)
    assert len(one.processes) == 2
    roll(one)
    assert one.service.status.startswith("serving: 3 of 3 workers ready")


def test_a_slot_that_cannot_have_its_sockets_is_given_up_whole(world) -> None:
    one = world()
    another: Any = Slots(2)
    another.problem = ListenError("cannot listen on 127.0.0.1:1: permission denied")
    one.service._listeners.append(another)
    one.serve()
    one.send(signal.SIGTTIN)
    assert one.listener.done == ["add", "drop"]
    assert len(one.processes) == 2
    assert one.logged("no worker can be added: cannot listen on 127.0.0.1:1: permission denied")
    another.problem = None
    one.send(signal.SIGTTIN)
    roll(one)
    assert one.service.status.startswith("serving: 3 of 3")


def test_the_last_slot_leaves_in_order_and_nothing_of_its_queue_is_lost(world) -> None:
    one = world(3)
    first, second, third = one.serve()
    one.send(signal.SIGTTOU)
    assert one.listener.done == ["leave out"]
    assert third.told[1:] == [("drain", ["slot"])]
    assert first.words() == ["start"]
    one.pass_time(5)
    assert one.listener.done == ["leave out"]
    third.dies()
    assert one.listener.done == ["leave out", "drop"]
    assert first.told[1:] == second.told[1:] == [("share", 2)]
    assert len(one.processes) == 3
    assert one.service.status.startswith("serving: 2 of 2")


def test_several_slots_leave_in_a_row_and_the_last_one_stays(world) -> None:
    one = world(3)
    one.serve()
    for _ in range(5):
        one.send(signal.SIGTTOU)
    roll(one)
    assert one.listener.done == ["leave out", "drop"] * 2
    assert one.logged("SIGTTOU: the last worker stays")
    assert one.service.status == "serving: 1 of 1 worker ready, 0 connections open"
    assert one.alive() == [one.processes[0]]


def test_a_slot_without_a_worker_gets_one_that_serves_its_queue_before_it_leaves(world) -> None:
    one = world()
    _, second = one.serve()
    second.dies(9)
    assert one.listener.done == ["leave out"]  # new clients go where one is served at once
    one.send(signal.SIGTTOU)
    one.pass_time(1)
    third = one.processes[-1]
    third.says("ready")
    assert third.told[1:] == [("drain", ["slot"])]
    third.dies()
    assert one.listener.done[-1] == "drop"


def test_a_slot_that_was_removed_and_added_again_is_removed_and_added(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTTOU)
    one.send(signal.SIGTTIN)
    roll(one)
    assert one.listener.done == ["leave out", "drop", "add"]
    assert one.service.status.startswith("serving: 2 of 2")


def test_slots_wait_for_a_reload_and_a_reload_passes_over_a_slot_that_leaves(world) -> None:
    one = world(3)
    one.serve()
    one.send(signal.SIGTTOU)
    one.next_plan = one.planned(2)
    one.send(signal.SIGHUP)
    one.send(signal.SIGTTIN)
    assert one.listener.done == ["leave out"]
    roll(one)
    assert one.listener.done == ["leave out", "drop", "add"]
    assert [process.told[0][1]["generation"] for process in one.alive()] == [2, 2, 2]


# --- rubbish and floods ---

RUBBISH = [
    b"\xff\xfe rubbish \x00\n",
    b"hello\n",
    b"beat [1]\n",
    b'beat {"open": "x"}\n',
    b"beat {\n",
    b"records [[]]\n",
    b"ready null\n",
    b'failed "after all"\n',
    b'access ["start=1 worker=1\\n"]\n',
    b'rows {"id": 1, "rows": []}\n',
    b"x" * 300_000,
]


@pytest.mark.parametrize("rubbish", RUBBISH, ids=lambda rubbish: repr(rubbish[:24]))
def test_rubbish_costs_the_worker_that_sends_it_its_life_and_nobody_else(world, rubbish) -> None:
    one = world()
    first, second = one.serve()
    second.writes(rubbish)
    assert second.signals == [signal.SIGKILL]
    [said] = [text for text in one.texts() if "violated the control protocol" in text]
    assert said.startswith("worker 1 (pid 1001) violated the control protocol, and is killed: ")
    assert len(said) < 250
    second.says("beat", {"open": 10})
    second.writes(rubbish)
    assert len([text for text in one.texts() if "violated" in text]) == 1
    second.dies(9)
    one.pass_time(1)
    one.processes[-1].says("ready")
    assert first.signals == []
    assert one.service.status == "serving: 2 of 2 workers ready, 0 connections open"


def test_a_record_that_cannot_be_handled_costs_only_its_worker(world, monkeypatch) -> None:
    one = world()
    first, second = one.serve()
    monkeypatch.setattr(one.service, "publish", lambda event: 1 / 0)
    second.logs("hello")
    monkeypatch.undo()
    assert second.killed
    assert not first.killed
    assert one.logged("worker 1 (pid 1001) sent what cannot be handled, and is killed: ZeroDivisionError")


def test_no_format_string_of_a_worker_is_run(world) -> None:
    one = world(1)
    [only] = one.serve()
    text = "{a:>2000000000} {a.__class__} %(a)2000000000d %s"
    only.writes(encode("records", [["warn", "{x}", 5.0, text, "{y}", {"a": 1, "log": "{z}"}]]))
    event = one.events[-1]
    assert formatEvent(event) == text
    assert event["log_format"] == "{log_text}"
    assert textFromEventDict(legacy(event)) == text + "\n{y}"
    assert event.pop("log_failure").getTraceback() == "{y}"


def legacy(event: dict[str, Any]) -> dict[str, Any]:
    """What an observer of twisted.python.log gets of it."""
    found: list[dict[str, Any]] = []
    LegacyLogObserverWrapper(found.append)(dict(event))  # type: ignore[arg-type]  # a function is one
    return found[0]


def test_a_worker_s_failure_is_the_text_of_its_traceback(world) -> None:
    one = world(1)
    [only] = one.serve()
    traceback = "Traceback:\n  at x\x1b\nbuiltins.ValueError: no"
    only.writes(encode("records", [["critical", "a", 5.0, "it failed", traceback, {}]]))
    failure = one.events[-1].pop("log_failure")
    assert failure.getErrorMessage() == "builtins.ValueError: no"
    assert failure.getTraceback() == failure.getBriefTraceback() == "Traceback:\n  at x\\x1b\nbuiltins.ValueError: no"
    assert failure.getTracebackObject() is None
    file = io.StringIO()
    failure.printTraceback(file)
    assert file.getvalue() == failure.getTraceback()


def test_a_worker_that_violates_again_and_again_is_replaced_with_back_off(world) -> None:
    one = world()
    first, _ = one.serve()
    waits = []
    for _ in range(4):
        one.processes[-1].writes(b"rubbish\n")
        one.processes[-1].dies(9)
        waits.append(round(one.service.slots[1].respawn.getTime() - one.reactor.seconds(), 3))
        one.reactor.advance(waits[-1])
        one.processes[-1].says("ready")
    assert waits == [0.1, 0.2, 0.4, 0.8]
    assert first.signals == []


def test_a_heartbeat_alone_is_a_sign_of_life(world) -> None:
    one = world()
    _, second = one.serve()
    for _ in range(30):
        second.logs("still here")
        second.writes(b"a line", 1)
        one.pass_time(1, silent=(second,))
    assert second.signals == [signal.SIGUSR2]


def test_a_worker_that_wants_to_leave_again_and_again_is_replaced_with_back_off(world) -> None:
    one = world(1)
    one.serve()
    counts = []
    for _ in range(100):
        for process in one.alive():
            if process.protocol.phase is Phase.STARTING:
                process.says("ready")
            if "drain" in process.words():
                process.dies()
            else:
                process.says("leave")
        one.pass_time(1)
        counts.append(len(one.processes))
    assert counts[0] == 2
    assert 5 < counts[-1] < 15  # and not 100
    assert one.service.slots[0].ready


def test_a_worker_that_wants_to_leave_too_soon_leaves_later(world) -> None:
    one = world(1)
    one.serve()
    for _ in range(5):  # 0.1, 0.2, 0.4, 0.8, 1.6
        one.processes[-1].says("leave")
        one.pass_time(1)
        one.processes[-1].says("ready")
        one.processes[-2].dies()
        one.pass_time(1)
    last = one.processes[-1]
    last.says("leave")
    assert last.words() == ["start"]
    one.pass_time(4)
    one.processes[-1].says("ready")
    assert last.words() == ["start", "drain"]


def test_a_worker_that_says_that_it_is_too_large_is_replaced_with_back_off(world) -> None:
    one = world(1, max_memory=100)
    one.serve()
    for _ in range(100):
        for process in one.alive():
            if process.protocol.phase is Phase.STARTING:
                process.says("ready")
            process.says("beat", {"memory": 10**15})
            if "drain" in process.words():
                process.dies()
        one.pass_time(1)
    assert 5 < len(one.processes) < 15  # and not 100


def test_a_worker_that_does_not_read_its_questions_is_asked_few_and_killed(world) -> None:
    one = world()
    first, second = one.serve()
    answers: list[Any] = []
    for _ in range(10):
        for _ in range(10):
            one.service.rows("-age", 5).addCallback(answers.append)
        for word, value in first.told[1:]:
            first.says(word, {"id": value["id"], "rows": []})
        del first.told[1:]
        one.pass_time(2)
    assert [missing for _, missing in answers] == [[1]] * 100
    assert second.words() == ["start"] + ["rows"] * 16
    assert second.signals == []
    one.pass_time(10)
    assert second.signals == [signal.SIGKILL]
    assert one.logged("worker 1 (pid 1001) has not answered for 30.0 s, and is killed")
    assert first.signals == []


def test_an_answer_that_comes_late_is_no_violation_and_a_second_one_is(world) -> None:
    one = world(1)
    [only] = one.serve()
    answers: list[Any] = []
    one.service.rows("-age", 5).addCallback(answers.append)
    one.pass_time(5)
    assert answers == [([], [0])]
    only.says("rows", {"id": 1, "rows": []})
    assert not only.killed
    only.says("rows", {"id": 1, "rows": []})
    assert only.killed


def test_labels_of_workers_that_come_and_go_are_few(world) -> None:
    one = world(1)
    one.serve()
    for generation in range(20):
        process = one.processes[-1]
        process.says("beat", {f"closed\t{generation} {n}\t{one.listener.name}": 1 for n in range(50)} | {"ended": 50})
        process.dies(9)
        one.pass_time(35)
        one.processes[-1].says("ready")
    [shown] = one.service.overview()["workers"]
    labels = [name for name in shown["counters"] if name.startswith("closed")]
    assert len(labels) == 101
    assert sum(shown["counters"][name] for name in labels) == shown["counters"]["ended"] == 1000


def test_a_worker_that_floods_is_paused_until_the_next_look(world) -> None:
    one = world()
    first, second = one.serve()
    for _ in range(4998):
        second.says("beat", {})
    assert not second.paused
    second.says("beat", {})
    assert second.paused == {CONTROL_OUT}
    first.says("beat", {"open": 1})
    assert not first.paused
    one.reactor.advance(BEAT)
    assert not second.paused
    second.says("beat", {})
    assert not second.paused


def test_what_is_printed_is_taken_some_lines_at_a_time_and_silences_no_heartbeat(world) -> None:
    one = world()
    first, second = one.serve()
    second.writes(b"\n" * 8192, 1)
    assert second.paused == {1}
    assert len([text for text in one.texts() if "printed" in text]) == 100
    second.says("beat", {"open": 7})
    assert second.protocol.counters == {"open": 7}
    one.reactor.advance(0)  # all turns until a beat ends it
    assert len([text for text in one.texts() if "printed" in text]) == 5000
    assert second.paused == {1}
    one.reactor.advance(BEAT)
    assert len([text for text in one.texts() if "printed" in text]) == 8192
    assert second.paused == first.paused == set()


def test_what_a_worker_has_printed_before_it_died_is_in_the_log_before_it_is_replaced(world) -> None:
    one = world(1)
    [only] = one.serve()
    only.writes(b"a line\n" * 1000, 2)
    only.dies(9)
    assert not one.logged("has ended")
    one.reactor.advance(0)
    assert len([text for text in one.texts() if "printed" in text]) == 1000
    assert one.logged("has ended")
    one.pass_time(1)
    assert len(one.processes) == 2


def test_what_a_worker_prints_is_logged_by_lines_and_escaped(world) -> None:
    one = world(1)
    [only] = one.serve()
    only.writes(b"one\ntw", 2)
    only.writes(b"o\x1b[31m\xff\n", 2)
    assert one.texts()[-2:] == [
        "worker 0 (pid 1000) printed: one",
        "worker 0 (pid 1000) printed: two\\x1b[31m\\xff",
    ]
    only.writes(b"no end", 2)
    only.dies(9)
    assert one.logged("printed: no end")


def test_a_line_without_end_that_is_printed_takes_no_more_than_so_much_memory(world) -> None:
    one = world(1)
    [only] = one.serve()
    for _ in range(100):
        only.writes(b"x" * 8192, 1)
    assert len(only.protocol._printed[1]._buffer) <= 8192
    assert all(len(text) < 9000 for text in one.texts())


def test_a_record_of_a_worker_is_in_the_log_with_its_slot_and_all_that_it_had(world) -> None:
    one = world()
    _, second = one.serve()
    second.logs("{peer} went", peer="1.2.3.4", seconds=1.5)
    event = one.events[-1]
    assert formatEvent(event) == "1.2.3.4 went"
    assert (event["slot"], event["seconds"], event["log_level"]) == (1, 1.5, LogLevel.info)
    assert event["log_system"] == "its.own#info worker 1"


# --- counters ---


def counted(service: WorkerPool) -> dict[str, int]:
    """What all workers have counted, those that have ended too."""
    counters = dict(service.totals)
    for slot in service.slots:
        for worker in slot.workers():
            add(counters, worker.counters)
    return counters


def test_totals_are_of_all_workers_and_never_fall(world) -> None:
    one = world()
    first, second = one.serve()
    first.says("beat", {"open": 2, "memory": 10, "ended": 5, "aborted": 1})
    second.says("beat", {"open": 1, "memory": 20, "ended": 7})
    assert counted(one.service) == {"open": 3, "memory": 30, "ended": 12, "aborted": 1}
    first.dies(9)
    assert counted(one.service) == {"open": 1, "memory": 20, "ended": 12, "aborted": 1}
    one.pass_time(1)
    one.processes[-1].says("ready")
    one.processes[-1].says("beat", {"open": 1, "memory": 10, "ended": 2})
    assert counted(one.service)["ended"] == 14


def test_a_worker_that_counts_backwards_does_not_turn_the_totals_back(world) -> None:
    one = world(1)
    [only] = one.serve()
    only.says("beat", {"ended": 5, "open": 3})
    only.says("beat", {"ended": 4, "open": 1})
    assert counted(one.service) == {"ended": 5, "open": 1}


# --- stop ---


def test_a_stop_drains_all_and_ends_with_the_last_one(world) -> None:
    one = world()
    first, second = one.serve()
    first.says("beat", {"drain_ended": 0})
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.listener.done == ["remove file", "close"]  # the workers have its sockets
    assert first.told[1:] == second.told[1:] == [("drain", ["slot", "own"])]
    first.says("beat", {"drain_ended": 40, "drain_aborted": 1})
    first.dies()
    assert one.done == []
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    one.pass_time(3)
    second.says("beat", {"drain_ended": 1, "drain_aborted": 1})
    second.dies()
    assert one.done == [None]
    assert one.texts()[-1] == "drained: 41 ended, 2 aborted, 3.0 s"
    assert one.notifier.said[:3] == ["READY", "STOPPING", "EXTEND"]
    assert one.service.exit_status == 0
    assert len(one.processes) == 2


def test_sockets_of_a_service_manager_are_kept_until_a_drain_is_over(world) -> None:
    one = world(1)
    one.listener.shared = True
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert one.listener.done == ["remove file"]
    only.dies()
    assert one.listener.done == ["remove file", "close"]


def test_what_was_drained_before_the_stop_is_not_counted_at_its_end(world) -> None:
    one = world(1)
    [first] = one.serve()
    one.send(signal.SIGHUP)
    one.processes[-1].says("ready")
    first.says("beat", {"drain_ended": 100})
    first.dies()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    one.processes[-1].says("beat", {"drain_ended": 1})
    one.processes[-1].dies()
    assert one.texts()[-1].startswith("drained: 1 ended, 0 aborted")


def test_workers_that_do_not_end_are_killed_after_one_deadline_for_all(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTERM)
    one.pass_time(49)
    assert not any(process.killed for process in one.processes)
    one.pass_time(2)
    assert all(process.killed for process in one.processes)


def test_a_second_signal_hurries_and_kills_who_does_not(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGINT)
    one.reactor.advance(1)
    one.send(signal.SIGTERM)
    assert first.words() == second.words() == ["start", "drain", "hurry"]
    first.dies()
    one.pass_time(6)
    assert second.killed
    second.dies(9)
    assert one.done == [None]
    assert one.service.exit_status == 128 + signal.SIGTERM


def test_two_signals_in_one_turn_of_the_reactor_are_two(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.send(signal.SIGINT)
    one.reactor.advance(0)
    assert sorted(only.words()) == ["drain", "hurry", "start"]
    one.pass_time(6)
    assert only.killed


def test_a_signal_that_is_sent_again_at_once_is_one(world) -> None:
    one = world(1)
    [only] = one.serve()
    for _ in range(4):
        one.send(signal.SIGTERM)
        one.reactor.advance(0.125)
    assert only.words() == ["start", "drain"]
    one.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "hurry"]


def test_a_stop_from_elsewhere_drains_as_well(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.reactor.stop()
    one.reactor.advance(0)
    assert only.words() == ["start", "drain"]
    one.send(signal.SIGTERM)
    assert only.words() == ["start", "drain", "hurry"]
    only.dies()
    assert one.done == [None]


def test_a_stop_ends_a_successor_and_what_still_drains_too(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGHUP)
    one.processes[2].says("ready")
    assert len(one.processes) == 4
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    assert first.told[1:] == [("drain", [])]
    assert all(process.words() == ["start", "drain"] for process in one.processes)
    one.processes[3].says("ready")  # it had no time to hear of the drain
    assert second.words() == ["start", "drain"]
    for process in one.alive():
        process.dies()
    assert one.done == [None]
    assert len(one.processes) == 4


def test_a_worker_that_dies_while_it_drains_is_not_replaced(world) -> None:
    one = world()
    first, second = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    first.dies(9)
    one.pass_time(5)
    second.dies(9)
    assert one.done == [None]
    assert len(one.processes) == 2


def test_a_slot_that_waits_for_its_next_worker_gets_one_for_its_queue_when_all_stops(world) -> None:
    one = world(1)
    [only] = one.serve()
    only.dies(9)
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    [_, last] = one.processes
    assert last.told[1:] == [("drain", ["slot", "own"])]
    assert one.listener.done[-1] == "close"
    assert one.done == []
    last.dies()
    assert one.done == [None]


def test_signals_after_the_stop_change_nothing(world) -> None:
    one = world()
    one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    for number in (signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU):
        one.send(number)
    one.processes[0].says("leave")
    assert one.reloads == 0
    assert len(one.processes) == 2
    for process in one.processes:
        process.dies()
    assert one.done == [None]


def test_stopping_twice_is_stopping_once(world) -> None:
    one = world(1)
    [only] = one.serve()
    one.send(signal.SIGTERM)
    one.reactor.advance(0)
    again: list[Any] = []
    one.service.stopService().addBoth(again.append)
    only.dies()
    assert one.done == again == [None]
    assert only.words() == ["start", "drain"]


def test_the_environment_finds_the_same_modules(world, monkeypatch) -> None:
    monkeypatch.setattr("sys.path", ["", "/one", "/two"])
    one = world(1)
    one.service.startService()
    assert one.processes[0].environment["PYTHONPATH"] == os.pathsep.join(["/one", "/two"])
