"""The phases of a worker, and the transitions between them."""

import pytest

from rtservice.pool.worker_counters import SlotCounters
from rtservice.pool.worker_messages import WorkerMessages
from rtservice.pool.worker_process import Phase, WorkerProcess


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
            messages = WorkerMessages(slot=0, listeners=(), access=False)
            worker = WorkerProcess(one.pool, 0, one.spec, messages=messages, shown=SlotCounters())
            worker.phase = before
            if (before, after) in allowed:
                worker.move(after)
                assert worker.phase is after
            else:
                with pytest.raises(RuntimeError, match=f"that is {before.value} cannot become {after.value}"):
                    worker.move(after)
