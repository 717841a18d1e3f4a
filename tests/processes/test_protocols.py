"""Protocols of anybody's, in real processes: how they start, what they get, and what a bad one cannot do."""

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


def exchange(one, data: bytes, read_all: Callable[[socket.socket], bytes]) -> bytes:
    with one.connect() as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return read_all(client)


@pytest.mark.usefixtures("good")
def test_a_factory_is_started_once_before_anybody_is_accepted_and_stopped_after_the_last(service) -> None:
    one = service("--protocol=good:Shouts", "--protocol-option=mark=?", TCP, "--listen=unix:s")
    with one.connect() as client:
        client.sendall(b"hi")
        assert client.recv(100) == b"HI?"
        one.stop()
        assert client.recv(100) == b"bye"
    told = [record["message"] for record in one.records]
    order = [told.index(word) for word in ("startFactory", "start", "drain", "stopFactory")]
    assert order == sorted(order)
    assert [told.count(word) for word in ("startFactory", "start", "drain", "stopFactory")] == [1, 1, 1, 1]
    listening = next(number for number, line in enumerate(told) if line.startswith("listening on"))
    assert told.index("start") < listening < told.index("drain")
    assert any(line.startswith("shouting at 127.0.0.1:") and line.endswith(", 1") for line in told)
    record = next(number for number, line in enumerate(told) if "bytes out" in line)
    assert record < told.index("stopFactory")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_start_that_fails_is_one_line_and_a_status(run, workers) -> None:
    result = run(*RTSERVICE, "--protocol=good:Shouts", "--protocol-option=fails=true", TCP, f"--workers={workers}")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith("Shouts did not start: ConnectionRefusedError: no database at all")
    assert "Traceback" not in result.stdout
    assert "listening on" not in result.stdout


@pytest.mark.usefixtures("good")
def test_a_start_that_is_not_done_is_cancelled_by_a_stop(service) -> None:
    one = service("--protocol=good:Shouts", "--protocol-option=hangs=true", TCP, awaits='"message": "start"')
    one.stop()
    one.wait_line("start is cancelled")
    one.wait_line("stopFactory")
    assert not any("listening" in line or "Traceback" in line for line in one.lines)


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
def test_what_cannot_be_imported_is_one_line_and_a_status(
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
def test_what_has_to_be_in_one_process_does_not_start_with_workers(run, check) -> None:
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
    one = service("--protocol=changes:Says", TCP, "--workers=2")
    assert exchange(one, b"", read_all) == b"old code"
    source.write_text(source.read_text().replace("old code", "the new code"))
    one.process.send_signal(1)
    wait_for(lambda: sum(event["event"] == "worker.ended" for event in one.events) == 2)
    assert exchange(one, b"", read_all) == b"the new code"
    source.write_text("1 / 0")
    one.process.send_signal(1)
    one.wait_line("broken|ZeroDivisionError")
    assert exchange(one, b"", read_all) == b"the new code"
    assert one.stop() == 0


@pytest.mark.usefixtures("good")
def test_relative_paths_begin_where_the_command_was_typed(service, tmp_path, environment, read_all) -> None:
    copy_hosted("files", tmp_path)
    one = service("--protocol=files:Shows", "--protocol-option=path=a/b", TCP, "--workers=2")
    assert exchange(one, b"", read_all) == bytes(tmp_path / "a" / "b")


@pytest.fixture
def bad(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("bad", tmp_path)
    environment["PYTHONPATH"] = "."


@pytest.mark.usefixtures("bad")
def test_a_client_that_gets_no_protocol_is_closed_and_one_that_raises_harms_no_other(service, read_all) -> None:
    one = service("--protocol=bad:Builds", TCP)
    for _ in range(2):
        with one.connect() as client:
            assert read_all(client) == b""
    with one.connect() as client:
        client.sendall(b"before")
        assert client.recv(100) == b"before"
        with one.connect() as other:
            other.sendall(b"raise")
            assert read_all(other) == b""
        client.sendall(b"after")
        assert client.recv(100) == b"after"
    one.wait_event("factory.failed", factory="Builds", method="buildProtocol")
    one.wait_event("protocol.failed", protocol="Raises", method="dataReceived")
    assert one.stop() == 0


@pytest.mark.usefixtures("bad")
def test_a_protocol_that_never_lets_go_does_not_hold_up_a_drain(service, read_all) -> None:
    one = service("--protocol=bad:Clings", TCP, "--drain-timeout=0.2")
    with one.connect() as client:
        assert client.recv(1) == b"x"
        assert one.stop() == 0
    one.wait_event("drain.done", ended=1, aborted=0)


@pytest.mark.usefixtures("bad")
@pytest.mark.parametrize("workers", [1, 2])
def test_what_blocks_the_reactor_is_logged_with_its_stack(service, workers) -> None:
    one = service("--protocol=bad:Raises", TCP, f"--workers={workers}")
    with one.connect() as client:
        client.sendall(b"block")
        assert client.recv(100) == b"block"
    blocked = one.wait_event("reactor.blocked")
    assert "in sleep_here" in blocked["stack"]
    assert one.stop() == 0


@pytest.fixture
def worse(tmp_path: Path, environment: dict[str, str]) -> None:
    copy_hosted("worse", tmp_path)
    environment["PYTHONPATH"] = "."


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("workers", [1, 2])
def test_sys_exit_in_a_factory_ends_nothing_but_what_it_was_asked_for(service, workers) -> None:
    one = service(
        *("--protocol=worse:Exits", TCP, f"--workers={workers}", "--status=tcp:0", "--hang-timeout=2"),
        *("--drain-timeout=0.5",),
    )
    site = one.wait_event("status.listening")["listener"].rpartition("tcp:")[2]
    with urllib.request.urlopen(f"http://{site}/status.json", timeout=30) as answer:
        assert answer.status == 200
    one.wait_event("factory.failed", factory="Exits", method="metrics")
    with one.connect() as first, one.connect() as second:
        assert first.recv(100) == second.recv(100) == b"here"
        one.process.send_signal(signal.SIGTERM)
        for client in (first, second):
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(100) == b""
        assert one.process.wait(30) == 0
    one.wait_event("factory.failed", factory="Exits", method="drain")
    one.wait_event("protocol.failed", 2, protocol="Leaves", method="drain")
    one.wait_event("factory.failed", factory="Exits", method="stopFactory")
    one.wait_event("drain.done")
    assert not any(event["event"] == "worker.hung" for event in one.events)


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("kind", ["tcp:0:interface=127.0.0.1", "unix:s"])
def test_a_producer_that_fails_as_its_connection_begins_leaves_the_listener_and_no_trace(
    service, tmp_path, kind
) -> None:
    one = service("--protocol=worse:Worse", f"--listen={kind}", "--max-connections=1")

    def connect() -> socket.socket:
        if kind != "unix:s":
            return one.connect()
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
    assert one.stop() == 0
    assert one.wait_event("drain.started")["seconds"] == 30
    one.wait_event("drain.done", aborted=0)


@pytest.mark.usefixtures("worse")
def test_a_wrapper_that_wants_to_say_goodbye_is_told(service) -> None:
    one = service("--protocol=worse:wrapped", TCP)
    with one.connect() as client:
        assert client.recv(100) == b"here"
        assert one.stop() == 0
        assert client.recv(100) == b"goodbye"


@pytest.mark.usefixtures("worse")
def test_threads_that_never_end_hold_it_up_until_the_second_signal(service, wait_for) -> None:
    one = service("--protocol=worse:Threads", TCP, "--drain-timeout=0.2")
    with one.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        one.process.send_signal(signal.SIGTERM)
        one.wait_event("drain.done")
        # Those of the first half second are the first one once more.
        wait_for(lambda: one.process.send_signal(signal.SIGTERM) or one.process.poll() is not None)
        assert one.process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.usefixtures("worse")
def test_a_reactor_that_is_blocked_for_ever_is_in_the_log_and_the_third_signal_ends_it(service, wait_for) -> None:
    one = service("--protocol=worse:Threads", TCP)
    with one.connect() as client:
        client.sendall(b"loop")
        blocked = one.wait_event("reactor.blocked")
        assert "in dataReceived" in blocked["stack"]
        # Those of half a second are one.
        wait_for(lambda: one.process.send_signal(signal.SIGTERM) or one.process.poll() is not None)
        assert one.process.wait(30) == 128 + signal.SIGTERM
    one.wait_event("stop.forced", signal="SIGTERM")


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_protocol_logs_and_prints_is_the_same_with_workers(service, workers) -> None:
    one = service("--protocol=worse:Logs", TCP, f"--workers={workers}")
    with one.connect() as client:
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        one.wait_line('"message": "bare"')
        one.wait_line(r'"level": "warn", "namespace": "worse.Logs", "message": "1\.23 of 00007"')
        one.wait_line('"level": "info".*printed"')
        one.wait_line('"level": "error".*complained"')
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert one.stop() == 0


def test_a_chat_goes_on_while_a_member_does_not_read(service) -> None:
    one = service("--protocol=chat", "--protocol-option=max-unsent=100000", TCP)
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with one.connect() as ann, slow:
        slow.settimeout(30)
        slow.connect(("127.0.0.1", one.port))
        slow.sendall(b"slow\n/join tea\n")
        heard = ann.makefile("rb")
        ann.sendall(b"ann\n/join tea\n")
        said = b"x" * 1000
        while b"left" not in heard.readline():
            ann.sendall(said + b"\n")
        ann.sendall(b"/who\n")
        while (line := heard.readline()) != b"* ann\r\n":
            assert said in line
    assert one.stop() == 0


def test_a_chat_does_not_start_with_workers(run) -> None:
    result = run(*RTSERVICE, "--protocol=chat", TCP, "--workers=2")
    assert result.returncode == 1
    assert result.stderr.endswith(
        "--protocol chat: this protocol needs all connections in one process; --workers has to be 1, not 2\n"
    )
