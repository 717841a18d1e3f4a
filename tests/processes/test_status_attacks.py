"""Hostile clients of the status server of real processes: the latency for other clients."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.deadline import DEADLINE
from tests.support.listen_options import TCP
from tests.support.programs import PROGRAMS

HOSTILE = PROGRAMS / "hostile_http.py"

# The maximum time for an echo, and for a status response on a new connection while the connection limit is reached, in
# seconds. Earlier faults were stalls of 7 to 18 s, and no response at all.
WORST, WORST_ANSWER = 1.0, 5.0


def where(service: Any) -> tuple[str, int]:
    """Return the address of the status server."""
    host, port = service.wait_event("status.listening")["listener"].split(":")[1:]
    return host, int(port)


def ask(address: tuple[str, int], path: str = "/healthz", timeout: float = DEADLINE) -> bytes:
    """Return the response to a request on a new connection."""
    with socket.create_connection(address, timeout=timeout) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        received = bytearray()
        while data := client.recv(1 << 16):
            received += data
    return bytes(received)


@pytest.fixture
def attack() -> Iterator[Callable[[str, Any], subprocess.Popen[str]]]:
    """Start a hostile client; its attacks are in hostile_http.py."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, service: Any) -> subprocess.Popen[str]:
        host, port = where(service)
        command = [sys.executable, str(HOSTILE), name, host, str(port), "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def counted(hostile: subprocess.Popen[str]) -> int:
    """Return the count in the next report of a hostile client."""
    assert hostile.stdout is not None
    return int(hostile.stdout.readline())


def worst_of(service: Any, client: socket.socket) -> tuple[float, float]:
    """Return the maximum times of ten echoes, and of ten responses of /healthz to new clients."""
    echo = health = 0.0
    for _ in range(10):
        began = time.monotonic()
        client.sendall(b"hello")
        assert client.recv(5, socket.MSG_WAITALL) == b"hello"
        echo = max(echo, time.monotonic() - began)
        began = time.monotonic()
        assert ask(where(service)).startswith(b"HTTP/1.1 200 OK")
        health = max(health, time.monotonic() - began)
    return echo, health


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["pipeline", "healthz", "deaf", "crowd", "trickle", "silent"])
def test_an_attack_on_the_status_server_does_not_delay_other_clients(
    service: Callable[..., Any], attack, name: str, workers: int
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", str(workers))
    with ExitStack() as clients:
        # Connections for the tables of the status page.
        for _ in range(600):
            clients.enter_context(running.connect())
        client = clients.enter_context(running.connect())
        assert client.recv(22, socket.MSG_WAITALL) == b"Hello from the server!"
        before = running.peak_memory
        hostile = attack(name, running)
        for _ in range(3):
            count = counted(hostile)
            echo, health = worst_of(running, client)
            assert (echo < WORST, health < WORST_ANSWER) == (True, True), (echo, health)
        if name in ("pipeline", "healthz", "crowd"):
            assert count > 0
        assert running.peak_memory - before < 64 << 20
    assert not any("Traceback" in line or "failed to answer" in line for line in running.lines)


@pytest.mark.parametrize("library", ["ssl", "pyopenssl"])
def test_unfinished_tls_handshakes_are_closed_for_new_status_clients(
    service: Callable[..., Any], attack, certificates, library: str
) -> None:
    tls = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}:library={library}"
    running = service(TCP, "--status", f"ssl:0:interface=127.0.0.1:{tls}")
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    hostile = attack("silent", running)
    for _ in range(3):
        counted(hostile)
        plain = socket.create_connection(where(running), timeout=DEADLINE)
        with context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert not any("Traceback" in line for line in running.lines)


FEW = ["bash", "-c", 'ulimit -n "$0" && exec "$@"']


@pytest.mark.parametrize("descriptors", [128, 256])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_service_and_a_full_status_server_never_run_out_of_descriptors(
    service: Callable[..., Any], wait_for, attack, workers: int, descriptors: int
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", str(workers), launcher=[*FEW, str(descriptors)])
    address = where(running)
    with ExitStack() as clients:
        crowd = [clients.enter_context(running.connect()) for _ in range(2 * descriptors)]
        running.wait_event("connection.limit_reached", workers)
        hostile = attack("silent", running)
        for _ in range(3):
            counted(hostile)
            assert ask(address).startswith(b"HTTP/1.1 200 OK")
        served = select.select(crowd, [], [], 0)[0]
        assert len(served) >= workers * (descriptors // 4)
        served[0].recv(22, socket.MSG_WAITALL)
        served[0].sendall(b"hello")
        assert served[0].recv(5, socket.MSG_WAITALL) == b"hello"
    assert not any("accept.paused" in line or "Too many open files" in line for line in running.lines)


def mutated(numbers: random.Random) -> bytes:
    """Return a request with random changes at random places."""
    target = numbers.choice(
        (b"/", b"/metrics", b"/status.json?sort=age&limit=3", b"/readyz", b"*", b"http://localhost/")
    )
    headers = [b"Host: localhost", b"Accept: application/openmetrics-text; version=1.0.0", b"Cookie: a=b"]
    headers += [b"Content-Length: 0", b"Connection: keep-alive", b"Expect: 100-continue", b"If-None-Match: x"]
    lines = [
        numbers.choice((b"GET ", b"HEAD ", b"OPTIONS ", b"POST ")) + target + b" HTTP/1.1",
        headers[0],
        *numbers.sample(headers[1:], numbers.randrange(4)),
    ]
    data = bytearray(b"\r\n".join(lines) + b"\r\n\r\n")
    for _ in range(numbers.randrange(4)):
        place = numbers.randrange(len(data) + 1)
        size = numbers.choice((0, 1, 1, 2, 30))
        data[place : place + size] = numbers.randbytes(numbers.choice((1, 1, 2, 8))) if size < 30 else b""
    return bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_mutated_requests_cause_no_traceback_and_the_server_keeps_answering(
    service: Callable[..., Any], workers: int
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", str(workers))
    address = where(running)
    numbers = random.Random(workers)
    answers = 0
    for _ in range(800):
        requests = b"".join(mutated(numbers) for _ in range(numbers.randrange(1, 10)))
        with socket.create_connection(address, timeout=DEADLINE) as client, contextlib.suppress(OSError):
            while requests:
                size = numbers.randrange(1, len(requests) + 1)
                client.sendall(requests[:size])
                requests = requests[size:]
            client.shutdown(socket.SHUT_WR)
            while data := client.recv(1 << 16):
                answers += data.count(b"HTTP/1.")
    assert answers > 500
    assert ask(address).startswith(b"HTTP/1.1 200 OK")
    assert running.stop() == 0
    assert [line for line in running.lines if "Traceback" in line or "Error" in line or "failed" in line] == []
