"""Hosted protocols in real processes: start, options, and containment of faulty protocols."""

import contextlib
import signal
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import RTSERVICE
from tests.support.hosted import copy_hosted
from tests.support.listen_options import TCP


@pytest.fixture
def good(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("good", tmp_path)
    environment["PYTHONPATH"] = "."


def exchange(running, data: bytes, read_all: Callable[[socket.socket], bytes]) -> bytes:
    with running.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


@pytest.mark.usefixtures("good")
def test_a_factory_starts_once_before_accepting_and_stops_after_the_last_connection(service) -> None:
    running = service("--protocol=good:Shouts", "--protocol-option=mark=?", TCP, "--listen=unix:s")
    with running.connect() as client:
        client.sendall(b"hi")
        assert client.recv(100) == b"HI?"
        running.stop()
        assert client.recv(100) == b"bye"
    messages = [record["message"] for record in running.records]
    order = [messages.index(word) for word in ("startFactory", "start", "drain", "stopFactory")]
    assert order == sorted(order)
    assert [messages.count(word) for word in ("startFactory", "start", "drain", "stopFactory")] == [1, 1, 1, 1]
    listening = next(number for number, line in enumerate(messages) if line.startswith("listening on"))
    assert messages.index("start") < listening < messages.index("drain")
    assert any(line.startswith("shouting at 127.0.0.1:") and line.endswith(", 1") for line in messages)
    record = next(number for number, line in enumerate(messages) if "bytes out" in line)
    assert record < messages.index("stopFactory")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_start_is_one_error_line_and_exit_status_1(run, workers) -> None:
    result = run(*RTSERVICE, "--protocol=good:Shouts", "--protocol-option=fails=true", TCP, f"--workers={workers}")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith("Shouts did not start: ConnectionRefusedError: no database at all")
    assert "Traceback" not in result.stdout
    assert "listening on" not in result.stdout


@pytest.mark.usefixtures("good")
def test_a_stop_cancels_an_unfinished_start(service) -> None:
    running = service("--protocol=good:Shouts", "--protocol-option=hangs=true", TCP, awaits='"message": "start"')
    running.stop()
    running.wait_line("start is cancelled")
    running.wait_line("stopFactory")
    assert not any("listening" in line or "Traceback" in line for line in running.lines)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["serve", "check"])
@pytest.mark.parametrize(
    ("source", "protocol", "problem"),
    [
        ("import nowhere_at_all", "bad:x", "bad cannot be imported: ModuleNotFoundError: No module named 'nowhere_at"),
        ("1 / 0", "bad:x", "bad cannot be imported: ZeroDivisionError: division by zero ("),
        ("", "bad:x", "bad has no attribute 'x'"),
        ("", "nowhere:x", "there is no module nowhere"),
    ],
)
def test_a_failed_import_is_one_error_line_and_exit_status_1(
    run, tmp_path, environment, workers, check, source, protocol, problem
) -> None:
    (tmp_path / "bad.py").write_text(source)
    environment["PYTHONPATH"] = "."
    result = run(*RTSERVICE, f"--protocol={protocol}", TCP, f"--workers={workers}", *check)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert f"--protocol {protocol}: {problem}" in line


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("check", [[], ["--check"]], ids=["serve", "check"])
def test_a_one_process_protocol_does_not_start_with_workers(run, check) -> None:
    result = run(*RTSERVICE, "--protocol=good:Alone", TCP, "--workers=2", *check)
    assert result.returncode == 1
    assert result.stderr.endswith("--workers has to be 1, not 2\n")
    assert result.stderr.count("\n") == 1


def test_the_list_of_protocols_is_printed(run) -> None:
    result = run(*RTSERVICE, "--protocol=help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "echo: Greets each client" in result.stdout


def test_workers_serve_new_code_after_a_reload(service, tmp_path, environment, read_all, wait_for) -> None:
    environment["PYTHONPATH"] = "."
    source = copy_hosted("changes", tmp_path)
    running = service("--protocol=changes:Says", TCP, "--workers=2")
    assert exchange(running, b"", read_all) == b"old code"
    source.write_text(source.read_text().replace("old code", "the new code"))
    running.process.send_signal(1)
    wait_for(lambda: sum(event["event"] == "worker.ended" for event in running.events) == 2)
    assert exchange(running, b"", read_all) == b"the new code"
    source.write_text("1 / 0")
    running.process.send_signal(1)
    running.wait_line("broken|ZeroDivisionError")
    assert exchange(running, b"", read_all) == b"the new code"
    assert running.stop() == 0


@pytest.mark.usefixtures("good")
def test_relative_paths_start_in_the_directory_of_the_command(service, tmp_path, environment, read_all) -> None:
    copy_hosted("files", tmp_path)
    running = service("--protocol=files:Shows", "--protocol-option=path=a/b", TCP, "--workers=2")
    assert exchange(running, b"", read_all) == bytes(tmp_path / "a" / "b")


@pytest.fixture
def bad(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("bad", tmp_path)
    environment["PYTHONPATH"] = "."


@pytest.mark.usefixtures("bad")
def test_a_client_without_a_protocol_is_closed_and_an_exception_affects_one_connection(service, read_all) -> None:
    running = service("--protocol=bad:Builds", TCP)
    for _ in range(2):
        with running.connect() as client:
            assert read_all(client) == b""
    with running.connect() as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        with running.connect() as other:
            other.sendall(b"raise")
            assert read_all(other) == b""
        client.sendall(b"after")
        assert client.recv(100) == b"after"
    running.wait_event("factory.failed", factory="Builds", method="buildProtocol")
    running.wait_event("protocol.failed", protocol="Raises", method="dataReceived")
    assert running.stop() == 0


@pytest.mark.usefixtures("bad")
def test_a_producer_that_never_unregisters_does_not_block_a_drain(service, read_all) -> None:
    running = service("--protocol=bad:Clings", TCP, "--drain-timeout=0.2")
    with running.connect() as client:
        assert client.recv(1) == b"x"
        assert running.stop() == 0
    running.wait_event("drain.done", ended=1, aborted=0)


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize("workers", [1, 2])
def test_blocking_the_reactor_is_logged_with_a_stack(service, workers) -> None:
    running = service("--protocol=bad:Raises", TCP, f"--workers={workers}")
    with running.connect() as client:
        client.sendall(b"block")
        assert client.recv(100) == b"block"
    blocked = running.wait_event("reactor.blocked")
    assert "in sleep_here" in blocked["stack"]
    assert running.stop() == 0


@pytest.fixture
def worse(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("worse", tmp_path)
    environment["PYTHONPATH"] = "."


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("workers", [1, 2])
def test_sys_exit_in_a_factory_does_not_end_the_process(service, workers) -> None:
    running = service(
        *("--protocol=worse:Exits", TCP, f"--workers={workers}", "--status=tcp:0", "--hang-timeout=2"),
        *("--drain-timeout=0.5",),
    )
    site = running.wait_event("status.listening")["listener"].rpartition("tcp:")[2]
    with urllib.request.urlopen(f"http://{site}/status.json", timeout=30) as answer:
        assert answer.status == 200
    running.wait_event("factory.failed", factory="Exits", method="metrics")
    with running.connect() as first, running.connect() as second:
        assert first.recv(100) == second.recv(100) == b"here"
        running.process.send_signal(signal.SIGTERM)
        for client in (first, second):
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        assert running.process.wait(30) == 0
    running.wait_event("factory.failed", factory="Exits", method="drain")
    running.wait_event("protocol.failed", 2, protocol="Leaves", method="drain")
    running.wait_event("factory.failed", factory="Exits", method="stopFactory")
    running.wait_event("drain.done")
    assert not any(event["event"] == "worker.hung" for event in running.events)


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("kind", ["tcp:0:interface=127.0.0.1", "unix:s"])
def test_a_producer_that_fails_at_connection_start_does_not_affect_the_listener(service, tmp_path, kind) -> None:
    running = service("--protocol=worse:Worse", f"--listen={kind}", "--max-connections=1")

    def connect() -> socket.socket:
        if kind != "unix:s":
            return running.connect()
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(f"{tmp_path}/s")
        return client

    for _ in range(2):
        with connect() as client, contextlib.suppress(ConnectionResetError):
            assert client.recv(100) in (b"one", b"")
            assert client.recv(100) == b""
    with connect() as client:
        assert client.recv(100) == b"good"
    assert running.stop() == 0
    assert running.wait_event("drain.started")["seconds"] == 30
    running.wait_event("drain.done", aborted=0)


@pytest.mark.usefixtures("worse")
def test_drain_is_called_on_a_protocol_wrapper(service) -> None:
    running = service("--protocol=worse:wrapped", TCP)
    with running.connect() as client:
        assert client.recv(100) == b"here"
        assert running.stop() == 0
        assert client.recv(100) == b"goodbye"


@pytest.mark.usefixtures("worse")
def test_threads_that_never_end_delay_the_exit_until_a_second_signal(service, wait_for) -> None:
    running = service("--protocol=worse:Threads", TCP, "--drain-timeout=0.2")
    with running.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        running.process.send_signal(signal.SIGTERM)
        running.wait_event("drain.done")
        # Signals within half a second of the first are ignored as duplicates.
        wait_for(lambda: running.process.send_signal(signal.SIGTERM) or running.process.poll() is not None)
        assert running.process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.usefixtures("worse")
def test_a_permanently_blocked_reactor_is_logged_and_repeated_signals_end_it(service, wait_for) -> None:
    running = service("--protocol=worse:Threads", TCP)
    with running.connect() as client:
        client.sendall(b"loop")
        blocked = running.wait_event("reactor.blocked")
        assert "in dataReceived" in blocked["stack"]
        # Signals within half a second count once.
        wait_for(lambda: running.process.send_signal(signal.SIGTERM) or running.process.poll() is not None)
        assert running.process.wait(30) == 128 + signal.SIGTERM
    running.wait_event("stop.forced", signal="SIGTERM")


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("workers", [1, 2])
def test_protocol_logs_and_prints_are_the_same_with_workers(service, workers) -> None:
    running = service("--protocol=worse:Logs", TCP, f"--workers={workers}")
    with running.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        running.wait_line('"message": "bare"')
        running.wait_line(r'"level": "warn", "namespace": "worse.Logs", "message": "1\.23 of 00007"')
        running.wait_line('"level": "info".*printed"')
        running.wait_line('"level": "error".*complained"')
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert running.stop() == 0


def test_a_chat_member_that_does_not_read_is_disconnected(service) -> None:
    running = service("--protocol=chat", "--protocol-option=max-unsent=100000", TCP)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with running.connect() as ann, slow:
        slow.settimeout(30)
        slow.connect(("127.0.0.1", running.port))
        slow.sendall(b"slow\n/join tea\n")
        received = ann.makefile("rb")
        ann.sendall(b"ann\n/join tea\n")
        message = b"x" * 1000
        while b"left" not in received.readline():
            ann.sendall(message + b"\n")
        ann.sendall(b"/who\n")
        while (line := received.readline()) != b"* ann\r\n":
            assert message in line
    assert running.stop() == 0
