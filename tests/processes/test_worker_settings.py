"""The start of a service with workers, and its settings."""

import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.support.clients import connect, echoes, greeted, is_greeted
from tests.support.listen_options import TCP
from tests.support.load import Load, assert_no_client_lost
from tests.support.processes import accepted_by, children


@pytest.mark.parametrize(
    "twistd", [["-n", "--pidfile="], ["--pidfile=d.pid", "--logfile=d.log"]], ids=["foreground", "daemon"]
)
def test_a_worker_that_cannot_start_fails_the_start_with_its_error(
    run, environment, broken_site, tmp_path, wait_for, twistd
) -> None:
    (tmp_path / "broken").touch()
    environment |= broken_site
    result = run(*twistd, "rtservice", "--workers=2", "--listen=unix:s")
    assert result.returncode == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[0] == "rtservice: --protocol echo: broken by design"
    assert len(result.stderr.splitlines()) == (1 if "-n" in twistd else 3)  # twistd prints the path of its log
    wait_for(lambda: not (tmp_path / "d.pid").exists())  # a daemon reports the problem before it exits
    assert not (tmp_path / "s").exists()


def test_a_failed_replacement_keeps_the_old_workers_serving(workers, broken_site, tmp_path) -> None:
    running = workers(TCP, **broken_site)
    pids = running.settled(2)
    with Load(port=running.service.port, short=8, long=8) as load:
        (tmp_path / "broken").touch()
        running.send(signal.SIGHUP)
        running.wait_event(
            "worker.not_replaced",
            problem=re.compile(r"^worker 0 \(pid \d+\) cannot take over: --protocol echo: broken by design$"),
        )
        load.more(50)
        assert running.settled(2) == pids
        (tmp_path / "broken").unlink()
        running.send(signal.SIGHUP)
        running.wait_event("reload.done", status=re.compile("^serving: 2 of 2 workers ready"))
        assert_no_client_lost(load.stop())
    assert not set(running.settled(2)) & set(pids)


def test_reload_with_an_invalid_setting_changes_nothing(workers, tmp_path) -> None:
    config = tmp_path / "rt.toml"
    config.write_text("idle-timeout = 60\n")
    running = workers("--config=rt.toml", TCP)
    pids = running.settled(2)
    config.write_text("idle-timeout = 1\nmax-connections = -1\n")
    running.send(signal.SIGHUP)
    assert "max-connections: '-1' is not" in running.wait_event("reload.failed")["problem"]
    assert running.settled(2) == pids
    with greeted(running.service.port) as client:
        config.write_text("idle-timeout = 1\nbacklog = 3\n")
        running.send(signal.SIGHUP)
        running.wait_event("settings.reloaded", settings="idle-timeout")
        running.wait_event("settings.need_restart", settings="backlog")
        running.wait_event("drain.started", 2)
        assert echoes(client)  # served by the old worker
    with greeted(running.service.port) as client:
        assert client.recv(1) == b""
    running.wait_event("connection.closed", reason="idle")
    assert running.stop() == 0


def test_workers_auto_starts_one_worker_per_available_cpu(workers, service) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("this machine has one CPU")
    running = workers("--workers=auto", TCP)
    running.settled(len(cpus))
    alone = service("--workers=auto", TCP, launcher=["taskset", "-c", str(cpus[0])])
    assert children(alone.process.pid) == []
    with alone.connect() as client:
        assert is_greeted(client)


def test_workers_inherit_the_interpreter_options(service) -> None:
    running = service("--workers=2", TCP, launcher=[sys.executable, "-O", "-W", "error::SyntaxWarning", "-X", "utf8"])
    for pid in children(running.process.pid):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        assert {b"-O", b"-Werror::SyntaxWarning"} <= {*command}
        assert command[command.index(b"-X") + 1] == b"utf8"


def test_max_connections_is_divided_among_the_workers(workers, wait_for) -> None:
    running = workers("--max-connections=7", "--at-limit=reject", TCP)
    port = running.service.port

    def fill(most: int) -> list[socket.socket]:
        """Connect 100 clients; return those that are served."""
        served: list[socket.socket] = []
        for _ in range(100):
            client = connect(port)
            with contextlib.suppress(ConnectionResetError):
                if is_greeted(client):
                    served.append(client)
                    continue
            client.close()
        assert len(served) == most
        return served

    served = fill(7)
    shares = sorted(len(accepted_by(pid, served)) for pid in running.settled(2))
    assert shares == [3, 4]
    running.wait_event("connection.refused", setting="max-connections")
    for client in served:
        client.close()
    wait_for(lambda: len(running.recorded("connection.closed")) == 7)
    running.send(signal.SIGTTIN)
    running.wait_event("worker.ready", slot=2)
    served = fill(7)
    assert sorted(len(accepted_by(pid, served)) for pid in running.settled(3)) == [2, 2, 3]
    for client in served:
        client.close()
