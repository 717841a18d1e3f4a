"""Limits and timeouts of real processes under bursts, idle peers, shortages, injected faults and clock changes."""

import contextlib
import datetime
import json
import select
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rtservice.process.server import raise_descriptor_limit
from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.listening import port_of
from tests.support.processes import cpu_seconds
from tests.support.programs import program


def exchange(client: socket.socket) -> None:
    client.sendall(b"ping")
    assert client.recv(100) == b"ping"


def readable(clients: list[socket.socket], seconds: float = 0) -> list[socket.socket]:
    """Wait up to some seconds; return the clients that can read data or an end."""
    poll = select.poll()
    by_descriptor = {client.fileno(): client for client in clients}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(seconds * 1000)]


def answer(client: socket.socket) -> bytes:
    """Return the first data that a client receives; nothing if it was closed or reset."""
    try:
        return client.recv(100)
    except ConnectionResetError:
        return b""


def read_until_reset(client: socket.socket) -> bytes:
    received = bytearray()
    try:
        while piece := client.recv(1 << 20):
            received += piece
    except ConnectionResetError:
        return bytes(received)
    raise AssertionError("the connection was closed without a reset")


def cpu_share(pid: int, served: socket.socket, waiting: list[socket.socket]) -> float:
    """Return the share of a core that the process uses in two seconds with little traffic while other clients wait."""
    began, cpu = time.monotonic(), cpu_seconds(pid)
    for _ in range(20):
        exchange(served)
        assert readable(waiting, 0.1) == []
    return (cpu_seconds(pid) - cpu) / (time.monotonic() - began)


@pytest.fixture
def clients() -> Iterator[Callable[..., list[socket.socket]]]:
    """Connect many clients to a port of 127.0.0.1; close them at the end."""
    connected: list[socket.socket] = []

    def connect(number: int, port: int, first: bytes = b"") -> list[socket.socket]:
        new = []
        for _ in range(number):
            client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
            connected.append(client)
            new.append(client)
            client.sendall(first)
        return new

    yield connect
    for client in connected:
        client.close()


# --- the number of connections ---


@pytest.mark.parametrize("reactor", ["rtservice", "poll", "asyncio"])
def test_clients_above_the_limit_wait_in_the_backlog_and_are_served_later(service, clients, reactor) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", "--max-connections=5", twistd=(f"--reactor={reactor}",))
    waiting = clients(30, running.port)
    served: list[socket.socket] = []
    most = 5
    while waiting:
        while len(served) < most:
            for client in readable(waiting, DEADLINE):
                assert client.recv(100) == GREETING
                waiting.remove(client)
                served.append(client)
        assert len(served) == 5
        for client in served:  # then every earlier effect is visible too
            exchange(client)
        assert readable(waiting) == []
        served.pop(0).close()
    running.wait_event("connection.limit_reached", limit=5)
    assert len([event for event in running.events if event["event"] == "connection.limit_reached"]) == 1


def test_at_limit_reject_closes_clients_above_the_limit_at_once(service, clients) -> None:
    running = service(
        "--listen=tcp:0:interface=127.0.0.1", "--max-connections=5", "--at-limit=reject", "--drain-timeout=0"
    )
    many = clients(200, running.port)
    answers = [answer(client) for client in many]
    assert answers.count(GREETING) == 5
    assert answers.count(b"") == 195
    served = [client for client, first in zip(many, answers, strict=True) if first]
    for client in served:
        exchange(client)
    running.wait_event("connection.refused", setting="max-connections", suppressed=0)
    assert len([event for event in running.events if event["event"] == "connection.refused"]) == 1
    served[0].close()
    running.wait_event("connection.closed", bytes_in=4)
    (late,) = clients(1, running.port)
    assert answer(late) == GREETING
    running.stop()
    assert len([event for event in running.events if event["event"] == "connection.closed"]) == 6


def test_the_limit_per_peer_does_not_affect_another_address(service, clients) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", "--max-connections-per-peer=3")
    answers = [answer(client) for client in clients(20, running.port)]
    assert answers.count(GREETING) == 3
    with socket.create_connection(
        ("127.0.0.1", running.port), timeout=DEADLINE, source_address=("127.0.0.2", 0)
    ) as other:
        assert answer(other) == GREETING


# --- descriptors ---


FEW_DESCRIPTORS = ["bash", "-c", 'ulimit -n 64 && exec "$@"', "bash"]  # soft and hard limit


def test_the_default_connection_limit_follows_the_descriptor_limit(service, clients) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", launcher=FEW_DESCRIPTORS)
    waiting = clients(60, running.port)
    running.wait_event("connection.limit_reached", limit=32)
    served = 0
    while served < 32:
        for client in readable(waiting, DEADLINE):
            assert client.recv(100) == GREETING
            waiting.remove(client)
            exchange(client)
            served += 1
    assert readable(waiting) == []
    assert not any(event["event"] == "accept.paused" for event in running.events)


def test_without_descriptors_accepting_pauses_without_spinning_and_resumes_later(service, clients) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", "--max-connections=1000", launcher=FEW_DESCRIPTORS)
    running.wait_event("connection.limit_unreachable", connections=1000, limit=64)
    waiting = clients(100, running.port)
    running.wait_event("accept.paused", problem="Too many open files")
    served = readable(waiting, DEADLINE)
    assert {client.recv(100) for client in served} == {GREETING}
    waiting = [client for client in waiting if client not in served]
    assert 32 < len(served) < 64
    for client in served:
        exchange(client)
    assert cpu_share(running.process.pid, served[0], waiting) < 0.05
    assert len([event for event in running.events if event["event"] == "accept.paused"]) == 1
    while waiting:
        for _ in range(20):
            served.pop(0).close()
        for _ in range(min(20, len(waiting))):
            client = readable(waiting, DEADLINE)[0]
            assert client.recv(100) == GREETING
            waiting.remove(client)
            served.append(client)
    for client in served:
        exchange(client)
    assert not any("Traceback" in line for line in running.lines)


# --- injected faults ---


@pytest.fixture
def strace() -> Callable[..., list[str]]:
    """Return a launcher that injects a fault into a system call; skip the test if strace cannot trace."""
    if shutil.which("strace") is None:
        pytest.skip("strace (Debian: strace) is not installed")
    # -D runs strace as a grandchild: the started process is the service itself.
    launcher = ["strace", "-D", "-f", "-qq", "-o", "/dev/null"]
    if subprocess.run([*launcher, "true"], capture_output=True, timeout=DEADLINE).returncode:
        pytest.skip("strace may not trace here (ptrace(2))")
    return lambda call, fault, *more: [*launcher, "-e", f"trace={call}", "-e", f"inject={call}:{fault}", *more]


@pytest.mark.parametrize("code", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"])
def test_accept_pauses_after_a_resource_error_and_resumes(service, clients, strace, code) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", launcher=strace("accept4", f"error={code}:when=1..2"))
    for client in clients(3, running.port):
        assert client.recv(100) == GREETING
        exchange(client)
    assert len([event for event in running.events if event["event"] == "accept.paused"]) == 1


def test_a_client_that_closes_before_accept_does_not_affect_others(service, clients, strace) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", launcher=strace("accept4", "error=ECONNABORTED:when=1+3"))
    for client in clients(20, running.port):
        assert client.recv(100) == GREETING
    assert not any(event["event"] == "accept.paused" for event in running.events)


def test_a_log_that_cannot_be_written_does_not_affect_clients(environment, tmp_path, wait_listening, strace) -> None:
    log, path = tmp_path / "log", tmp_path / "s"
    twistd = str(Path(sys.executable).parent / "twistd")
    # Lines are written in batches: the first two writes succeed.
    launcher = strace("write", "error=ENOSPC:when=3+", "-P", str(log))
    command = [*launcher, twistd, "-n", "--pidfile=", f"--logfile={log}", "rtservice", f"--listen=unix:{path}"]

    def connected() -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(DEADLINE)
        client.connect(str(path))
        assert client.recv(100) == GREETING
        return client

    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_listening(path)
            for _ in range(50):
                with connected() as client:
                    exchange(client)
            with connected() as client:
                assert cpu_share(process.pid, client, []) < 0.05
        finally:
            process.terminate()
            process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert "starting up" in log.read_text()
    assert log.read_text().count("bytes in") < 51


# --- timeouts ---


def test_unfinished_handshakes_are_closed_after_the_handshake_timeout(service, clients, certificates, manager) -> None:
    files = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    running = service(
        f"--listen=proxy:ssl:0:interface=127.0.0.1:{files}",
        "--listen=proxy:tcp:0:interface=127.0.0.1",
        "--handshake-timeout=4",
        NOTIFY_SOCKET=manager.address,
    )
    secure = port_of(running, "proxy:ssl")
    plain = port_of(running, "proxy:tcp")
    header = b"PROXY TCP4 192.0.2.9 192.0.2.1 1 2\r\n"
    began = time.monotonic()
    silent = clients(200, secure, header) + clients(200, plain, header[:20])
    manager.wait("STATUS=serving: 0 connections open, 400 in a handshake or closing$")
    (honest,) = clients(1, plain, header)
    assert honest.recv(100) == GREETING
    exchange(honest)
    trusting = ssl.create_default_context(cafile=certificates["ca.pem"])
    (honest_tls,) = clients(1, secure, header)
    with trusting.wrap_socket(honest_tls, server_hostname="localhost") as secured:
        assert secured.recv(100) == GREETING
        exchange(secured)  # type: ignore[arg-type]  # has the methods of a socket
        for client in silent:
            assert answer(client) == b""
        assert time.monotonic() - began >= 4
        running.wait_event("connection.closed", 200, reason="TLS handshake timed out")
        running.wait_event("connection.closed", 200, reason="PROXY header timed out")
        manager.wait("STATUS=serving: 2 connections open$")
        exchange(secured)
    exchange(honest)


def test_idle_connections_are_closed_and_active_ones_stay_open(service, clients) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", "--idle-timeout=1")
    began = time.monotonic()
    silent, speaking = clients(2, running.port)
    assert speaking.recv(100) == silent.recv(100) == GREETING
    while not readable([silent], 0.2):
        exchange(speaking)
        assert time.monotonic() < began + DEADLINE
    assert time.monotonic() - began >= 1
    assert silent.recv(100) == b""
    exchange(speaking)
    running.wait_event("connection.closed", reason="idle")
    assert len([event for event in running.events if event["event"] == "connection.closed"]) == 1


def test_a_peer_that_stops_reading_is_aborted(service, clients) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", "--idle-timeout=1")
    (client,) = clients(1, running.port)
    client.settimeout(0.5)
    with contextlib.suppress(TimeoutError):
        while True:
            client.sendall(bytes(1 << 20))
    running.wait_event("connection.closed", reason="stopped reading")
    client.settimeout(DEADLINE)
    received = read_until_reset(client)
    assert received.startswith(GREETING)


@pytest.mark.parametrize("offset", ["-3600", "+3600"])
def test_setting_the_clock_by_an_hour_does_not_move_timeouts(service, clients, manager, tmp_path, offset) -> None:
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("faketime (Debian: faketime) is not installed")
    library = subprocess.run(
        [faketime, "-f", "+0", "sh", "-c", "echo $LD_PRELOAD"], capture_output=True, text=True, timeout=DEADLINE
    ).stdout.strip()
    clock = tmp_path / "clock"
    clock.write_text("+0")
    running = service(
        "--listen=tcp:0:interface=127.0.0.1",
        "--listen=proxy:tcp:0:interface=127.0.0.1",
        "--idle-timeout=2",
        "--handshake-timeout=2",
        "--drain-timeout=1",
        LD_PRELOAD=library,
        FAKETIME_TIMESTAMP_FILE=str(clock),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",
        NOTIFY_SOCKET=manager.address,
        WATCHDOG_USEC="1000000",
    )
    proxied = port_of(running, "proxy:tcp")
    began = time.monotonic()
    (idle,), (unfinished,) = clients(1, running.port), clients(1, proxied, b"PROXY")
    assert idle.recv(100) == GREETING
    clock.write_text(offset)
    manager.received()
    for _ in range(3):
        manager.wait("WATCHDOG=1")
    for client, why in ((idle, "idle"), (unfinished, "PROXY header timed out")):
        assert answer(client) == b""
        assert 2 <= time.monotonic() - began < DEADLINE
        running.wait_event("connection.closed", reason=why)
    (late,) = clients(1, running.port)
    assert late.recv(100) == GREETING
    began = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    manager.wait("STOPPING=1")
    clock.write_text("+0")
    assert answer(late) == b""
    assert 1 <= time.monotonic() - began < DEADLINE
    assert running.process.wait(DEADLINE) == 0
    running.wait_event("drain.done", ended=1, aborted=0)
    # The times in the log show that the clock was changed: records that are seconds apart differ by most of an hour.
    idle = running.wait_event("connection.closed", reason="idle")
    first, closed = (datetime.datetime.fromisoformat(record["time"]) for record in (running.records[0], idle))
    assert abs(closed - first) > datetime.timedelta(minutes=50)


# --- a flood ---


def latencies(client: socket.socket, proceed: Callable[[int], bool]) -> list[float]:
    took: list[float] = []
    while proceed(len(took)):
        began = time.perf_counter()
        exchange(client)
        took.append(time.perf_counter() - began)
    return took


def p99(took: list[float]) -> float:
    return statistics.quantiles(took, n=100)[98]


def resident(pid: int) -> int:
    """Return the resident memory of a process, in KiB."""
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0])


def test_a_connection_flood_does_not_affect_ten_thousand_idle_clients(service, record_property: Any) -> None:
    if raise_descriptor_limit() < 10_200:
        pytest.skip("a process may not have 10,200 descriptors here (ulimit -Hn)")
    running = service("--listen=tcp:0:interface=127.0.0.1", "--max-connections=10000", "--at-limit=reject")
    port, pid = running.port, running.process.pid
    command = program("flood", str(port), "5000", "200")
    with contextlib.ExitStack() as stack:
        flooder = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(flooder.kill)
        idle = []
        for number in range(10_000):
            source = f"127.0.2.{number % 100 + 1}", 0
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port), DEADLINE, source))
            assert client.recv(100) == GREETING
            idle.append(client)
        working = idle.pop()
        latencies(working, lambda count: count < 500)
        quiet = latencies(working, lambda count: count < 5000)
        before = resident(pid)
        assert flooder.stdin is not None
        assert flooder.stdout is not None
        flooder.stdin.write("\n")
        flooder.stdin.flush()
        during = latencies(working, lambda count: count % 16 != 0 or not select.select([flooder.stdout], [], [], 0)[0])
        assert json.loads(flooder.stdout.readline()) == {"served": 0, "refused": 5000}
        assert readable(idle) == []
        for client in idle:
            exchange(client)
        after = resident(pid)
    figures = f"p99 {p99(quiet) * 1e3:.2f} -> {p99(during) * 1e3:.2f} ms ({len(during)}), {before} -> {after} KiB"
    record_property("figures", figures)
    print(figures)
    assert abs(after - before) < 0.1 * before, figures
    # Below a few milliseconds the scheduler dominates: three busy processes share few cores.
    assert p99(during) < max(5 * p99(quiet), 0.01), figures
