"""The order in which slots get new workers, and the back-off after workers that failed."""

from __future__ import annotations

from collections.abc import Iterable

from rtservice.pool.slot import Slot
from rtservice.pool.worker_process import WorkerProcess, WorkerSpec

# Back-off of a slot whose worker has died: the first and the maximum seconds, doubled for each death in a row. A worker
# that has run for HEALTHY seconds resets it.
_BACKOFF_LEAST, BACKOFF_MOST, HEALTHY = 0.1, 30.0, 60.0


def backoff(deaths: int, jitter: float) -> float:
    """Return the seconds to wait after `deaths` deaths in a row (at least 1). `jitter` is from 0 to 1."""
    return min(BACKOFF_MOST, _BACKOFF_LEAST * 2.0 ** min(deaths - 1, 20)) * (0.75 + jitter / 2)


def backoff_of_death(slot: Slot, worker: WorkerProcess | None, now: float, jitter: float) -> float:
    """Count a death in a slot, and return the seconds until its next worker.

    `worker` is None if no process could be spawned.
    """
    if worker is not None and now - worker.began >= HEALTHY:
        slot.deaths = 0
    slot.deaths += 1
    return backoff(slot.deaths, jitter)


def count_replacement(slot: Slot, worker: WorkerProcess, now: float, jitter: float) -> None:
    """Count a replacement that the worker of a slot has caused, and set the time of the earliest next one.

    Without this back-off, workers that reach a limit as soon as they are ready would be replaced without a pause.
    """
    worker.wants_to_leave = False
    if now - worker.began >= HEALTHY:
        slot.replacements = 0
    slot.replacements += 1
    slot.replace_after = now + backoff(slot.replacements, jitter)


class Rollout:
    """The slots whose workers are still to be replaced.

    A worker is replaced only after its successor is ready. A successor that fails ends the rollout.
    """

    def __init__(self) -> None:
        self.reloading = False  # all workers are replaced, for a reload
        self._slots: list[Slot] = []
        self._paused_until = 0.0  # after a replacement that failed

    def __bool__(self) -> bool:
        return bool(self._slots)

    def __contains__(self, slot: Slot) -> bool:
        return slot in self._slots

    def add(self, slots: Iterable[Slot]) -> None:
        """Add slots whose workers are to be replaced, before those that are already in the rollout."""
        first = list(slots)
        self._slots = [*first, *(slot for slot in self._slots if slot not in first)]

    def next(self, spec: WorkerSpec) -> Slot | None:
        """Remove and return the next slot whose worker needs a successor with this spec, or None."""
        while self._slots:
            slot = self._slots.pop(0)
            # A slot without a worker gets a worker with the new spec anyway.
            if slot.worker is not None and not slot.being_removed and (slot.ready or slot.worker.spec is not spec):
                return slot
        return None

    def fail(self, now: float) -> bool:
        """End the rollout. Return whether it was a reload. For BACKOFF_MOST seconds, only a reload starts another."""
        self._slots.clear()
        self._paused_until = now + BACKOFF_MOST
        return self.end_reload()

    def end_reload(self) -> bool:
        """End the reload. Return whether there was one."""
        reloading, self.reloading = self.reloading, False
        return reloading

    def is_paused(self, now: float) -> bool:
        """Whether a replacement has failed within the last BACKOFF_MOST seconds. `now` is of the reactor's clock."""
        return now < self._paused_until
