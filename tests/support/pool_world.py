"""A WorkerPool in a ServiceProcess, with a fake reactor, listener and notifier."""

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger, formatEvent

from rtservice.pool.control import BEAT
from rtservice.pool.pool import WorkerPool
from rtservice.pool.worker_counters import encode_counters
from rtservice.pool.worker_process import WorkerPhase, WorkerSpec
from rtservice.process.service import ServiceProcess
from rtservice.process.status_server import StatusServer
from rtservice.steps import Steps
from tests.support.fake_listener import Slots
from tests.support.fake_processes import Process, SpawningReactor
from tests.support.launch import launch
from tests.support.notifier import Notifier
from tests.support.recorded import recorded

SPEC: dict[str, Any] = {"drain_timeout": 10.0, "hang_timeout": 30.0, "max_age": 0.0, "max_memory": 0}


class World:
    """A pool in its process, with fakes for its environment; also the Reload of the process."""

    def __init__(self, slots: int, problem: str | None = None, watched: tuple[str, ...] = (), **spec: Any) -> None:
        self.reactor = SpawningReactor()
        self.events: list[Any] = []
        self.reports: list[str | None] = []
        self.notifier: Any = Notifier()
        self.listener: Any = Slots(slots, watched)
        self.spec = self.specified(watch_certificates=bool(watched), **spec)
        self.next_spec: WorkerSpec | None = self.spec
        self.reloads = 0
        self.reload_steps = 0  # the number of steps of a reload
        self.handlers: dict[int, Callable[[int, Any], Any]] = {}
        log = Logger(observer=self.events.append)
        self.pool = WorkerPool(
            listeners=[self.listener], slots=slots, spec=self.spec, command=["python", "-m", "worker"], log=log
        )
        self.service = ServiceProcess(
            self.pool,
            self,
            log=log,
            launch=launch(check=lambda: problem, report=self.reports.append, notifier=self.notifier),
            status_server=StatusServer(log),
        )
        self.done: list[Any] = []
        self.reactor.before_stop = lambda: self.service.stopService().addBoth(self.done.append)

    def specified(self, generation: int = 1, **spec: Any) -> WorkerSpec:
        def start(slot: int, slots: int) -> Any:
            return {"slot": slot, "slots": slots, "generation": generation}

        return WorkerSpec(start=start, **{**SPEC, **spec})

    def steps(self) -> Steps[bool]:
        self.reloads += 1
        for _ in range(self.reload_steps):
            yield
        if self.next_spec is not None:
            self.pool.apply(self.next_spec)
        return True

    def renewal(self) -> None:
        """Do nothing: tests renew certificates with a reload."""

    @property
    def processes(self) -> list[Process]:
        return self.reactor.processes

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.protocol.phase is not WorkerPhase.GONE]

    def send(self, number: int) -> None:
        self.handlers[number](number, None)

    def serve(self) -> list[Process]:
        """Start, and let every worker become ready."""
        self.service.startService()
        started = list(self.processes)
        for process in started:
            process.says("ready")
        return started

    def pass_time(self, seconds: float, *, silent: tuple[Process, ...] = ()) -> None:
        """Advance the clock; every worker sends heartbeats except the silent ones."""
        for _ in range(int(seconds / BEAT)):
            for process in self.alive():
                if process not in silent and process.protocol.phase is not WorkerPhase.STARTING:
                    process.says("beat", {"open": 0, **encode_counters(process.protocol.counters)})
            self.reactor.advance(BEAT)

    def texts(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.events]

    def recorded(self, name: str, /, **fields: Any) -> list[dict[str, Any]]:
        """Return the records of an event with these fields."""
        return recorded(self.events, name, **fields)


def roll(world: World) -> None:
    """Let workers become ready and drain until no replacement is in progress."""
    while busy := [p for p in world.alive() if p.protocol.phase is WorkerPhase.STARTING or "drain" in p.words()]:
        for process in busy:
            if process.protocol.phase is WorkerPhase.STARTING:
                process.says("ready")
            else:
                process.dies()
