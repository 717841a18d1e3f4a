"""The phases of a worker, and the transitions between them."""

import pytest

from rtservice.pool.mesh_links import LinkChannel
from rtservice.pool.worker_counters import SlotCounters
from rtservice.pool.worker_messages import WorkerMessages
from rtservice.pool.worker_process import WorkerPhase, WorkerProcess


def test_worker_phases_change_only_along_the_allowed_transitions(world) -> None:
    allowed = {
        (WorkerPhase.STARTING, WorkerPhase.READY),
        (WorkerPhase.STARTING, WorkerPhase.DRAINING),
        (WorkerPhase.STARTING, WorkerPhase.GONE),
        (WorkerPhase.READY, WorkerPhase.DRAINING),
        (WorkerPhase.READY, WorkerPhase.GONE),
        (WorkerPhase.DRAINING, WorkerPhase.GONE),
    }
    running = world()
    running.service.startService()
    for before in WorkerPhase:
        for after in WorkerPhase:
            messages = WorkerMessages(slot=0, listeners=(), access=False)
            worker = WorkerProcess(
                running.pool,
                0,
                running.spec,
                messages=messages,
                counter_bounds=SlotCounters(),
                link_channel=LinkChannel(running.reactor),
            )
            worker.phase = before
            if (before, after) in allowed:
                worker.move(after)
                assert worker.phase is after
            else:
                with pytest.raises(RuntimeError, match=f"that is {before.value} cannot become {after.value}"):
                    worker.move(after)
