"""The service in the foreground, as a daemon, as another user, on passed sockets, and under load."""

import contextlib
import json
import os
import re
import resource
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import time

import pytest

from tests.support.greeting import GREETING
from tests.support.programs import program


def exchange(client: socket.socket, read_all) -> bytes:
    client.sendall(b"hello")
    client.shutdown(socket.SHUT_WR)
    return read_all(client)


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_service_and_removes_the_socket_file(service, tmp_path, sig) -> None:
    running = service("--listen=unix:s", "--listen=tcp:0:interface=127.0.0.1")
    running.wait_event("listener.listening", 2)
    assert (tmp_path / "s").exists()
    running.stop(sig)
    assert not (tmp_path / "s").exists()


def test_each_listener_and_each_connection_is_logged_once(service, read_all) -> None:
    running = service("--port=0")
    port = running.port
    with running.connect() as client:
        peer = "{}:{}".format(*client.getsockname())
        assert exchange(client, read_all) == GREETING + b"hello"
    record = running.wait_event("connection.closed")
    assert (record["peer"], record["listener"]) == (peer, f"tcp:0.0.0.0:{port}")
    text = record["message"]
    assert re.search(rf"{peer} on tcp:0.0.0.0:{port}: 0\.\d+ s, 5 bytes in, 27 bytes out, peer finished$", text)
    with running.connect() as client:
        client.recv(100)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    running.wait_event("connection.closed", bytes_in=0, bytes_out=22, reason="reset by peer")
    running.stop()
    listening = [event["listener"] for event in running.events if event["event"] == "listener.listening"]
    assert listening[0] == f"tcp:0.0.0.0:{port}"
    assert len(listening) == len(set(listening))
    assert len([event for event in running.events if event["event"] == "connection.closed"]) == 2


def test_log_level_warn_disables_connection_records(environment, tmp_path, wait_listening, read_all) -> None:
    twistd = os.path.join(os.path.dirname(sys.executable), "twistd")
    command = [twistd, "-n", "--pidfile=", "rtservice", "--listen=unix:s", "--log-level=warn"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_listening(tmp_path / "s")
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(30)
                client.connect(f"{tmp_path}/s")
                assert exchange(client, read_all) == GREETING + b"hello"
        finally:
            process.terminate()
            output = process.communicate(timeout=30)[0]
    assert "starting up" in output
    assert "listening" not in output
    assert "bytes in" not in output


def test_bytes_controlled_by_a_peer_are_escaped_in_the_log(service, tmp_path) -> None:
    running = service(f"--listen=unix:{tmp_path}/s")
    with socket.socket(socket.AF_UNIX) as client:
        client.bind(os.fsencode(tmp_path) + b"/\x1b[31mred")
        client.connect(f"{tmp_path}/s")
        client.recv(100)
    assert running.wait_event("connection.closed")["peer"].endswith(r"/\x1b[31mred")


def test_a_daemon_drops_privileges_and_keeps_its_privileged_port(run, public_directory, wait_for, read_all) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can bind a privileged port and change the user")
    for port in range(1023, 600, -1):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            break
    here = public_directory
    result = run(
        *(f"--pidfile={here}/d.pid", f"--logfile={here}/d.log", f"--rundir={here}", "--uid=nobody"),
        *("rtservice", f"--listen=tcp:{port}:interface=127.0.0.1", "--listen=unix:s:mode=600"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    pid = int(wait_for(lambda: (here / "d.pid").exists() and (here / "d.pid").read_text()))
    try:
        wait_for(lambda: "listening on" in (here / "d.log").read_text())
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            assert exchange(client, read_all) == GREETING + b"hello"
        with open(f"/proc/{pid}/status") as status:
            uids = next(line for line in status if line.startswith("Uid:")).split()[1:]
        assert set(uids) == {"65534"}
        wait_for(lambda: "5 bytes in, 27 bytes out" in (here / "d.log").read_text())
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert not (here / "d.pid").exists()
    assert not (here / "s").exists()


def test_a_daemon_serves_with_syslog(run, tmp_path, wait_for, read_all) -> None:
    result = run("--pidfile=d.pid", "--syslog", "rtservice", "--listen=unix:s")
    assert result.returncode == 0, result.stderr
    pid = int(wait_for(lambda: (tmp_path / "d.pid").exists() and (tmp_path / "d.pid").read_text()))
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")
            assert exchange(client, read_all) == GREETING + b"hello"
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))


def test_a_custom_logger_receives_structured_records(service, tmp_path, wait_for, read_all) -> None:
    (tmp_path / "mylogger.py").write_text(
        textwrap.dedent(
            """
            import json, sys
            from twisted.logger import formatEvent
            def observer():
                def emit(event):
                    fields = {k: v for k, v in event.items() if isinstance(v, (str, int, float))}
                    print(json.dumps({**fields, "text": formatEvent(event)}), file=sys.__stdout__, flush=True)
                from zope.interface import directlyProvides
                from twisted.logger import ILogObserver
                directlyProvides(emit, ILogObserver)
                return emit
            """
        )
    )
    running = service(
        "--listen=tcp:0:interface=127.0.0.1", twistd=("--logger=mylogger.observer",), PYTHONPATH=str(tmp_path)
    )
    event = json.loads(running.wait_line("listening on"))
    port = int(event["listener"].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        assert exchange(client, read_all) == GREETING + b"hello"
    record = json.loads(running.wait_line("bytes_in"))
    assert (record["bytes_in"], record["bytes_out"], record["reason"]) == (5, 27, "peer finished")
    assert record["listener"] == event["listener"]
    assert record["seconds"] >= 0


@pytest.mark.parametrize("reactor", ["select", "poll", "asyncio"])
def test_a_reactor_chosen_by_the_user_serves(service, reactor, read_all) -> None:
    running = service("--port=0", twistd=(f"--reactor={reactor}",))
    with running.connect() as client:
        assert exchange(client, read_all) == GREETING + b"hello"


def test_twist_serves(environment, tmp_path, read_all) -> None:
    twist = os.path.join(os.path.dirname(sys.executable), "twist")
    process = subprocess.Popen(
        [twist, "rtservice", "--listen=unix:s"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert any("listening on" in line for line in process.stdout)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{tmp_path}/s")
            assert exchange(client, read_all) == GREETING + b"hello"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("names", "descriptions"),
    [
        ("", ["systemd:index=0", "systemd:domain=UNIX:index=1"]),
        ("web:local", ["systemd:INET:name=web", "systemd:name=local"]),
        ("both:both", ["systemd:name=both"]),
    ],
)
def test_passed_sockets_are_served_and_their_files_kept(service, tmp_path, names, descriptions, read_all) -> None:
    launcher = program("pass_sockets", names, "tcp,passed")
    running = service(*(f"--listen={description}" for description in descriptions), launcher=launcher)
    running.wait_event("listener.listening", listener=re.compile("^unix:"))
    with running.connect() as client:
        assert exchange(client, read_all) == GREETING + b"hello"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/passed")
        assert exchange(client, read_all) == GREETING + b"hello"
    running.stop()
    assert (tmp_path / "passed").exists()


def raise_descriptor_limit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def test_a_thousand_simultaneous_clients_are_served_without_syn_retransmission(service) -> None:
    # No more clients than the default backlog holds, so that the load of the machine does not matter.
    raise_descriptor_limit()
    running = service("--port=0")
    port = running.port
    selector = selectors.DefaultSelector()
    clients = []
    for _ in range(1000):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", port))
        selector.register(client, selectors.EVENT_WRITE, bytearray())
        clients.append(client)
    waiting = len(clients)
    end = time.monotonic() + 30
    while waiting:
        assert time.monotonic() < end
        for key, event in selector.select(1):
            client, answer = key.fileobj, key.data
            if event & selectors.EVENT_WRITE:
                assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
                client.send(b"ping")
                selector.modify(client, selectors.EVENT_READ, answer)
            else:
                answer += client.recv(100)
                if answer == GREETING + b"ping":
                    selector.unregister(client)
                    waiting -= 1
    # A dropped SYN is retransmitted; the kernel counts that per connection (struct tcp_info, tcpi_total_retrans).
    retransmitted = [c.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[100:104] != bytes(4) for c in clients]
    for client in clients:
        client.close()
    assert sum(retransmitted) == 0


def test_clients_that_never_read_use_bounded_memory(service) -> None:
    raise_descriptor_limit()
    running = service("--port=0")
    left = {}
    for _ in range(100):
        client = running.connect()
        client.setblocking(False)
        left[client] = 10 << 20
    piece = bytes(64 << 10)
    quiet = 0
    while quiet < 3:  # no client can send: every buffer on the path is full
        writable = select.select([], [client for client in left if left[client] > 0], [], 0.3)[1]
        quiet = 0 if writable else quiet + 1
        for client in writable:
            with contextlib.suppress(BlockingIOError):
                left[client] -= client.send(piece[: left[client]])
    assert sum(left.values()) > 0
    assert running.peak_memory < 80e6
    for client in left:
        client.close()


def test_resets_at_any_moment_do_not_affect_other_clients(service, read_all) -> None:
    running = service("--port=0")
    with running.connect() as bystander:
        for moment in range(60):
            with running.connect() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if moment % 3:
                    client.sendall(bytes(moment * 10_000))
                if moment % 2:
                    client.recv(10)
        assert exchange(bystander, read_all) == GREETING + b"hello"
    for count in range(1, 61):
        running.wait_event("connection.closed", count, reason="reset by peer")
    assert not any("Traceback" in line for line in running.lines)
