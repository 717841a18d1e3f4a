"""Workers are replaced under load, and no client is lost."""

import os
import re
import signal
import time

from tests.support.clients import connect, echoes, greeted
from tests.support.listen_options import TCP
from tests.support.load import Load, assert_nobody_lost
from tests.support.processes import accepted_by, descriptors, freeze
from tests.support.worker_signals import GROW


def test_reloads_lose_no_client(workers) -> None:
    one = workers(TCP)
    before = set(one.pids())
    with Load(port=one.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            one.send(signal.SIGHUP)
            one.wait_event("reload.done", count, status=re.compile("^serving: 2 of 2 workers ready"))
        load.more(100)
        assert_nobody_lost(load.stop())
    assert not before & set(one.settled(2))
    assert len(one.recorded("worker.ready")) == 22
    assert one.stop() == 0


def test_adding_and_removing_workers_loses_no_client(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            one.send(signal.SIGTTIN)
            one.wait_event("worker.ready", count, slot=2)
            load.more(50)
            one.send(signal.SIGTTOU)
            one.wait_event("slot.removed", count, slot=2)
        load.more(100)
        count = load.stop()
        assert_nobody_lost(count)
        assert count["longest"] < 1  # nobody had to send a SYN twice, or to wait for a worker that starts
    one.settled(2)
    assert one.stop() == 0


def test_adding_and_removing_a_worker_at_once_keeps_the_count(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=8, long=8) as load:
        for _ in range(3):
            one.send(signal.SIGTTIN)
            one.send(signal.SIGTTOU)
            load.more(100)
        assert_nobody_lost(load.stop())
    one.settled(2)


def test_a_worker_killed_while_draining_is_replaced_until_its_backlog_is_served(workers, wait_for) -> None:
    one = workers(TCP)
    port = one.service.port
    first, last = one.of_slot(0), one.of_slot(1)
    clients = [greeted(port) for _ in range(40)]
    freeze(last, wait_for)
    queued = [connect(port) for _ in range(40)]
    one.send(signal.SIGTTOU)
    os.kill(last, signal.SIGCONT)
    one.wait_event("drain.started", slot=1)
    wait_for(lambda: len(accepted_by(first, queued)) + len(accepted_by(last, queued)) == 40)
    freeze(last, wait_for)
    os.kill(last, signal.SIGKILL)
    one.wait_event("worker.ready", 2, slot=1)
    one.wait_event("slot.removed", slot=1)
    for client in (*clients, *queued):
        client.close()
    one.send(signal.SIGTTIN)
    one.wait_event("worker.ready", 3, slot=1)
    began = time.monotonic()
    clients = [greeted(port) for _ in range(40)]
    assert time.monotonic() - began < 1  # nobody sent a SYN twice
    assert 0 < len(accepted_by(one.of_slot(1), clients)) < 40
    for client in clients:
        client.close()
    assert one.stop() == 0


def test_adding_and_removing_workers_leaks_no_descriptors(workers, wait_for) -> None:
    one = workers(TCP)
    one.send(signal.SIGHUP)  # a start holds the terminal until it is over
    one.wait_event("reload.done")
    one.settled(2)
    before = descriptors(one.pid)
    for count in range(1, 13):
        one.send(signal.SIGTTIN)
        one.wait_event("worker.ready", count, slot=2)
        one.send(signal.SIGTTOU)
        one.wait_event("slot.removed", count, slot=2)
    wait_for(lambda: descriptors(one.pid) <= before)
    assert one.stop() == 0


def test_the_last_worker_is_not_removed(workers) -> None:
    one = workers(TCP)
    one.send(signal.SIGTTOU)
    one.wait_event("slot.removed", slot=1)
    one.send(signal.SIGTTOU)
    one.wait_event("slot.not_removed")
    with greeted(one.service.port) as client:
        assert echoes(client)
    one.settled(1)


def test_a_worker_that_receives_sigterm_is_replaced_before_it_exits(workers) -> None:
    one = workers(TCP)
    with Load(port=one.service.port, short=16, long=16) as load:
        load.more(100)
        for _ in range(3):
            old = one.settled(2)[0]
            os.kill(old, signal.SIGTERM)
            one.wait_event("worker.ended", pid=old, exit_status=0)
        assert_nobody_lost(load.stop())
    assert one.stop() == 0


def test_workers_above_max_age_are_replaced_one_at_a_time_without_losing_clients(workers) -> None:
    one = workers("--workers=3", "--max-worker-age=2", TCP)
    with Load(port=one.service.port, short=16, long=16) as load:
        one.wait_event("worker.too_old", 6)
        assert_nobody_lost(load.stop())
    events = [event for event in one.service.events if event["event"] in ("worker.too_old", "worker.ready")][3:]
    ages = [event["event"] == "worker.too_old" for event in events]
    assert ages[::2] == [True] * len(ages[::2])
    assert ages[1::2] == [False] * len(ages[1::2])
    assert one.stop() == 0


def test_a_worker_above_max_memory_is_replaced_without_losing_clients(workers, site) -> None:
    one = workers("--max-worker-memory=150", TCP, **site)
    grown = one.of_slot(0)
    with Load(port=one.service.port, short=16, long=16) as load:
        load.more(50)
        os.kill(grown, GROW)
        assert one.wait_event("worker.too_large", pid=grown)["memory"] > 200
        one.wait_event("worker.ended", pid=grown, exit_status=0)
        assert_nobody_lost(load.stop())
    assert len(one.recorded("worker.too_large")) == 1
