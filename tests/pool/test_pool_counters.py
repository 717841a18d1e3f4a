"""Counters of workers, and their sums."""

from rtservice.pool.pool import WorkerPool
from rtservice.process.counters import CounterKey, add


def counted(pool: WorkerPool) -> dict[str, float]:
    """Return the counters of all current and ended workers by name. No counter here has a label or a listener."""
    counters = pool.totals.ended()
    for slot in pool.slots:
        for worker in slot.workers():
            add(counters, worker.counters)
    assert all(key == CounterKey(key.name) for key in counters)
    return {key.name: count for key, count in counters.items()}


def test_totals_cover_all_workers_and_never_decrease(world) -> None:
    running = world()
    first, second = running.serve()
    first.says("beat", {"open": 2, "memory": 10, "ended": 5, "aborted": 1})
    second.says("beat", {"open": 1, "memory": 20, "ended": 7})
    assert counted(running.pool) == {"open": 3, "memory": 30, "ended": 12, "aborted": 1}
    first.dies(9)
    assert counted(running.pool) == {"open": 1, "memory": 20, "ended": 12, "aborted": 1}
    running.pass_time(1)
    running.processes[-1].says("ready")
    running.processes[-1].says("beat", {"open": 1, "memory": 10, "ended": 2})
    assert counted(running.pool)["ended"] == 14


def test_decreasing_counter_of_a_worker_does_not_decrease_the_totals(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.says("beat", {"ended": 5, "open": 3})
    only.says("beat", {"ended": 4, "open": 1})
    assert counted(running.pool) == {"ended": 5, "open": 1}
