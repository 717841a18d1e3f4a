"""The hubs of workers: readiness of the pool, and their counters."""

from __future__ import annotations

from typing import Any

from rtservice.pool.worker_counters import CounterDecoder, encode_counters, encode_key
from rtservice.process.counters import HUB_GAUGES, HUB_TOTALS, HUB_UP, CounterKey, hub_counters

UP, DOWN = {encode_key(HUB_UP): 1}, {encode_key(HUB_UP): 0}


def test_the_pool_is_ready_while_the_hub_of_one_ready_worker_is_up(world) -> None:
    running = world(2, hub_required=True)
    first, second = running.serve()
    for process in (first, second):
        process.says("beat", DOWN)
    assert not running.pool.ready
    assert running.pool.status == (
        "serving: 2 of 2 workers ready, 0 connections open, the hub has no connection in 2 workers"
    )
    second.says("beat", UP)
    assert running.pool.ready
    assert running.pool.status.endswith("open, the hub has no connection in 1 worker")
    first.says("beat", UP)
    assert running.pool.status == "serving: 2 of 2 workers ready, 0 connections open"
    # A worker that does not serve does not count.
    first.says("beat", DOWN)
    second.dies(9)
    assert not running.pool.ready


def test_readiness_ignores_the_hub_unless_it_is_required(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.says("beat", DOWN)
    assert running.pool.ready


def test_workers_that_do_not_use_the_hub_are_ready(world) -> None:
    running = world(1, hub_required=True)
    running.serve()
    assert running.pool.ready
    assert running.pool.status == "serving: 1 of 1 worker ready, 0 connections open"


def test_a_reload_changes_whether_the_hub_is_required(world) -> None:
    running = world(1)
    [only] = running.serve()
    only.says("beat", DOWN)
    running.pool.apply(running.specified(2, hub_required=True))
    assert not running.pool.ready


def shown(running: Any) -> dict[str, float]:
    [worker] = running.pool.snapshot(0.0, {})["workers"]
    return {key.label: count for key, count in worker["counters"].items() if key.name == "hub"}


def test_totals_of_the_hub_are_kept_and_up_is_that_of_the_current_worker(world) -> None:
    running = world(1)
    [first] = running.serve()
    first.says("beat", encode_counters(hub_counters({"up": 1, "published": 5, "topics": 2})))
    assert shown(running) == {"up": 1, "published": 5, "topics": 2}
    running.pool.apply(running.specified(2))
    second = running.processes[-1]
    second.says("beat", encode_counters(hub_counters({"up": 0, "published": 0, "topics": 1})))
    assert shown(running) == {"up": 1, "published": 5, "topics": 3}
    second.says("ready")
    assert shown(running)["up"] == 0
    second.says("beat", encode_counters(hub_counters({"up": 1, "published": 1})))
    assert shown(running)["up"] == 1
    first.dies()
    assert shown(running) == {"up": 1, "published": 6, "topics": 1}
    second.dies(9)
    assert shown(running) == {"published": 6}


def test_every_counter_of_a_hub_is_decoded_unchanged() -> None:
    counters = hub_counters({**dict.fromkeys((*HUB_TOTALS, *HUB_GAUGES), 3), "heartbeat_0": 1, "heartbeat_us": 900})
    assert CounterKey("hub_heartbeat", "0") in counters
    assert CounterDecoder([]).decode(encode_counters(counters)) == counters
