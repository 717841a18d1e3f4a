"""A slot: the place of one worker, with its sockets. Workers replace each other in it."""

from __future__ import annotations

from typing import Any

from rtservice.pool.worker_process import WorkerPhase, WorkerProcess
from rtservice.process.counters import HUB_UP


class Slot:
    """The current worker, its successor while that starts, and former workers that still drain."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.old: list[WorkerProcess] = []
        self.deaths = 0  # in a row
        self.respawn: Any = None  # the delayed call that spawns the next worker
        self.being_removed = False  # the slot is removed when its last worker has ended
        # Replacements in a row that its workers have caused, and the time of the earliest next one.
        self.replacements = 0
        self.replace_after = 0.0

    def workers(self) -> list[WorkerProcess]:
        """Return every process of the slot."""
        return [worker for worker in (self.worker, self.successor, *self.old) if worker is not None]

    @property
    def ready(self) -> bool:
        """Whether the current worker serves."""
        return self.worker is not None and self.worker.phase is WorkerPhase.READY

    @property
    def has_hub(self) -> bool:
        """Whether the hub of the current worker is up, or not used."""
        return self.worker is not None and bool(self.worker.counters.get(HUB_UP, 1))

    def accepts(self, now: float) -> bool:
        """Whether the slot serves new clients without delay."""
        return self.ready and not self.being_removed and self.worker is not None and not self.worker.is_silent(now)
