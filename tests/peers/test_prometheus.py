"""A real Prometheus scrapes the service under load; its values match the counts of the clients."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.deadline import DEADLINE

PROMETHEUS = shutil.which("prometheus")

pytestmark = pytest.mark.skipif(PROMETHEUS is None, reason="prometheus (Debian: prometheus) is not installed")


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[str], Callable[[str], float]]]:
    """Start a Prometheus that scrapes an address each second; return a function that evaluates a query."""
    started: list[subprocess.Popen[bytes]] = []

    def start(target: str) -> Callable[[str], float]:
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s}\n"
            f'scrape_configs: [{{job_name: rtservice, static_configs: [{{targets: ["{target}"]}}]}}]\n'
        )
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = [
            *(str(PROMETHEUS), f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data"),
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        with (tmp_path / "prometheus.log").open("wb") as log:
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))

        def ask(query: str) -> float:
            url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            try:
                with urllib.request.urlopen(url, timeout=DEADLINE) as answer:
                    found = json.load(answer)["data"]["result"]
            except OSError:  # it is not ready yet
                return -1.0
            return float(found[0]["value"][1]) if found else -1.0

        return ask

    yield start
    for process in started:
        process.terminate()
        process.wait(DEADLINE)


@pytest.mark.parametrize("workers", [1, 2])
def test_prometheus_values_match_the_counts_of_the_clients(
    service: Callable[..., Any], prometheus: Any, wait_for: Any, workers: int
) -> None:
    running = service("--listen", "tcp:0:interface=127.0.0.1", "--status", "tcp:0", "--workers", str(workers))
    ask = prometheus(running.wait_event("status.listening")["listener"].rpartition("tcp:")[2])
    wait_for(lambda: ask("rtservice_ready") == 1)
    wait_for(lambda: ask("sum(rtservice_connections_opened_total)") == 0)
    opened = sent = 0
    with ExitStack() as clients:
        kept = [clients.enter_context(running.connect()) for _ in range(5)]
        assert {client.recv(100) for client in kept} == {b"Hello from the server!"}
        opened += len(kept)
        # Load until Prometheus can compute its rate.
        while ask("sum(rate(rtservice_connections_opened_total[10s]))") <= 1:
            for _ in range(20):
                with running.connect() as client:
                    client.sendall(b"x" * 1000)
                    client.shutdown(socket.SHUT_WR)
                    while client.recv(1 << 16):
                        pass
                opened += 1
                sent += 1000
        wait_for(lambda: ask("sum(rtservice_connections)") == 5)
        wait_for(lambda: ask("sum(rtservice_connections_opened_total)") == opened)
        assert ask("sum(rtservice_connections_closed_total)") == opened - 5
        assert ask("sum(rtservice_received_bytes_total)") == sent
        assert ask("sum(rtservice_sent_bytes_total)") == sent + 22 * opened
        assert ask("sum(rtservice_connection_duration_seconds_count)") == opened - 5
        assert 0 < ask("sum(increase(rtservice_connections_opened_total[1m]))") < 3 * opened
    wait_for(lambda: ask("sum(rtservice_connections)") == 0)
