"""Stopping a service with workers."""

import contextlib
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import connect, echoes, greeted
from tests.support.deadline import DEADLINE
from tests.support.listen_options import TCP
from tests.support.load import Load
from tests.support.processes import accepted_by
from tests.support.workers import Workers


@pytest.mark.parametrize("target", ["parent", "all processes"])
def test_a_stop_resets_no_connection(workers, target) -> None:
    running = workers(TCP)
    with Load(port=running.service.port, short=32, long=32) as load:
        load.more(100)
        for pid in (running.pid, *(running.pids() if target == "all processes" else ())):
            os.kill(pid, signal.SIGTERM)
        assert running.service.process.wait(DEADLINE) == 0
        count = load.stop()
    assert count["refused"] > 0
    assert count["reset"] == count["cut"] == count["silent"] == count["lost"] == 0, count
    assert [event for event in running.recorded("drain.done", aborted=0) if "slot" not in event]


LISTEN = (TCP, "--listen=tcp6:0", "--listen=unix:s")


def addresses_of(running: Workers, directory: Path) -> list[Any]:
    """Return its addresses: IPv4, IPv6, and the path of a UNIX socket."""
    lines = [
        running.wait_event("listener.listening", listener=re.compile(rf"^tcp:{host}:\d+$"))["listener"]
        for host in (r"127\.0\.0\.1", r"\[::\]")
    ]
    port, port6 = (int(line.rpartition(":")[2]) for line in lines)
    return [port, ("::1", port6, 0, 0), f"{directory}/s"]


def assert_a_successor_takes_over(workers: Callable[..., Workers], addresses: list[Any], wait_for: Any) -> Workers:
    """Check that a draining service refuses new clients, and start another service on its addresses."""

    def refused(address: Any) -> bool:
        try:
            connect(address).close()  # accepted if the signal is not handled yet
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        return False

    for address in addresses:
        wait_for(lambda address=address: refused(address))
    port, (_, port6, *_), path = addresses
    listen = f"--listen=tcp:{port}:interface=127.0.0.1", f"--listen=tcp6:{port6}", f"--listen=unix:{path}"
    successor = workers(*listen)
    for address in addresses:
        greeted(address).close()
    return successor


def test_new_clients_during_a_drain_are_refused_and_a_successor_can_listen(workers, tmp_path, wait_for) -> None:
    running = workers(*LISTEN)
    addresses = addresses_of(running, tmp_path)
    # Take a reserve socket, and return it.
    running.send(signal.SIGTTIN)
    running.wait_event("worker.ready", slot=2)
    running.send(signal.SIGTTOU)
    running.wait_event("slot.removed", slot=2)
    pids = running.settled(2)
    old = [greeted(address) for address in addresses]
    idle = next(pid for pid in pids if not accepted_by(pid, old[:1]))
    running.send(signal.SIGINT)
    running.wait_event("drain.started", 3)
    os.kill(idle, signal.SIGKILL)  # it is not replaced, and no process has its sockets
    successor = assert_a_successor_takes_over(workers, addresses, wait_for)
    assert echoes(old[0])
    assert running.service.process.poll() is None
    for client in old:
        client.close()
    assert running.service.process.wait(DEADLINE) == 0
    for address in addresses:  # the socket file belongs to the successor
        greeted(address).close()
    assert successor.stop() == 0


@pytest.mark.parametrize("change", ["reloaded", "replaced", "reduced"])
def test_stopping_during_a_replacement_releases_every_address(workers, tmp_path, wait_for, change) -> None:
    running = workers(*LISTEN)
    addresses = addresses_of(running, tmp_path)
    pids = running.settled(2)
    clients = [greeted(address) for address in addresses * 10]  # some of each worker
    match change:
        case "reloaded":  # the old workers drain
            running.send(signal.SIGHUP)
            running.wait_event("drain.started", 2)
        case "replaced":  # successors start
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
            wait_for(lambda: len(running.pids()) > 2)
        case "reduced":  # the last slot drains
            running.send(signal.SIGTTOU)
            running.wait_event("drain.started", slot=1)
    running.send(signal.SIGTERM)
    successor = assert_a_successor_takes_over(workers, addresses, wait_for)
    assert all(echoes(client) for client in clients)
    for client in clients:
        client.close()
    assert running.service.process.wait(DEADLINE) == 0
    assert running.left() == []
    for address in addresses:
        greeted(address).close()
    assert successor.stop() == 0


def test_a_second_signal_ends_the_drain(workers, wait_for) -> None:
    running = workers(TCP)
    with greeted(running.service.port) as client:
        running.send(signal.SIGTERM)
        running.wait_event("drain.started", count=1)
        assert echoes(client)
        # Signals within half a second of the first are ignored as duplicates.
        wait_for(lambda: running.send(signal.SIGTERM) or running.recorded("stop.repeated", signal="SIGTERM"))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        assert running.service.process.wait(DEADLINE) == 128 + signal.SIGTERM
    running.wait_event("drain.done", ended=0, aborted=1)
