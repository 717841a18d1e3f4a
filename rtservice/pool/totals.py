"""The counters of each slot over all its workers, and the numbers of their starts and exits."""

from __future__ import annotations

import signal
from typing import Any

from twisted.internet.error import ProcessDone
from twisted.python.failure import Failure

from rtservice.pool.slot import Slot
from rtservice.pool.worker_counters import SlotCounters
from rtservice.pool.worker_process import WorkerProcess
from rtservice.process.counters import HUB_UP, CounterKey, add

_SIGNALS = frozenset(signal.Signals)


def signal_name(number: int) -> str:
    """Return the name of a signal. Python names only the first and the last real-time signal."""
    return signal.Signals(number).name if number in _SIGNALS else f"signal {number}"


class Totals:
    """Counters by the number of the slot. They are kept after its workers have ended and the slot is removed."""

    def __init__(self) -> None:
        self.starts: dict[int, int] = {}
        self.exits: dict[int, dict[str, int]] = {}  # then by reason
        self._ended: dict[int, dict[CounterKey, float]] = {}  # of workers that have ended
        self._shown: dict[int, SlotCounters] = {}

    def counters_of(self, slot: int) -> SlotCounters:
        """Return the object that bounds the counters of a slot."""
        return self._shown.setdefault(slot, SlotCounters())

    def count_start(self, slot: int) -> None:
        """Count a worker that was spawned."""
        add(self.starts, {slot: 1})

    def count_end(self, worker: WorkerProcess, reason: Failure) -> None:
        """Add the counters of a worker that has ended, and count the reason."""
        ended = self._ended.setdefault(worker.slot, {})
        for key, count in worker.counters.items():
            if key.name == "phase" and count:  # these connections were open until then
                add(ended, {CounterKey("closed", "worker ended", key.listener): count})
            elif key.is_total:
                self.counters_of(worker.slot).add(ended, {key: count})
        how = "failed" if worker.problem or not reason.check(ProcessDone) else "ended"
        if (killed := getattr(reason.value, "signal", None)) is not None:
            how = signal_name(killed)
        add(self.exits.setdefault(worker.slot, {}), {how: 1})

    def ended(self) -> dict[CounterKey, float]:
        """Return the counters of all ended workers."""
        totals: dict[CounterKey, float] = {}
        for counters in self._ended.values():
            add(totals, counters)
        return totals

    def snapshot(self, slots: list[Slot], now: float) -> list[dict[str, Any]]:
        """Return the state of each present or removed slot as plain data. `now` is of the reactor's clock."""
        by_number = {slot.number: slot for slot in slots}
        return [self._of_slot(number, by_number.get(number), now) for number in sorted(by_number | self._ended)]

    def _of_slot(self, number: int, slot: Slot | None, now: float) -> dict[str, Any]:
        counters = dict(self._ended.get(number, {}))
        for worker in slot.workers() if slot is not None else ():
            self.counters_of(number).add(counters, worker.counters)
        current = slot.worker if slot is not None else None
        # That of a worker that drains, or that starts, does not count.
        counters.pop(HUB_UP, None)
        if current is not None and HUB_UP in current.counters:
            counters[HUB_UP] = current.counters[HUB_UP]
        return {
            "worker": number,
            "pid": current.transport.pid if current is not None else None,
            "phase": current.phase.value if current is not None else "gone" if slot is None else "waiting",
            "age": now - current.began if current is not None else None,
            "counted": current.counted if current is not None else None,
            "counters": counters,
        }
