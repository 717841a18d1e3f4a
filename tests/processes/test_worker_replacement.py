"""Replacing workers under load loses no client."""

import os
import re
import signal
import time

from tests.support.clients import connect, echoes, greeted
from tests.support.listen_options import TCP
from tests.support.load import Load, assert_no_client_lost
from tests.support.processes import accepted_by, descriptors, freeze
from tests.support.worker_signals import GROW


def test_reloads_lose_no_client(workers) -> None:
    running = workers(TCP)
    before = set(running.pids())
    with Load(port=running.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            running.send(signal.SIGHUP)
            running.wait_event("reload.done", count, status=re.compile("^serving: 2 of 2 workers ready"))
        load.more(100)
        assert_no_client_lost(load.stop())
    assert not before & set(running.settled(2))
    assert len(running.recorded("worker.ready")) == 22
    assert running.stop() == 0


def test_adding_and_removing_workers_loses_no_client(workers) -> None:
    running = workers(TCP)
    with Load(port=running.service.port, short=32, long=32) as load:
        load.more(100)
        for count in range(1, 11):
            running.send(signal.SIGTTIN)
            running.wait_event("worker.ready", count, slot=2)
            load.more(50)
            running.send(signal.SIGTTOU)
            running.wait_event("slot.removed", count, slot=2)
        load.more(100)
        count = load.stop()
        assert_no_client_lost(count)
        assert count["longest"] < 1  # no SYN was retransmitted, and no client waited for a starting worker
    running.settled(2)
    assert running.stop() == 0


def test_adding_and_removing_a_worker_at_once_keeps_the_count(workers) -> None:
    running = workers(TCP)
    with Load(port=running.service.port, short=8, long=8) as load:
        for _ in range(3):
            running.send(signal.SIGTTIN)
            running.send(signal.SIGTTOU)
            load.more(100)
        assert_no_client_lost(load.stop())
    running.settled(2)


def test_a_worker_killed_while_draining_is_replaced_until_its_backlog_is_served(workers, wait_for) -> None:
    running = workers(TCP)
    port = running.service.port
    first, last = running.of_slot(0), running.of_slot(1)
    clients = [greeted(port) for _ in range(40)]
    freeze(last, wait_for)
    queued = [connect(port) for _ in range(40)]
    running.send(signal.SIGTTOU)
    os.kill(last, signal.SIGCONT)
    running.wait_event("drain.started", slot=1)
    wait_for(lambda: len(accepted_by(first, queued)) + len(accepted_by(last, queued)) == 40)
    freeze(last, wait_for)
    os.kill(last, signal.SIGKILL)
    running.wait_event("worker.ready", 2, slot=1)
    running.wait_event("slot.removed", slot=1)
    for client in (*clients, *queued):
        client.close()
    running.send(signal.SIGTTIN)
    running.wait_event("worker.ready", 3, slot=1)
    began = time.monotonic()
    clients = [greeted(port) for _ in range(40)]
    assert time.monotonic() - began < 1  # no SYN was retransmitted
    assert 0 < len(accepted_by(running.of_slot(1), clients)) < 40
    for client in clients:
        client.close()
    assert running.stop() == 0


def test_adding_and_removing_workers_leaks_no_descriptors(workers, wait_for) -> None:
    running = workers(TCP)
    running.send(signal.SIGHUP)  # the terminal stays open until the start has finished
    running.wait_event("reload.done")
    running.settled(2)
    before = descriptors(running.pid)
    for count in range(1, 13):
        running.send(signal.SIGTTIN)
        running.wait_event("worker.ready", count, slot=2)
        running.send(signal.SIGTTOU)
        running.wait_event("slot.removed", count, slot=2)
    wait_for(lambda: descriptors(running.pid) <= before)
    assert running.stop() == 0


def test_the_last_worker_is_not_removed(workers) -> None:
    running = workers(TCP)
    running.send(signal.SIGTTOU)
    running.wait_event("slot.removed", slot=1)
    running.send(signal.SIGTTOU)
    running.wait_event("slot.not_removed")
    with greeted(running.service.port) as client:
        assert echoes(client)
    running.settled(1)


def test_a_worker_that_receives_sigterm_is_replaced_before_it_exits(workers) -> None:
    running = workers(TCP)
    with Load(port=running.service.port, short=16, long=16) as load:
        load.more(100)
        for _ in range(3):
            old = running.settled(2)[0]
            os.kill(old, signal.SIGTERM)
            running.wait_event("worker.ended", pid=old, exit_status=0)
        assert_no_client_lost(load.stop())
    assert running.stop() == 0


def test_workers_above_max_age_are_replaced_one_at_a_time_without_losing_clients(workers) -> None:
    running = workers("--workers=3", "--max-worker-age=2", TCP)
    with Load(port=running.service.port, short=16, long=16) as load:
        running.wait_event("worker.too_old", 6)
        assert_no_client_lost(load.stop())
    events = [event for event in running.service.events if event["event"] in ("worker.too_old", "worker.ready")][3:]
    ages = [event["event"] == "worker.too_old" for event in events]
    assert ages[::2] == [True] * len(ages[::2])
    assert ages[1::2] == [False] * len(ages[1::2])
    assert running.stop() == 0


def test_a_worker_above_max_memory_is_replaced_without_losing_clients(workers, site) -> None:
    running = workers("--max-worker-memory=150", TCP, **site)
    grown = running.of_slot(0)
    with Load(port=running.service.port, short=16, long=16) as load:
        load.more(50)
        os.kill(grown, GROW)
        assert running.wait_event("worker.too_large", pid=grown)["memory"] > 200
        running.wait_event("worker.ended", pid=grown, exit_status=0)
        assert_no_client_lost(load.stop())
    assert len(running.recorded("worker.too_large")) == 1
