"""The hub in a real service of one process."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import RTSERVICE
from tests.support.hosted import copy_hosted
from tests.support.listen_options import TCP
from tests.support.processes import children

BROADCAST = ("--protocol=broadcast:Broadcast", TCP)
STATUS = "--status=tcp:0"
SECRET = "hunter2"
# No server listens on this port.
URL = f"redis://user:{SECRET}@127.0.0.1:1/3"
SHOWN = "redis://<hidden>@127.0.0.1:1/3"
needs_hiredis = pytest.mark.skipif(find_spec("hiredis") is None, reason="hiredis (extra redis) is not installed")


@pytest.fixture(autouse=True)
def broadcast(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("broadcast", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)


class Client:
    """A client of the hosted protocol. It is subscribed when it is made."""

    def __init__(self, running: Any, buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(30)
        self.socket.connect(("127.0.0.1", running.port))
        self._lines = self.socket.makefile("rb")
        assert self.line() == b"ready"

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lines.close()
        self.socket.close()

    def send(self, *lines: bytes) -> None:
        self.socket.sendall(b"".join(line + b"\n" for line in lines))

    def line(self) -> bytes:
        return self._lines.readline().removesuffix(b"\n")


def get(running: Any, path: str) -> tuple[int, str]:
    port = running.wait_event("status.listening")["listener"].rpartition(":")[2]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_each_client_gets_the_lines_of_all_in_the_same_order(service) -> None:
    running = service(*BROADCAST)
    with Client(running) as one, Client(running) as two:
        expected = [b"%d" % number for number in range(200)]
        one.send(*expected)
        assert [one.line() for _ in expected] == [two.line() for _ in expected] == expected
        two.send(b"last")
        assert one.line() == two.line() == b"last"
    assert running.stop() == 0


def test_a_client_that_does_not_read_delays_no_other_client(service) -> None:
    running = service(*BROADCAST)
    with Client(running, buffer=4096) as slow, Client(running) as sender, Client(running) as other:
        text = b"x" * 8000
        for number in range(500):  # 4 MB, far more than the socket buffers of the slow client hold
            line = b"%d %s" % (number, text)
            sender.send(line)
            assert sender.line() == other.line() == line
        # It has lost nothing.
        assert [slow.line().partition(b" ")[0] for _ in range(500)] == [b"%d" % number for number in range(500)]
    assert running.stop() == 0


def test_a_service_stops_while_clients_are_subscribed(service) -> None:
    running = service(*BROADCAST, "--drain-timeout=0")
    with Client(running) as one, Client(running) as two:
        one.send(b"hello")
        assert one.line() == two.line() == b"hello"
        assert running.stop() == 0
    assert [record for record in running.records if record.get("log_level") in ("warn", "error", "critical")] == []


@pytest.mark.parametrize("workers", [1, 2])
def test_the_status_and_the_metrics_show_the_hub(service, wait_for, workers) -> None:
    pytest.importorskip("prometheus_client")
    running = service(*BROADCAST, STATUS, f"--workers={workers}", "--hub-required")
    with Client(running) as one:
        one.send(b"hello")
        assert one.line() == b"hello"

        def hubs() -> list[dict[str, Any]]:
            return [worker["counters"]["hub"] for worker in json.loads(get(running, "/status.json")[1])["workers"]]

        def are_complete() -> bool:
            found = hubs()
            totals = {
                name: sum(hub.get(name, 0) for hub in found) for name in ("delivered", "published", "subscriptions")
            }
            up = [hub.get("up") for hub in found]
            return up == [1] * workers and totals == {"delivered": 1, "published": 1, "subscriptions": 1}

        # Each worker sends its counters once a second, and an answer is kept for a second. A worker sends the first
        # ones before its hub is up.
        wait_for(are_complete)
        _, metrics = get(running, "/metrics")
        assert len(re.findall(r"^rtservice_hub_up\{.*\} 1\.0$", metrics, re.MULTILINE)) == workers
        assert get(running, "/readyz")[0] == 200
    assert running.stop() == 0


# --- the settings ---


@needs_hiredis
@pytest.mark.parametrize("workers", [1, 2])
def test_a_required_hub_without_a_connection_makes_the_service_unready(service, workers) -> None:
    running = service(*BROADCAST, STATUS, f"--workers={workers}", "--hub-required", RTSERVICE_HUB=URL)
    status, body = get(running, "/readyz")
    assert status == 503
    assert "the hub has no connection" in body
    assert get(running, "/healthz")[0] == 200
    assert json.loads(get(running, "/status.json")[1])["state"] == "serving"
    assert running.stop() == 0


@needs_hiredis
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("source", ["environment", "file"])
def test_a_password_of_the_hub_appears_in_no_output(service, tmp_path, workers, source) -> None:
    (tmp_path / "hub").write_text(f"{URL}\n")
    given = ("--hub-file=hub",) if source == "file" else ()
    variables = {} if source == "file" else {"RTSERVICE_HUB": URL}
    running = service(
        *(*BROADCAST, STATUS, f"--workers={workers}", "--log-level=debug,twisted=debug", *given),
        twistd=("--rundir=.",),
        **variables,
    )
    assert get(running, "/readyz")[0] == 200
    settings = json.loads(get(running, "/status.json")[1])["settings"]
    assert (settings["hub"], settings["hub-file"]) == (("", "hub") if source == "file" else (SHOWN, ""))
    assert not any(SECRET in get(running, path)[1] for path in ("/", "/status.json", "/metrics", "/nowhere"))
    for pid in (running.process.pid, *children(running.process.pid)):
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for pid in children(running.process.pid):
        assert b"RTSERVICE_HUB" not in Path(f"/proc/{pid}/environ").read_bytes()
    # The log of a reload.
    (tmp_path / "hub").write_text(f"{URL}x{SECRET}\n")
    running.reload()
    assert running.stop() == 0
    assert not [line for line in running.lines if SECRET in line]
    assert not [record for record in running.records if record.get("event") == "hub.password_visible"]


@needs_hiredis
def test_a_password_on_the_command_line_is_a_warning_that_names_the_alternatives(service) -> None:
    running = service(*BROADCAST, f"--hub={URL}")
    warning = running.wait_event("hub.password_visible")
    assert "RTSERVICE_HUB" in warning["message"]
    assert "--hub-file" in warning["message"]
    assert SECRET not in warning["message"]
    assert running.stop() == 0


@needs_hiredis
def test_a_protocol_that_does_not_use_the_hub_is_a_warning(service) -> None:
    running = service(TCP, STATUS, "--hub=redis://127.0.0.1:1", "--hub-required")
    assert running.wait_event("hub.unused")["factory"] == "EchoFactory"
    assert get(running, "/readyz")[0] == 200
    assert running.stop() == 0


@needs_hiredis
def test_new_workers_get_the_current_url_of_the_file(service, tmp_path) -> None:
    (tmp_path / "hub").write_text("redis://127.0.0.1:1")
    running = service(*BROADCAST, "--workers=2", "--hub-file=hub")
    assert running.reload()["event"] == "reload.done"
    (tmp_path / "hub").unlink()
    failed = running.reload()
    assert failed["event"] == "reload.failed"
    assert failed["problem"] == f"--hub-file: cannot read the file '{tmp_path}/hub': no such file or directory"
    (tmp_path / "hub").write_text(f"redis://{SECRET}@h")
    assert SECRET not in running.reload()["problem"]
    assert running.stop() == 0


@pytest.mark.parametrize("more", [[], ["--workers=2"], ["--check"], ["--check", "--workers=2"]], ids=" ".join)
@pytest.mark.parametrize(
    ("option", "content", "problem"),
    [
        (f"--hub=redis://u:{SECRET}@h:x", "", "--hub: the port of the hub is not a number from 1 to 65535"),
        (f"--hub={SECRET}", "", "--hub: the URL of the hub must begin with "),
        ("--hub-file=hub", "", "--hub-file: the file '{0}/hub' is empty; it must contain the URL of the hub"),
        (
            "--hub-file=hub",
            f"redis://{SECRET}@h",
            "--hub-file: the file '{0}/hub': the user of the hub has no ",
        ),
        ("--hub-file=none", "", "--hub-file: cannot read the file '{0}/none': no such file or directory"),
    ],
)
def test_an_invalid_url_is_one_error_line_without_its_secrets(run, tmp_path, more, option, content, problem) -> None:
    (tmp_path / "hub").write_text(content)
    result = run(*RTSERVICE, "--protocol=broadcast:Broadcast", option, "--listen=unix:s", *more)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"rtservice: {problem.format(tmp_path)}")
    assert result.stderr.count("\n") == 1
    assert SECRET not in result.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("more", [[], ["--workers=2"], ["--check"]], ids=" ".join)
def test_a_missing_library_is_one_error_line(run, tmp_path, more) -> None:
    (tmp_path / "hiredis.py").write_text("raise ImportError")
    result = run(*RTSERVICE, "--protocol=broadcast:Broadcast", "--hub=redis://h", TCP, *more)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "rtservice: --hub: the hub on Redis needs the package hiredis: pip install 'rtservice[redis]'\n"
    )


@needs_hiredis
def test_checking_a_valid_url_does_not_connect(run) -> None:
    result = run(*RTSERVICE, *BROADCAST, f"--hub={URL}", "--check")
    assert (result.returncode, result.stdout) == (0, "rtservice: the configuration is valid\n")
