"""The status server of real processes: its values match the counts of clients, from the start to the end of a drain."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.deadline import DEADLINE
from tests.support.hosted import copy_hosted
from tests.support.listen_options import TCP


def address(service: Any) -> str:
    """Return the URL of the status server."""
    return f"http://{service.wait_event('status.listening')['listener'].rpartition('tcp:')[2]}"


def ask(url: str) -> tuple[int, str]:
    """Return the status and body of a response."""
    try:
        with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def status(service: Any, query: str = "") -> Any:
    return json.loads(ask(f"{address(service)}/status.json{query}")[1])


def samples(service: Any) -> dict[str, float]:
    """Return the samples of a scrape, by name with labels."""
    lines = ask(f"{address(service)}/metrics")[1].splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def total(found: dict[str, float], name: str) -> float:
    """Return the sum of a metric over all labels."""
    return sum(value for key, value in found.items() if key.partition("{")[0] == name)


def exchange(service: Any, size: int) -> None:
    """Send so many bytes on a new connection, and read the echo to the end."""
    with service.connect() as client:
        client.sendall(b"x" * size)
        client.shutdown(socket.SHUT_WR)
        received = 0
        while data := client.recv(1 << 16):
            received += len(data)
    assert received == size + 22


class Scraper:
    """Scrapes repeatedly, and records each total that decreased."""

    def __init__(self, service: Any) -> None:
        self.decreased: list[tuple[str, float, float]] = []
        self.scrapes = 0
        self._service = service
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        before: dict[str, float] = {}
        while not self._stop.wait(0.05):
            now = samples(self._service)
            self.scrapes += 1
            for name, value in before.items():
                if re.search(r"_(total|bucket|sum|count)($|\{)", name) and now.get(name, -1.0) < value:
                    self.decreased.append((name, value, now.get(name, -1.0)))
            before = now

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(DEADLINE)


@pytest.fixture
def scraper() -> Iterator[Callable[[Any], Scraper]]:
    """Start scrapers; stop them at the end."""
    started: list[Scraper] = []

    def start(service: Any) -> Scraper:
        started.append(Scraper(service))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def test_status_server_listens_on_loopback_by_default(service: Callable[..., Any]) -> None:
    assert address(service(TCP, "--status", "tcp:0")).startswith("http://127.0.0.1:")
    assert address(service(TCP, "--status", "0")).startswith("http://127.0.0.1:")
    assert address(service(TCP, "--status", "tcp:0:interface=0.0.0.0")).startswith("http://0.0.0.0:")


def test_status_server_can_listen_on_a_unix_socket(service: Callable[..., Any], tmp_path: Any) -> None:
    running = service(TCP, "--status", f"unix:{tmp_path}/status:mode=600")
    running.wait_event("status.listening", listener=re.compile("^unix:"))
    assert os.stat(tmp_path / "status").st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/status")
        client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200 OK\r\n")
    assert running.stop() == 0
    assert not (tmp_path / "status").exists()


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("proxy:tcp:1", "the status server does not accept PROXY headers; remove proxy:"),
        ("onion:1", "unknown type 'onion'; accepted are 8080, "),
        ("tcp:x", "port 'x' is not a whole number"),
        ("unix:/nowhere/at/all", "No such file or directory"),
    ],
)
def test_an_invalid_status_description_is_one_error_line(run, description: str, problem: str) -> None:
    ended = run("--nodaemon", "--pidfile=", "rtservice", TCP, "--status", description)
    assert ended.returncode != 0
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"rtservice: --status {description}: ")
    assert problem.lower() in line.lower()


def test_a_status_port_in_use_is_one_error_line(run, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = run("--nodaemon", "--pidfile=", "rtservice", TCP, "--status", f"tcp:{port}")
    assert ended.returncode != 0
    [line] = ended.stderr.splitlines()
    assert f"--status tcp:{port}: " in line


@pytest.mark.parametrize("workers", [1, 2])
def test_totals_match_the_counts_of_the_clients(service: Callable[..., Any], wait_for, workers: int) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", str(workers))
    sizes = [1, 100, 5000, 70_000] * 10
    for size in sizes:
        exchange(running, size)
    with running.connect() as client:
        client.sendall(b"y" * 1000)
        received = 0
        while received < 1022:
            received += len(client.recv(2000))
        found = wait_for(
            lambda: (
                (now := samples(running)) and total(now, "rtservice_received_bytes_total") == sum(sizes) + 1000 and now
            )
        )
        assert total(found, "rtservice_sent_bytes_total") == sum(sizes) + 1000 + 22 * 41
        assert total(found, "rtservice_connections_opened_total") == 41
        assert total(found, "rtservice_connections_closed_total") == 40
        assert total(found, "rtservice_connections") == 1
        assert total(found, "rtservice_connection_duration_seconds_count") == 40
        [row] = status(running)["connections"]["rows"]
        host, port = client.getsockname()
        assert (row["peer"], row["bytes_in"], row["bytes_out"]) == (f"{host}:{port}", 1000, 1022)


def test_refused_connections_and_failed_handshakes_are_counted_by_kind(
    service: Callable[..., Any], certificates, wait_for
) -> None:
    tls = f"ssl:0:interface=127.0.0.1:privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    running = service("--listen", tls, "--status", "tcp:0", "--at-limit", "reject", "--max-connections", "1")
    with running.connect() as client:
        wait_for(lambda: total(samples(running), "rtservice_connections") == 1)
        with running.connect() as refused:
            assert refused.recv(100) == b""
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while client.recv(100):
                pass
    found = wait_for(
        lambda: (now := samples(running)) and total(now, "rtservice_connections_closed_total") == 1 and now
    )
    listener = running.wait_event("listener.listening", listener=re.compile("^ssl:"))["listener"]

    def value(name: str, **labels: str) -> float:
        labels |= {"listener": listener}
        shown = ",".join(f'{label}="{labels[label]}"' for label in sorted(labels))
        return found[f"rtservice_{name}{{{shown}}}"]

    assert value("connections_refused_total", reason="max-connections", worker="0") == 1
    assert value("handshake_failures_total", kind="HTTP_REQUEST", worker="0") == 1
    assert value("connections_closed_total", reason="TLS failed", worker="0") == 1
    days = (value("certificate_expiry_timestamp_seconds") - status(running)["time"]) / 86400
    assert 88 < days < 91


@pytest.mark.parametrize("workers", [1, 2])
def test_readiness_ends_when_a_drain_starts_and_the_status_server_when_it_ends(
    service: Callable[..., Any], wait_for, workers: int
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", str(workers), "--drain-timeout", "60")
    with running.connect() as client:
        client.recv(100)
        assert ask(f"{address(running)}/readyz")[0] == 200
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("stop.requested", signal="SIGTERM")
        assert ask(f"{address(running)}/readyz")[0] == 503
        assert ask(f"{address(running)}/healthz")[0] == 200
        assert samples(running)['rtservice_state{state="draining"}'] == 1
        wait_for(lambda: len(status(running)["connections"]["rows"]) == 1)
    assert running.process.wait(DEADLINE) == 0
    with pytest.raises(urllib.error.URLError):
        ask(f"{address(running)}/healthz")


def test_totals_never_decrease_when_workers_are_replaced_killed_or_removed(
    service: Callable[..., Any], wait_for, scraper
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", "3", "--drain-timeout", "1")
    scraping = scraper(running)
    opened = 0

    def make_connections(count: int = 30) -> None:
        nonlocal opened
        for _ in range(count):
            exchange(running, 1000)
        opened += count
        wait_for(lambda: total(samples(running), "rtservice_connections_opened_total") == opened)

    def ready(count: int) -> bool:
        found = [worker["phase"] for worker in status(running, "?limit=0")["workers"]]
        return found.count("ready") == count

    make_connections()
    running.process.send_signal(signal.SIGHUP)
    running.wait_event("reload.done")
    make_connections()
    with ExitStack() as clients:
        for _ in range(12):
            clients.enter_context(running.connect()).recv(100)
        opened += 12
        victim = wait_for(
            lambda: next(
                (
                    worker["pid"]
                    for worker in status(running)["workers"]
                    if total(samples(running), "rtservice_connections") == 12
                    and sum(sum(kept["phase"].values()) for kept in worker["counters"]["listeners"].values())
                ),
                None,
            )
        )
        os.kill(victim, signal.SIGKILL)
        running.wait_event("worker.killed", pid=victim)
        wait_for(lambda: ready(3))
    make_connections()
    running.process.send_signal(signal.SIGTTOU)
    running.wait_event("slot.removed", slot=2)
    make_connections()
    running.process.send_signal(signal.SIGTTIN)
    wait_for(lambda: ready(3))
    make_connections()
    scraping.stop()
    found = wait_for(lambda: (now := samples(running)) and total(now, "rtservice_connections") == 0 and now)
    assert scraping.scrapes > 20
    assert scraping.decreased == []
    assert total(found, "rtservice_connections_closed_total") == opened
    lost = sum(count for name, count in found.items() if 'reason="worker ended"' in name)
    assert 1 <= lost <= 12
    assert sum(count for name, count in found.items() if 'reason="SIGKILL"' in name) == 1
    assert total(found, "rtservice_worker_starts_total") == 8


@pytest.mark.parametrize("workers", [1, 2])
def test_protocol_metrics_are_exported_and_totals_outlive_workers(
    service: Callable[..., Any], wait_for, environment, tmp_path, workers: int
) -> None:
    copy_hosted("counting", tmp_path)
    environment["PYTHONPATH"] = "."
    running = service(TCP, "--protocol=counting:Counts", "--status", "tcp:0", "--workers", str(workers))

    def exported(here: float, heard: float) -> bool:
        now = samples(running)
        found = [total(now, f"rtservice_protocol_{name}") for name in ("here", "heard_total")]
        return found == [here, heard]

    with ExitStack() as clients:
        for count in range(1, 11):
            client = clients.enter_context(running.connect())
            assert client.recv(100) == b"here"
            client.sendall(b"x" * count)
        assert wait_for(lambda: exported(10, 55))
        running.process.send_signal(signal.SIGHUP)
        running.wait_event("reload.started")
        assert wait_for(lambda: exported(10, 55))  # including draining workers
    assert wait_for(lambda: exported(0, 55))
    with running.connect() as client:
        client.sendall(b"five!")
        assert wait_for(lambda: exported(1, 60))
        per_worker = [worker["counters"]["protocol"] for worker in status(running)["workers"]]
        assert sum(each["heard_total"] for each in per_worker) == 60
    invalid = re.compile("name 'not a name': not valid")
    running.wait_event("factory.metrics_rejected", workers, factory="Counts", problem=invalid)


def test_connections_of_all_workers_are_listed_and_a_silent_worker_is_reported(
    service: Callable[..., Any], wait_for
) -> None:
    running = service(TCP, "--status", "tcp:0", "--workers", "2")
    with ExitStack() as clients:
        sockets = [clients.enter_context(running.connect()) for _ in range(20)]
        for place, client in enumerate(sockets):
            client.sendall(b"x" * (place + 1))
            client.recv(100)
        rows = wait_for(lambda: len(found := status(running, "?sort=-bytes_in")["connections"]["rows"]) == 20 and found)
        assert [row["bytes_in"] for row in rows] == list(range(20, 0, -1))
        assert {row["worker"] for row in rows} == {0, 1}
        page = status(running, "?sort=-bytes_in&offset=5&limit=3")["connections"]["rows"]
        assert [row["bytes_in"] for row in page] == [15, 14, 13]
        stopped = status(running)["workers"][1]["pid"]
        os.kill(stopped, signal.SIGSTOP)
        found = wait_for(lambda: (now := status(running)["connections"])["missing"] and now)
        assert found["missing"] == [1]
        assert {row["worker"] for row in found["rows"]} == {0}
        os.kill(stopped, signal.SIGCONT)
        assert wait_for(lambda: not (found := status(running)["connections"])["missing"] and len(found["rows"]) == 20)


def test_status_connections_are_limited_and_do_not_affect_the_service(service: Callable[..., Any], wait_for) -> None:
    running = service(TCP, "--status", "tcp:0", "--max-connections", "5")
    where = address(running).removeprefix("http://").split(":")
    with ExitStack() as clients:
        crowd = [
            clients.enter_context(socket.create_connection((where[0], int(where[1])), timeout=DEADLINE))
            for _ in range(150)
        ]
        wait_for(lambda: len(select.select(crowd, [], [], 0)[0]) == 50)  # the excess connections are closed
        with running.connect() as client:
            assert client.recv(100) == b"Hello from the server!"
    wait_for(lambda: ask(f"{address(running)}/healthz")[0] == 200)


def code(service: Any, host: str) -> int:
    """Return the status of a response to a request with this Host header."""
    asked = urllib.request.Request(f"{address(service)}/healthz", headers={"Host": host})
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(asked, timeout=DEADLINE) as answer:
        return int(answer.status)
    return 421


@pytest.mark.parametrize("workers", [1, 2])
def test_status_host_is_applied_and_reloaded(service: Callable[..., Any], tmp_path: Any, workers: int) -> None:
    config = tmp_path / "rt.toml"
    config.write_text('status-host = "web-1"')
    where = ("--status", "tcp:0:interface=localhost", "--config", str(config))
    running = service(TCP, *where, "--workers", str(workers))
    served = [
        host for host in ("web-1:9090", "web-2", "localhost", "127.0.0.1", "[::1]:1") if code(running, host) == 200
    ]
    assert served == ["web-1:9090", "localhost", "127.0.0.1", "[::1]:1"]
    config.write_text('status-host = "web-2,web-3."')
    running.reload()
    running.wait_event("settings.reloaded", settings="status-host")
    assert [code(running, host) for host in ("web-1", "web-2", "WEB-3")] == [421, 200, 200]


def test_check_validates_the_status_description(run) -> None:
    ended = run("--nodaemon", "--pidfile=", "rtservice", TCP, "--check", "--status", "tcp:x")
    assert ended.returncode != 0
    assert ended.stderr.startswith("rtservice: --status tcp:x: port 'x' is not")
    assert run("--nodaemon", "--pidfile=", "rtservice", TCP, "--check", "--status", "9090").returncode == 0
