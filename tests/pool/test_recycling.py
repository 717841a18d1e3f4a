"""Workers are replaced at a maximum age and memory size."""

from rtservice.pool import worker_process as worker_module
from rtservice.pool.control import BEAT


def test_workers_over_the_maximum_age_are_replaced_one_at_a_time(world) -> None:
    running = world(3, max_age=100.0)
    running.serve()
    running.pass_time(99)
    assert len(running.processes) == 3
    running.pass_time(5)
    assert len(running.processes) == 4
    running.processes[3].says("ready")
    assert running.processes[0].words() == ["start", "drain"]
    running.pass_time(2)
    assert len(running.processes) == 5
    assert running.recorded("worker.too_old", slot=0, pid=1000)


def test_maximum_age_of_each_worker_varies_by_10_percent(world, monkeypatch) -> None:
    running = world(1, max_age=100.0)
    asked = []
    monkeypatch.setattr(worker_module.random, "uniform", lambda *bounds: asked.append(bounds) or 0.9)
    running.serve()
    assert asked == [(0.9, 1.1)]
    running.pass_time(89)
    assert len(running.processes) == 1
    running.pass_time(2)
    assert len(running.processes) == 2


def test_workers_over_the_memory_limit_are_replaced_one_at_a_time(world) -> None:
    running = world(3, max_memory=100 << 20)
    first, second, third = running.serve()
    first.says("beat", {"memory": 100 << 20})
    second.says("beat", {"memory": (100 << 20) + 1})
    third.says("beat", {"memory": 200 << 20})
    for _ in range(5):
        running.reactor.advance(BEAT)
    assert [process.told[0][1]["slot"] for process in running.processes[3:]] == [1]
    running.processes[3].says("ready")
    running.reactor.advance(BEAT)
    assert [process.told[0][1]["slot"] for process in running.processes[3:]] == [1, 2]
    assert first.words() == ["start"]


def test_next_replacement_is_delayed_after_a_failed_one(world) -> None:
    running = world(1, max_age=10.0)
    running.serve()
    running.pass_time(12)
    running.processes[1].dies(1)
    running.pass_time(28)
    assert len(running.processes) == 2
    running.pass_time(3)
    assert len(running.processes) == 3
