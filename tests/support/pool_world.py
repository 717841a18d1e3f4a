"""A WorkerPool with a fake reactor, listener and notifier."""

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger, formatEvent

from rtservice.net.tls import Steps
from rtservice.pool.control import BEAT
from rtservice.pool.pool import Phase, WorkerPool, WorkerSpec
from rtservice.pool.worker_counters import encode_counters
from tests.support.fake_listener import Slots
from tests.support.fake_processes import Process, SpawningReactor
from tests.support.notifier import Notifier

PLAN: dict[str, Any] = {"drain_timeout": 10.0, "hang_timeout": 30.0, "max_age": 0.0, "max_memory": 0}


class World:
    """A supervisor and all that is around it."""

    def __init__(self, slots: int, problem: str | None = None, **plan: Any) -> None:
        self.reactor = SpawningReactor()
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
                    process.says("beat", {"open": 0, **encode_counters(process.protocol.counters)})
            self.reactor.advance(BEAT)

    def texts(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.events]

    def logged(self, text: str) -> bool:
        return any(text in one for one in self.texts())


def roll(one: World) -> None:
    """Answer as workers do that can be replaced, until there is nothing left to do."""
    while busy := [p for p in one.alive() if p.protocol.phase is Phase.STARTING or "drain" in p.words()]:
        for process in busy:
            if process.protocol.phase is Phase.STARTING:
                process.says("ready")
            else:
                process.dies()
