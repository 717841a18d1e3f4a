"""Workers that die, hang or are stopped, and the effects on clients."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.clients import connect, echoes, greeted, is_greeted
from tests.support.deadline import DEADLINE
from tests.support.listen_options import TCP
from tests.support.load import Load
from tests.support.processes import accepted_by, alive, children, descriptors, freeze
from tests.support.worker_signals import BLOCK, RAMBLE


def test_killing_a_worker_loses_only_its_open_connections(workers, wait_for) -> None:
    running = workers(TCP)
    port = running.service.port
    victim, other = running.settled(2)
    clients = [greeted(port) for _ in range(40)]
    lost = accepted_by(victim, clients)
    assert 5 < len(lost) < 35

    freeze(victim, wait_for)
    queued = [connect(port) for _ in range(40)]
    os.kill(victim, signal.SIGKILL)
    running.wait_event("worker.killed", pid=victim)
    later = [connect(port) for _ in range(40)]

    assert [client for client in clients if not echoes(client)] == lost
    assert all(is_greeted(client) and echoes(client) for client in (*queued, *later))
    # Some clients were in the backlog of the killed worker.
    assert len(accepted_by(other, queued)) < len(queued)
    running.settled(2)
    for client in (*clients, *queued, *later):
        client.close()
    assert running.stop() == 0


def test_other_workers_serve_new_clients_while_one_is_dead_or_silent(workers, broken_site, tmp_path) -> None:
    running = workers("--workers=3", TCP, **broken_site)
    victim, silent, other = running.settled(3)
    (tmp_path / "broken").touch()
    os.kill(victim, signal.SIGKILL)
    running.wait_event("worker.restarting", 3, problem="--protocol echo: broken by design")
    os.kill(silent, signal.SIGSTOP)
    try:
        wait = threading.Event()
        wait.wait(4)  # a worker counts as silent after three seconds
        clients = [greeted(running.service.port) for _ in range(40)]
    finally:
        os.kill(silent, signal.SIGCONT)
    assert accepted_by(other, clients) == clients
    for client in clients:
        client.close()
    (tmp_path / "broken").unlink()
    running.settled(3)
    assert running.stop() == 0


def test_the_backlog_of_a_dead_worker_is_served_during_a_stop(workers, broken_site, tmp_path) -> None:
    running = workers(TCP, **broken_site)
    victim, other = running.settled(2)
    (tmp_path / "broken").touch()
    os.kill(victim, signal.SIGSTOP)
    os.kill(other, signal.SIGSTOP)
    clients = [connect(running.service.port) for _ in range(40)]
    os.kill(victim, signal.SIGKILL)
    running.wait_event("worker.restarting", 3, problem="--protocol echo: broken by design")
    (tmp_path / "broken").unlink()
    running.send(signal.SIGTERM)
    os.kill(other, signal.SIGCONT)
    assert all(is_greeted(client) and echoes(client) for client in clients)
    assert 0 < len(accepted_by(other, clients)) < 40
    for client in clients:
        client.close()
    assert running.service.process.wait(DEADLINE) == 0


def test_a_worker_without_heartbeat_is_killed_and_replaced(workers, wait_for) -> None:
    running = workers("--hang-timeout=2", TCP)
    victim = running.of_slot(0)
    freeze(victim, wait_for)
    clients = [connect(running.service.port) for _ in range(20)]
    hung = running.wait_event("worker.hung", slot=0, pid=victim)
    assert 2 <= hung["seconds"] < 4
    running.wait_event("worker.killed", slot=0, pid=victim, signal="SIGKILL")
    assert all(is_greeted(client) for client in clients)
    for client in clients:
        client.close()
    running.settled(2)
    assert running.stop() == 0


def test_the_stack_of_a_blocked_worker_is_logged_before_it_is_replaced(workers, site) -> None:
    running = workers("--hang-timeout=2", TCP, **site)
    victim = running.of_slot(1)
    os.kill(victim, BLOCK)
    running.wait_event("worker.hung", slot=1, pid=victim)
    running.wait_event("worker.printed_error", pid=victim, line=re.compile("in blocked_by_its_protocol"))
    running.wait_event("worker.killed", slot=1, pid=victim, signal="SIGKILL")
    running.settled(2)
    assert running.stop() == 0


def test_a_worker_that_sends_an_unknown_message_is_replaced(workers, site) -> None:
    running = workers(TCP, **site)
    victim = running.of_slot(0)
    os.kill(victim, RAMBLE)
    running.wait_event("worker.violation", slot=0, pid=victim, problem=re.compile("'no'"))
    running.settled(2)
    assert running.stop() == 0


def test_workers_drain_and_exit_after_their_parent_dies(workers, tmp_path, wait_for) -> None:
    running = workers(TCP, "--listen=unix:s")
    port, pids = running.service.port, running.settled(2)
    clients = [*(greeted(port) for _ in range(10)), *(greeted(f"{tmp_path}/s") for _ in range(10))]
    for pid in pids:
        freeze(pid, wait_for)
    queued = [*(connect(port) for _ in range(10)), *(connect(f"{tmp_path}/s") for _ in range(10))]
    running.service.process.kill()
    running.service.process.wait()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert all(is_greeted(client) for client in queued)
    wait_for(lambda: not (tmp_path / "s").exists())
    for client in (*clients, *queued):
        assert echoes(client)
        client.close()
    wait_for(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(ConnectionRefusedError):
        connect(port)


def test_workers_exit_within_the_drain_timeout_after_their_parent_dies(workers, wait_for) -> None:
    running = workers("--drain-timeout=1", TCP)
    pids = running.settled(2)
    with greeted(running.service.port) as client:
        running.service.process.kill()
        assert client.recv(1) == b""
    wait_for(lambda: not any(alive(pid) for pid in pids))


def test_workers_that_are_not_ready_exit_with_their_parent(service, environment, tmp_path, wait_for) -> None:
    command = [str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=", "rtservice", "--workers=3", TCP]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        pids = wait_for(lambda: (found := children(process.pid)) and len(found) == 3 and found)
        process.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.timeout(300)
def test_the_service_survives_random_signals_to_its_workers(workers, manager, wait_for) -> None:
    chance = random.Random(5)
    running = workers("--workers=3", "--hang-timeout=1", "--drain-timeout=5", TCP, NOTIFY_SOCKET=manager.address)
    port = running.service.port
    wait_for(lambda: manager.messages and "3 of 3" in manager.messages[-1])
    before = descriptors(running.pid)

    def slots(ready: bool = True) -> int:
        """Return the number of slots; 0 if `ready` is set and not all are ready."""
        serving = re.search(r"serving: (\d+) of (\d+) workers ready", manager.messages[-1])
        return int(serving[2]) if serving and (serving[1] == serving[2] or not ready) else 0

    # Longer than the maximum restart delay of a slot, one minute.
    with Load(port=port, short=50, long=50, seed=5, patience=90) as load:
        load.more(100)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            what = chance.choice((signal.SIGKILL, signal.SIGSTOP, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU))
            # A worker stopped during its start would be detected only after a minute.
            pids = running.ready() if what == signal.SIGSTOP else running.pids()
            if what in (signal.SIGKILL, signal.SIGSTOP):
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), what)
            elif not (what == signal.SIGTTIN and slots(ready=False) > 4):
                running.send(what)
            threading.Event().wait(0.1)
        while not slots():
            assert time.monotonic() < end + 80, "\n".join(running.lines("worker|slot")[-50:])
            threading.Event().wait(0.1)
        load.more(200)
        count = load.stop()
    assert count["refused"] == count["silent"] == 0, count
    assert count["ok"] > 1000, count
    assert running.service.process.poll() is None

    def settled_slots() -> int:
        """Return the number of slots once the status is stable, else 0."""
        return slots() if len(set(manager.messages[-3:])) == 1 else 0

    now = wait_for(settled_slots)
    for number in [signal.SIGTTOU] * (now - 3) + [signal.SIGTTIN] * (3 - now):
        now += 1 if number == signal.SIGTTIN else -1
        running.send(number)
        wait_for(lambda now=now: slots() == now)
    began = time.monotonic()
    for _ in range(100):
        with greeted(port) as client:
            assert echoes(client)
    assert time.monotonic() - began < 5
    running.settled(3)
    wait_for(lambda: descriptors(running.pid) <= before)
    assert running.stop() == 0
