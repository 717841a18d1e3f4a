"""A faulty or compromised worker: its effects on the supervisor, on other workers, and on the log.

The hosted protocol writes hostile bytes to its control channel, while a bystander, a client of the other worker, and a
client of /healthz measure their maximum response times.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.deadline import DEADLINE
from tests.support.hosted import copy_hosted
from tests.support.recorded import recorded

# The maximum response time for other clients, in seconds. A record with a large width in its format string took 20 s.
# Test machines are busy, and the hostile worker uses a core.
MAXIMUM_LATENCY = 3.0

# The maximum growth of the supervisor's memory, in bytes. 200,000 invented counters were 291 MB of metrics.
MAXIMUM_GROWTH = 48 << 20


class Meter(threading.Thread):
    """Sends requests repeatedly, and measures the maximum response time."""

    def __init__(self, ask: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.worst = 0.0
        self.count = 0
        self.problem: Exception | None = None
        self._ask = ask
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            try:
                self._ask()
            except Exception as problem:  # reported by `World.check`
                self.problem = problem
                return
            self.worst = max(self.worst, time.monotonic() - began)
            self.count += 1
            self._ended.wait(0.01)

    def stop(self) -> None:
        """Wait for ten more requests, and stop."""
        last = self.count + 10
        while self.count < last and self.is_alive():
            self._ended.wait(0.01)
        self._ended.set()
        self.join(DEADLINE)


class World:
    """A service with two workers: one serves a bystander, the other executes attacks."""

    def __init__(self, service: Any) -> None:
        self.service = service
        self.pid: int = service.process.pid
        self.site = f"http://{service.wait_event('status.listening')['listener'].rpartition('tcp:')[2]}"
        self.bystander = service.connect()
        self.bystander_pid = self.ask_pid(self.bystander)
        self.memory = service.peak_memory
        self._meters = (Meter(self._exchange), Meter(self._health))

    def ask_pid(self, client: socket.socket) -> int:
        client.sendall(b"pid\n")
        answer = b""
        while not answer.endswith(b"\n"):
            data = client.recv(100)
            if not data:
                raise ConnectionResetError
            answer += data
        return int(answer)

    def _exchange(self) -> None:
        assert self.ask_pid(self.bystander) == self.bystander_pid

    def _health(self) -> None:
        assert self.get("/healthz") == b"alive\n"

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.site}{path}", timeout=DEADLINE) as answer:
            return bytes(answer.read())

    def victim(self) -> tuple[socket.socket, int]:
        """Return a client of the other worker, and the pid of that worker."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            with contextlib.suppress(ConnectionError):
                client = self.service.connect()
                pid = self.ask_pid(client)
                if pid != self.bystander_pid:
                    return client, pid
                client.close()
            threading.Event().wait(0.02)
        raise AssertionError("the other worker does not serve")

    def attack(self, name: str) -> int:
        client, pid = self.victim()
        with client:
            client.sendall(f"{name}\n".encode())
            return pid

    def recorded(self, name: str, /, **fields: Any) -> list[dict[str, Any]]:
        """Return the records of an event with these fields, so far."""
        return recorded(self.service.events, name, **fields)

    def check(self) -> None:
        """Check that response times and memory stayed within the limits, and stop the service."""
        for meter in self._meters:
            meter.stop()
            assert meter.problem is None
            assert meter.worst < MAXIMUM_LATENCY, [each.worst for each in self._meters]
        assert self.service.peak_memory - self.memory < MAXIMUM_GROWTH
        self.bystander.close()
        assert self.service.stop() == 0


@pytest.fixture
def world(hosted, tmp_path) -> Callable[..., World]:
    """Start a service whose workers execute attacks."""
    copy_hosted("mad", tmp_path)

    def start(*arguments: str) -> World:
        path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
        options = ("--workers=2", "--status=tcp:0", "--drain-timeout=1", *arguments)
        return World(hosted("mad:Mad", *options, PYTHONPATH=path))

    return start


VIOLATIONS = {
    "format": "an unknown message 'log'",
    "names": "a heartbeat with an unknown counter 'invented0'",
    "labels": "a heartbeat with more than 100 labels of 'protocol'",
    # Depends on timing: a heartbeat of the worker may be interleaved, and end the line.
    "long": "a message of more than 262144 bytes|a message 'beat' of more than 65536 bytes",
    "partial": "a message of more than 262144 bytes",
    "binary": "an unknown message |a message of more than",
    "deep": "a message 'beat' that is not JSON",
    "digits": "a message 'beat' that is not JSON",
    "nan": "a message 'beat' that is not JSON",
    "ready": "'ready' after 'ready'",
    "failed": "'failed' after 'ready'",
    "time": "a log record with an invalid time",
    "level": "a log record of an unknown level 'loud'",
    "answer": "an answer without a question",
    "legacy": "a log record with a field 'format'",
    "negative": r"a heartbeat with an invalid count of 'lag_us'",
    "drain": "an unknown message 'drain'",
}


@pytest.mark.parametrize(
    "names",
    [
        ("format", "names", "labels", "long", "partial", "binary"),
        ("deep", "digits", "nan", "ready", "failed", "time"),
        ("level", "answer", "legacy", "negative", "drain"),
    ],
    ids=" ".join,
)
def test_a_worker_that_violates_the_protocol_is_killed_and_logged_once(world, names) -> None:
    running = world()
    for count, name in enumerate(names, 1):
        pid = running.attack(name)
        line = running.service.wait_event("worker.violation", pid=pid)["message"]
        assert re.search(VIOLATIONS[name], line)
        assert len(line) < 300
        running.service.wait_event("worker.restarting", count)
    assert len(running.recorded("worker.violation")) == len(names)
    running.victim()[0].close()  # the worker was replaced
    assert len(running.get("/metrics")) < 100_000
    assert len(running.get("/status.json")) < 100_000
    running.check()


@pytest.mark.parametrize("name", ["records", "batches", "text", "heartbeats", "leave", "print", "lines"])
def test_a_flood_from_a_worker_is_throttled_and_the_supervisor_stays_responsive(world, wait_for, name) -> None:
    running = world("--hang-timeout=0")
    running.attack(name)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        running.get("/readyz")
        running.get("/status.json?limit=10")
    # Meanwhile, signals are handled and status requests answered.
    running.service.process.send_signal(signal.SIGTTIN)
    wait_for(lambda: running.recorded("worker.ready", slot=2))
    assert running.bystander_pid in {worker["pid"] for worker in json.loads(running.get("/status.json"))["workers"]}
    running.check()


def test_a_worker_that_does_not_read_gets_few_queries_and_is_killed(world, wait_for) -> None:
    running = world("--hang-timeout=4")
    pid = running.attack("deaf")
    requests: list[threading.Thread] = []
    for _ in range(40):
        requests.append(threading.Thread(target=running.get, args=("/status.json?limit=500",), daemon=True))
        requests[-1].start()
    running.service.wait_event("worker.unresponsive", pid=pid, seconds=4.0)
    for thread in requests:
        thread.join(DEADLINE)
    running.victim()[0].close()
    running.check()


def test_control_characters_in_worker_logs_are_escaped(world) -> None:
    running = world()
    running.attack("escapes")
    running.service.wait_line(r"printed \\+x1b\[31m\\+xff")
    running.service.wait_line("by itself")
    running.service.wait_line("2026-01-01 forged")
    records = {(record["namespace"], record["message"]): record for record in running.service.records}
    assert ("mad", r"by itself \x1b[31m \x1b]0;") in records
    [(_, forged)] = [key for key in records if "forged" in key[1]]
    assert (r"\x1b[31m\nmad", forged) in records
    assert forged.splitlines() == [r"\x1b[2Jforged\x07", r"2026-01-01 forged\x9b"]
    texts = [record.get(key, "") for record in records.values() for key in ("namespace", "message", "traceback")]
    assert not any("\x1b" in text or "\x07" in text or "\x9b" in text for text in (*texts, *running.service.lines))
    running.check()


def test_a_large_log_record_is_truncated_in_the_worker(world) -> None:
    running = world()
    running.attack("large")
    running.service.wait_line("characters left out")
    assert all(len(record["message"]) < 20_000 for record in running.service.records)
    assert not running.recorded("worker.violation")
    running.check()
