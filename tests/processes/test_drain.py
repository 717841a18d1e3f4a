"""Stop and restart of a service, as clients and the service manager observe it: no data is lost."""

import contextlib
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.clients import connect, greeted
from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.hosted import copy_plugin
from tests.support.ipv6 import needs_ipv6
from tests.support.listen_options import TCP
from tests.support.processes import freeze
from tests.support.programs import program
from tests.support.recorded import recorded


def echoed(client: socket.socket, data: bytes) -> None:
    """Send a message and check that it is echoed."""
    client.sendall(data)
    answer = bytearray()
    while len(answer) < len(data):
        piece = client.recv(1 << 16)
        assert piece, f"the connection ended after {len(answer)} bytes of {len(data)}"
        answer += piece
    assert answer == data


def drained(running, **fields) -> bool:
    """Return whether the last event is `drain.done` with these fields."""
    return bool(recorded(running.events[-1:], "drain.done", **fields))


class Load:
    """Successive clients in each of several threads, until `stop` is called or, with `until_refused`, one is refused.

    Each sends up to 200 KB in one to three messages, reads meanwhile, half-closes, and reads to the end. `outcome`
    counts clients `served` completely, `refused`, `reset`, and unexpected outcomes.
    """

    def __init__(self, addresses, until_refused: bool = False) -> None:
        self.outcome: Counter[str] = Counter()
        self._until_refused = until_refused
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(address,), daemon=True) for address in addresses]
        for thread in self._threads:
            thread.start()

    def _run(self, address) -> None:
        while not self._enough.is_set():
            outcome = self._visit(address)
            self.outcome[outcome] += 1
            if outcome == "refused" and self._until_refused:
                return

    def _visit(self, address) -> str:
        try:
            client = connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return "refused"
        except OSError as problem:
            return f"connect: {problem!r}"
        try:
            with client:
                expected, answer = bytearray(GREETING), bytearray()
                for _ in range(random.randint(1, 3)):
                    data = random.randbytes(random.choice((1, 100, 70_000)))
                    client.sendall(data)
                    expected += data
                    answer += client.recv(1 << 16)
                client.shutdown(socket.SHUT_WR)
                while piece := client.recv(1 << 16):
                    answer += piece
        except (ConnectionResetError, BrokenPipeError):
            return "reset"
        except OSError as problem:
            return f"exchange: {problem!r}"
        return "served" if answer == expected else f"{len(answer)} bytes of {len(expected)}"

    def stop(self) -> Counter[str]:
        self._enough.set()
        for thread in self._threads:
            thread.join(DEADLINE)
        return self.outcome


TCP6 = r"--listen=tcp:0:interface=\:\:1"
UNIX = "--listen=unix:s"


KINDS = [
    pytest.param(TCP, id="tcp"),
    pytest.param(TCP6, id="tcp6", marks=needs_ipv6),
    pytest.param(UNIX, id="unix"),
]


def address_of(running, tmp_path, listen: str):
    if listen == UNIX:
        return f"{tmp_path}/s"
    return ("::1" if listen == TCP6 else "127.0.0.1", running.port)


# --- sockets bound by the service ---


@pytest.mark.parametrize("listen", KINDS)
def test_clients_in_the_backlog_at_sigterm_are_served(service, tmp_path, wait_for, read_all, listen) -> None:
    running = service(listen)
    address = address_of(running, tmp_path, listen)
    freeze(running.process.pid, wait_for)
    clients = [connect(address) for _ in range(100)]
    for client in clients[:50]:  # half of the clients send and half-close before they are accepted
        client.sendall(b"early")
        client.shutdown(socket.SHUT_WR)
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGCONT)
    for client in clients[50:]:
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
    for number, client in enumerate(clients):
        with client:
            assert read_all(client) == GREETING + (b"early" if number < 50 else b"late")
    assert running.process.wait(DEADLINE) == 0
    assert drained(running, ended=100, aborted=0)


@pytest.mark.parametrize("listen", KINDS)
def test_clients_connecting_during_a_stop_are_served_or_refused_but_never_reset(
    service, tmp_path, wait_for, listen
) -> None:
    running = service(listen)
    load = Load([address_of(running, tmp_path, listen)] * 6, until_refused=True)
    wait_for(lambda: load.outcome["served"] >= 100)
    assert running.stop() == 0
    outcome = load.stop()
    assert set(outcome) == {"served", "refused"}, outcome
    assert outcome["refused"] == 6
    assert drained(running, aborted=0)


def test_new_clients_during_a_drain_are_refused_and_a_successor_can_bind_the_port(service, wait_for) -> None:
    running = service(TCP)
    with greeted(("127.0.0.1", running.port)) as client:
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=1, seconds=30)

        def refused() -> bool:
            # Or served, if the event was read before the listener was closed.
            try:
                greeted(("127.0.0.1", running.port)).close()
            except ConnectionRefusedError:
                return True
            return False

        wait_for(refused)
        other = service(f"--listen=tcp:{running.port}:interface=127.0.0.1")
        with greeted(("127.0.0.1", running.port)) as newcomer:
            echoed(newcomer, b"to the successor")
        echoed(client, b"still here")
    assert running.process.wait(DEADLINE) == 0
    assert drained(running, aborted=0)
    assert other.stop() == 0


def test_connections_stay_open_during_a_drain_which_ends_with_the_last_one(service, tmp_path) -> None:
    running = service(TCP, UNIX)
    clients = [greeted(address) for address in [("127.0.0.1", running.port), f"{tmp_path}/s"] * 3]
    running.process.send_signal(signal.SIGTERM)
    running.wait_event("drain.started", count=6)
    for client in clients:
        for _ in range(10):
            echoed(client, os.urandom(100_000))
        client.close()
    assert running.process.wait(DEADLINE) == 0
    assert drained(running, ended=6, aborted=0)


def test_the_drain_timeout_closes_open_connections_and_completes_the_drain(service, read_all) -> None:
    running = service(TCP, "--drain-timeout=0.5")
    with greeted(("127.0.0.1", running.port)) as client:
        echoed(client, b"x")
        assert running.stop() == 0
        assert read_all(client) == b""  # and no reset
    assert drained(running, ended=1, aborted=0)
    running.wait_event("connection.closed", bytes_in=1, bytes_out=23, reason="drained")


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_drain_and_sets_the_exit_status(service, wait_for, sig) -> None:
    running = service(TCP)
    with greeted(("127.0.0.1", running.port)) as client:
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=1)

        def counted() -> bool:
            # Signals within half a second of the first are ignored as duplicates.
            running.process.send_signal(sig)
            return any(event["event"] == "stop.repeated" and event["signal"] == sig.name for event in running.events)

        wait_for(counted)
        assert running.process.wait(DEADLINE) == 128 + sig
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert drained(running, ended=0, aborted=1)
    running.wait_event("connection.closed", bytes_in=0, bytes_out=22, reason="cut off")
    assert not any("Traceback" in line for line in running.lines)


def test_two_different_signals_at_once_end_the_drain(service, wait_for) -> None:
    running = service(TCP)
    with greeted(("127.0.0.1", running.port)):
        freeze(running.process.pid, wait_for)
        running.process.send_signal(signal.SIGTERM)
        running.process.send_signal(signal.SIGINT)
        running.process.send_signal(signal.SIGCONT)
        assert running.process.wait(DEADLINE) in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert not any("Traceback" in line for line in running.lines)
    assert drained(running, ended=0, aborted=1)


def with_full_buffers(address) -> tuple[socket.socket, bytes]:
    """Return a client that has filled all buffers without reading, and the data that it sent."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    client.settimeout(1)  # if nothing can be sent for so long, every buffer on the path is full
    client.connect(address)
    data = random.randbytes(64 << 10) * 320
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += client.send(memoryview(data)[sent : sent + (64 << 10)])
    assert sent < len(data)
    client.settimeout(DEADLINE)
    return client, data[:sent]


def not_read_by_the_server(client: socket.socket) -> int:
    """Return the number of bytes that the server has not read: those in the send queue and in its receive queue."""
    waiting = int.from_bytes(fcntl.ioctl(client, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    here, there = client.getsockname()[1], client.getpeername()[1]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if (int(local[-4:], 16), int(remote[-4:], 16)) == (there, here):
            return waiting + int(queues.partition(":")[2], 16)
    raise AssertionError("/proc/net/tcp has no entry for the server's socket")


def test_a_client_that_never_reads_is_aborted_at_the_end_of_the_drain(service) -> None:
    running = service(TCP, "--drain-timeout=0.2")
    client, _ = with_full_buffers(("127.0.0.1", running.port))
    with client:
        assert running.stop() == 0
    assert drained(running, ended=0, aborted=1)
    assert running.events[-1]["seconds"] < 12
    running.wait_event("connection.closed", reason="stopped reading")


def test_a_slow_reader_receives_all_buffered_data_during_a_drain(service) -> None:
    running = service(TCP, "--drain-timeout=0")
    client, sent = with_full_buffers(("127.0.0.1", running.port))
    with client:
        expected = GREETING + sent[: len(sent) - not_read_by_the_server(client)]
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=1, seconds=0)
        received = bytearray()
        pause = threading.Event()
        while piece := client.recv(len(expected) // 400):  # takes longer than the timeout for peers that stop reading
            received += piece
            pause.wait(0.02)
        assert received == expected
    assert running.process.wait(DEADLINE) == 0
    assert drained(running, ended=1, aborted=0)
    running.wait_event("connection.closed", bytes_out=len(expected), reason="drained")


def test_a_large_greeting_reaches_200_of_200_half_closed_clients(service, tmp_path, wait_for, read_all) -> None:
    text = random.randbytes(2 << 20).hex()
    (tmp_path / "rt.toml").write_text(f"greeting = '{text}'\nlisten = ['tcp:0:interface=127.0.0.1']\n")
    running = service("--config=rt.toml")
    complete = 0
    for _ in range(10):
        freeze(running.process.pid, wait_for)
        clients = [connect(("127.0.0.1", running.port)) for _ in range(20)]
        for client in clients:
            client.shutdown(socket.SHUT_WR)
        running.process.send_signal(signal.SIGCONT)
        for client in clients:
            with client:
                complete += read_all(client) == text.encode()
    assert complete == 200


# --- ways to stop a service ---


@pytest.fixture
def endpoints(tmp_path, environment) -> None:
    """Install the plugin endpoints_of_the_test, whose endpoints act at SIGUSR2."""
    copy_plugin("endpoints_of_the_test", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)


def test_reactor_stop_starts_a_drain(service, endpoints) -> None:
    running = service(TCP, "--listen=stopper:")
    running.wait_event("listener.listening", listener=re.compile("^stopper:"))
    with greeted(("127.0.0.1", running.port)) as client:
        running.process.send_signal(signal.SIGUSR2)
        running.wait_event("drain.started", count=1)
        echoed(client, b"still here")
    assert running.process.wait(DEADLINE) == 0
    assert drained(running, ended=1, aborted=0)


def test_a_service_under_twist_drains(environment, tmp_path) -> None:
    twist = os.path.join(os.path.dirname(sys.executable), "twist")
    command = [twist, "--log-format=text", "rtservice", UNIX]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any("listening on" in line for line in process.stdout)
        with greeted(f"{tmp_path}/s") as client:
            process.send_signal(signal.SIGTERM)
            assert any("open connections: 1" in line for line in process.stdout)
            echoed(client, b"still here")
        output = process.communicate(timeout=DEADLINE)[0]
    assert process.returncode == 0
    assert "drained: 1 ended, 0 aborted, " in output


def test_a_daemon_drains(run, tmp_path, wait_for) -> None:
    assert run("--pidfile=d.pid", "--logfile=d.log", "rtservice", UNIX).returncode == 0
    pid = int(wait_for(lambda: (tmp_path / "d.pid").exists() and (tmp_path / "d.pid").read_text()))
    try:
        with greeted(f"{tmp_path}/s") as client:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: "open connections: 1" in (tmp_path / "d.log").read_text())
            echoed(client, b"still here")
            assert not (tmp_path / "s").exists()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM) if "draining" not in (tmp_path / "d.log").read_text() else None
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert "drained: 1 ended, 0 aborted, " in (tmp_path / "d.log").read_text()
    assert not (tmp_path / "d.pid").exists()


def test_two_listeners_that_fail_late_are_one_failure_with_exit_status_1(service, endpoints) -> None:
    running = service(TCP, "--listen=broken:", "--listen=broken:")
    with greeted(("127.0.0.1", running.port)):
        running.process.send_signal(signal.SIGUSR2)
        assert running.process.wait(DEADLINE) == 1
    assert len(recorded(running.events, "start.failed", problem="--listen broken:: broken by design")) == 1
    assert not any("Traceback" in line for line in running.lines)


# --- passed sockets ---


def passing(*sockets: socket.socket) -> dict:
    """Return arguments with which `service` passes these sockets, as a service manager does."""
    fds = [sock.fileno() for sock in sockets]
    launcher = program("pass_sockets", "", ",".join(map(str, fds)))
    return {"launcher": launcher, "pass_fds": tuple(fds)}


@pytest.fixture
def held(tmp_path):
    """A listening TCP and a listening UNIX socket that stay open between services."""
    with socket.create_server(("127.0.0.1", 0), backlog=1000) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{tmp_path}/held")
        unix.listen(1000)
        yield tcp, unix


def test_restarts_under_load_with_passed_sockets_refuse_and_reset_no_client(service, held, wait_for) -> None:
    addresses = [sock.getsockname() for sock in held]
    running = service("--listen=systemd:", **passing(*held))
    load = Load(addresses * 3)

    def served_more() -> None:
        before = load.outcome["served"]
        wait_for(lambda: load.outcome["served"] >= before + 50)

    for _ in range(4):
        served_more()
        assert running.stop() == 0
        assert drained(running, aborted=0)
        running = service("--listen=systemd:", **passing(*held))
    served_more()
    outcome = load.stop()
    assert set(outcome) == {"served"}, outcome
    assert running.stop() == 0


def test_the_backlog_of_a_passed_socket_is_left_to_the_successor(service, held, wait_for, read_all) -> None:
    running = service("--listen=systemd:", **passing(*held))
    freeze(running.process.pid, wait_for)
    clients = [connect(sock.getsockname()) for sock in held for _ in range(50)]
    # The signal is pending before the reactor polls the sockets: accepting continues until it is handled.
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGCONT)
    served = threading.Thread(target=service, args=("--listen=systemd:",), kwargs=passing(*held))
    served.start()
    for client in clients:
        with client:
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == GREETING + b"hello"
    served.join(DEADLINE)
    assert running.process.wait(DEADLINE) == 0


def test_a_service_without_clients_on_passed_sockets_drains_at_once(service, held) -> None:
    running = service("--listen=systemd:", **passing(*held))
    running.wait_event("listener.listening", 2)
    assert running.stop() == 0
    assert drained(running, ended=0, aborted=0, seconds=0.0)


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd-socket-activate (Debian: systemd) is not installed",
)
@pytest.mark.parametrize(
    ("names", "listen"),
    [
        (["--fdname=web:local"], ["--listen=systemd:name=web", "--listen=systemd:name=local"]),
        (["--fdname=rt:rt"], ["--listen=systemd:name=rt"]),
        ([], ["--listen=systemd:index=0", "--listen=systemd:UNIX:index=1"]),
        ([], ["--listen=systemd:"]),
    ],
    ids=["named", "one-name", "numbered", "all"],
)
def test_systemd_socket_activate_passes_both_sockets_and_the_first_client(
    service, tmp_path, wait_for, names, listen
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    path = f"{tmp_path}/activated"
    first: list[socket.socket] = []

    def connect_first() -> None:
        # The first connection activates the service.
        wait_for(lambda: os.path.exists(path))
        first.append(greeted(path))

    client_thread = threading.Thread(target=connect_first)
    client_thread.start()
    activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{address[1]}", "-l", path, *names]
    running = service(*listen, launcher=[*activate, "-E", "PYTHONUNBUFFERED=1"])
    running.wait_event("listener.listening", 2)
    client_thread.join(DEADLINE)
    with greeted(address) as second:
        echoed(second, b"over TCP")
        echoed(first[0], b"over UNIX")
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=2)
        echoed(second, b"still here")
        first[0].close()
    assert running.process.wait(DEADLINE) == 0
    assert os.path.exists(path)


# --- the service manager ---


def test_ready_is_sent_first_and_once_every_listener_accepts(service, endpoints, manager, tmp_path, wait_for) -> None:
    running = service(TCP, UNIX, "--listen=late:", NOTIFY_SOCKET=manager.address)
    running.wait_event("listener.listening", listener=re.compile("^unix:"))
    with greeted(("127.0.0.1", running.port)):  # one listener is not accepting yet
        assert manager.messages == []
        asked = time.monotonic()
        running.process.send_signal(signal.SIGUSR2)
        wait_for(lambda: manager.messages)
        running.wait_event("listener.listening", listener=re.compile("^late:"))
        assert manager.messages[0] == "READY=1\nSTATUS=serving: 1 connection open"
        assert manager.times[0] >= asked
        greeted(f"{tmp_path}/s").close()
    assert running.stop() == 0


def test_the_service_manager_receives_status_reload_and_stop_in_order(service, manager, tmp_path, wait_for) -> None:
    running = service(TCP, NOTIFY_SOCKET=manager.address)
    clients = [greeted(("127.0.0.1", running.port)) for _ in range(3)]
    wait_for(lambda: manager.has("^STATUS=serving: 3 connections open$"))
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    running.process.send_signal(signal.SIGHUP)
    wait_for(lambda: manager.has("^READY=1", since=1))
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000

    seen = len(manager.messages)
    running.process.send_signal(signal.SIGTERM)
    # One at the start, then one per tick.
    wait_for(lambda: len([m for m in manager.messages if m.startswith("EXTEND")]) >= 3)
    for client in clients:
        client.close()
    assert running.process.wait(DEADLINE) == 0

    serving, draining = manager.messages[:seen], manager.messages[seen:]
    changes = [message for message in serving if not message.startswith("STATUS=")]
    assert [message.partition("\n")[0] for message in changes] == ["READY=1", "RELOADING=1", "READY=1"]
    reloading = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", changes[1])
    assert reloading is not None
    assert before <= int(reloading[1]) <= after
    # A status may have been sent just before the signal was handled.
    if draining[0].startswith("STATUS=serving"):
        del draining[0]
    assert draining[0] == "STOPPING=1\nSTATUS=draining: 3 connections open"
    assert draining[1] == "EXTEND_TIMEOUT_USEC=60000000"  # --drain-timeout plus the time for flushing
    assert set(draining[2:]) == {"STATUS=draining: 3 connections open", "EXTEND_TIMEOUT_USEC=30000000"}


def test_watchdog_notifications_come_at_half_the_interval_and_stop_with_the_process(service, manager, wait_for) -> None:
    running = service(TCP, NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="500000")

    def beats() -> list[float]:
        return [when for when, what in zip(manager.times, manager.messages, strict=False) if what == "WATCHDOG=1"]

    def next_beats(count: int) -> list[float]:
        before = len(beats())
        return wait_for(lambda: len(beats()) >= before + count and beats()[before : before + count])

    times = next_beats(9)
    gaps = sorted(later - sooner for sooner, later in itertools.pairwise(times))
    assert 0.24 < gaps[len(gaps) // 2] < 0.3

    freeze(running.process.pid, wait_for)
    seen = len(beats())
    threading.Event().wait(1)  # four notifications are due
    assert len(beats()) <= seen + 1  # one may have been in flight
    running.process.send_signal(signal.SIGCONT)
    next_beats(2)

    with greeted(("127.0.0.1", running.port)):
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.started", count=1)
        next_beats(3)
    assert running.process.wait(DEADLINE) == 0
