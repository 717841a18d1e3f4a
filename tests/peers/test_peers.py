"""Clients of other programs: nc, socat and a plain socket."""

import os
import re
import socket
import subprocess

import pytest

from tests.support.greeting import GREETING
from tests.support.ipv6 import needs_ipv6
from tests.support.needs import needs

HOSTS = ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)]


def run(*command: str, data: bytes = b"") -> bytes:
    return subprocess.run(command, input=data, capture_output=True, timeout=60, check=True).stdout


@needs("nc", "netcat-openbsd")
@pytest.mark.parametrize("host", HOSTS)
def test_nc_is_greeted_and_echoed(service, host) -> None:
    running = service("--port=0")
    assert run("nc", "-N", host, str(running.port), data=b"hello") == GREETING + b"hello"


@needs("nc", "netcat-openbsd")
def test_nc_is_served_over_a_unix_socket(service, tmp_path) -> None:
    service("--listen=unix:s:mode=600")
    assert run("nc", "-NU", f"{tmp_path}/s", data=b"hello") == GREETING + b"hello"


@needs("nc", "netcat-openbsd")
@pytest.mark.parametrize("host", HOSTS)
def test_echoing_100_mib_uses_bounded_memory(service, host) -> None:
    running = service("--port=0")
    data = os.urandom(100 << 20)
    assert run("nc", "-N", host, str(running.port), data=data) == GREETING + data
    assert running.peak_memory < 80e6


@needs("socat", "socat")
@pytest.mark.parametrize("framing", ["raw", "line"])
def test_socat_receives_its_lines_back(service, framing) -> None:
    running = service("--listen=tcp:0:interface=127.0.0.1", f"--framing={framing}", r"--greeting=hi")
    answer = run("socat", "-t5", "-", f"TCP:127.0.0.1:{running.port},crnl", data=b"one\ntwo\n")
    assert answer.replace(b"\r\n", b"\n") == (b"hi\n" if framing == "line" else b"hi") + b"one\ntwo\n"


def receive(client: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = client.recv(1024)
        assert piece, f"the connection ended after {data!r}"
        data += piece
    return data


@pytest.mark.parametrize("host", HOSTS)
def test_a_socket_client_is_greeted_and_echoed(service, host) -> None:
    running = service("--port=0")
    with socket.create_connection((host, running.port), timeout=30) as client:
        assert receive(client, 22) == GREETING
        for message in (b"hello", b"\0\xff", b"x" * 1024):
            client.sendall(message)
            assert receive(client, len(message)) == message


def test_greet_first_data_sends_the_greeting_after_the_first_data(service) -> None:
    running = service("--port=0", "--greet=first-data", r"--greeting=hi\r\n")
    with running.connect() as client:
        client.sendall(b"hello")
        assert receive(client, 9) == b"hi\r\nhello"


@pytest.mark.parametrize(
    ("framing", "good", "greeting", "bad"),
    [
        ("line", b"12345\r\n", b"hi\r\n", b"123456\n"),
        ("netstring", b"5:12345,", b"2:hi,", b"6:123456,"),
        ("int32", b"\0\0\0\x0512345", b"\0\0\0\x02hi", b"\0\0\0\x06123456"),
    ],
)
def test_a_message_above_the_limit_closes_the_connection_and_logs_the_reason(
    service, framing, good, greeting, bad, read_all
) -> None:
    running = service("--port=0", f"--framing={framing}", "--max-message=5", "--greeting=hi")
    with running.connect() as client:
        client.sendall(good)
        assert receive(client, len(greeting + good)) == greeting + good
        client.sendall(bad)
        assert read_all(client) == b""
    assert "--max-message" in running.wait_event("echo.message_rejected", peer=re.compile("^127.0.0.1:"))["problem"]
    running.wait_event("connection.closed", reason="closed")
