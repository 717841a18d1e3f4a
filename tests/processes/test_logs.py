"""Logs of real processes: full disks, pipes without a reader, formats, levels, and reopened files."""

import contextlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.greeting import GREETING
from tests.support.processes import cpu_seconds
from tests.support.programs import PROGRAMS


def is_idle(process: subprocess.Popen, directory) -> bool:
    """Return whether a process without traffic uses almost no CPU time within a second."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{directory}/s")
        assert client.recv(100) == GREETING
        before = cpu_seconds(process.pid)
        client.settimeout(1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        return cpu_seconds(process.pid) - before < 0.1


def stop(process: subprocess.Popen) -> int:
    process.terminate()
    return process.wait(DEADLINE)


# --- logs that fail ---


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, or None where tmpfs cannot be mounted: /dev/full is used then."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True).returncode:
        yield None
    else:
        yield directory
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize("what", ["--logfile", "--access-log"])
def test_a_full_disk_delays_no_client_and_dropped_lines_are_reported_later(
    start, tmp_path, small_disk, wait_for, what, greets
) -> None:
    file = "/dev/full" if small_disk is None else f"{small_disk}/log"
    if small_disk is not None:
        (small_disk / "full").write_bytes(bytes(56 << 10))
    output = tmp_path / "output"
    with output.open("wb") as out:
        if what == "--logfile":
            process = start(twistd=(f"--logfile={file}",), stdout=out, stderr=out)
        else:
            process = start(f"--access-log={file}", stdout=out, stderr=out)
    for _ in range(300):
        assert greets(tmp_path)
    assert is_idle(process, tmp_path)
    main = Path(file) if what == "--logfile" else output
    if what == "--access-log":
        wait_for(lambda: f"{file} cannot be written: No space left on device" in output.read_text())
    if small_disk is not None:
        (small_disk / "full").unlink()
        wait_for(lambda: f"{file} is written again, lines dropped: 0" in main.read_text())
        if what == "--logfile":
            assert f"{file} cannot be written: No space left on device" in main.read_text()
    assert stop(process) == 0
    if small_disk is not None:
        assert Path(file).read_text().count("peer finished") >= 301


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors_do_not_affect_clients(start, tmp_path, closed, greets) -> None:
    launcher = ("sh", "-c", f'exec "$@" {closed}', "sh")
    process = start("--access-log=-", launcher=launcher, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(300):
        assert greets(tmp_path)
    assert is_idle(process, tmp_path)
    assert stop(process) == 0


def test_a_closed_log_pipe_does_not_affect_clients(start, tmp_path, greets) -> None:
    process = start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process.stdout.close()
    for _ in range(300):
        assert greets(tmp_path)
    assert is_idle(process, tmp_path)
    assert stop(process) == 0


@pytest.mark.parametrize("logger", ["classic", "json"])
def test_a_full_log_pipe_delays_no_client_and_dropped_records_are_counted(start, tmp_path, logger, greets) -> None:
    process = start(
        twistd=(f"--logger=rtservice.observe.logs.{logger}",),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    served = 8000 if logger == "classic" else 3500
    for _ in range(served):
        assert greets(tmp_path)
    assert is_idle(process, tmp_path)
    received = b""
    while b"is written again" not in received:
        received += os.read(process.stdout.fileno(), 1 << 16)
    process.terminate()
    received += process.stdout.read()
    assert process.wait(DEADLINE) == 0
    dropped = int(re.search(rb"is written again, lines dropped: (\d+)", received)[1])
    assert b"standard output cannot be written: the reader is too slow" not in received.split(b"lines dropped")[1]
    records = sum(b"bytes in" in line for line in received.splitlines())
    assert dropped > 100
    # The clients of `start` and `is_idle` have records too; the report of the failed write has none.
    assert records + dropped - served in range(1, 5)


def test_a_stopping_service_flushes_its_log_to_a_slow_reader(start, tmp_path) -> None:
    process = start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    clients = []
    for _ in range(700):
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{tmp_path}/s")
        clients.append(client)
    for client in clients:
        assert client.recv(100) == GREETING
        client.close()
    process.terminate()
    output = process.stdout.read().decode()
    assert output.count("peer finished") >= 701
    assert output.endswith("Server Shut Down.\n")


# --- formats ---


@pytest.mark.parametrize("workers", [1, 2])
def test_json_logs_are_one_object_per_line_for_any_input(start, tmp_path, workers, greets) -> None:
    process = start(
        f"--workers={workers}",
        twistd=("--logger=rtservice.observe.logs.json",),
        env={"PYTHONPATH": str(PROGRAMS / "failing_echo")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    first = []
    while not first or "listening on" not in first[-1]["message"]:  # a worker may serve before the others are ready
        first.append(json.loads(process.stdout.readline()))
    names = [b"\x1b[31mred", b'"quoted" \\', b"new\nline\r", b"\xff\xfe", "\u2028\x9b".encode(), b"{peer}"]
    for name in names:
        assert greets(tmp_path, name)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(DEADLINE)
        client.connect(f"{tmp_path}/s")
        assert client.recv(100) == GREETING
        client.sendall(b"fail")
        assert client.recv(100) == b""
    process.terminate()
    records = first + [json.loads(line) for line in process.stdout]
    assert all([*record][:4] == ["time", "level", "namespace", "message"] for record in records)
    (failed,) = [record for record in records if "traceback" in record]
    assert failed["level"] == "critical"
    # Records of a worker are escaped before any logger receives them.
    assert ("ValueError: a\nvalue\x1b" if workers == 1 else "ValueError: a\nvalue\\x1b") in failed["traceback"]
    ended = [record for record in records if "bytes_in" in record]
    prefix = f"unix:{tmp_path}/"
    peers = [record["peer"].removeprefix(prefix) for record in ended if record["peer"] != "unix"]
    escaped = [r"\x1b[31mred", '"quoted" \\', r"new\nline\r", r"\xff\xfe", r"\u2028\x9b", "{peer}"]
    assert sorted(peers) == sorted(escaped)
    assert all(type(record["seconds"]) is float and record["bytes_out"] == 22 for record in ended)
    if workers > 1:
        assert {record["slot"] for record in ended} <= {0, 1}
        assert failed["slot"] in (0, 1)


def test_text_logger_writes_to_the_log_file_of_twistd(start, tmp_path) -> None:
    log = tmp_path / "x.log"
    twistd = (f"--logfile={log}", "--logger=rtservice.observe.logs.text")
    process = start(twistd=twistd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert stop(process) == 0
    assert process.stdout.read() == b""
    text = log.read_text()
    assert re.search(r"^\d{4}-\d\d-\d\dT\S+Z info     rtservice: listening on unix:", text, re.MULTILINE)
    assert "\x1b" not in text


@pytest.mark.parametrize("no_color", ["", "1"])
def test_text_logs_are_coloured_on_a_terminal_unless_no_color_is_set(start, tmp_path, no_color) -> None:
    controller, terminal = pty.openpty()
    process = start(
        twistd=("--logger=rtservice.observe.logs.text",), env={"NO_COLOR": no_color}, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    process.terminate()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while data := os.read(controller, 1 << 16):
            shown += data
    os.close(controller)
    assert b"listening on" in shown
    assert (b"\x1b[" in shown) == (not no_color)


# --- levels ---


def test_log_levels_apply_per_namespace_and_change_on_sighup(service, tmp_path) -> None:
    config = tmp_path / "rt.toml"
    config.write_text('log-level = "info,twisted=error"\n')
    running = service("--port=0", f"--config={config}")
    assert not any(record["namespace"].startswith("twisted.") for record in running.records)
    config.write_text('log-level = "debug"\n')
    running.process.send_signal(signal.SIGHUP)
    running.wait_event("settings.reloaded", settings="log-level")
    running.stop()
    assert any("Main loop terminated" in line for line in running.lines)


def test_log_levels_apply_in_workers(service, tmp_path) -> None:
    levels = "--log-level=rtservice.net=error,log_legacy=error"
    running = service(f"--listen=unix:{tmp_path}/s", "--workers=2", levels, PYTHONPATH=str(PROGRAMS / "failing_echo"))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")
        assert client.recv(100) == GREETING
        client.sendall(b"fail")
        assert client.recv(100) == b""
    running.wait_line("a failure is logged")
    running.wait_event("connection.closed")
    assert not any("a warning" in line for line in running.lines)
    running.stop()


# --- reopened files ---


@pytest.mark.parametrize("workers", [1, 2])
def test_the_access_log_is_reopened_on_sigusr1(service, tmp_path, wait_for, workers, greets) -> None:
    running = service(f"--listen=unix:{tmp_path}/s", f"--workers={workers}", "--access-log=access")
    path, moved = tmp_path / "access", tmp_path / "moved"
    assert greets(tmp_path, b"peer 1")
    line = wait_for(path.read_text)
    fields = re.fullmatch(
        r"start=(\S+Z) peer=\"(\S+/peer 1)\" listener=(unix:\S+/s) seconds=(0\.\d{3}) in=0 out=22 "
        r"reason=\"peer finished\" worker=(\S)\n",
        line,
    )
    assert fields is not None, line
    assert fields[5] in ("-" if workers == 1 else "01")
    path.rename(moved)
    assert greets(tmp_path)
    wait_for(lambda: moved.read_text().count("\n") == 2)
    running.process.send_signal(signal.SIGUSR1)
    wait_for(path.exists)
    assert greets(tmp_path)
    wait_for(lambda: path.read_text().count("\n") == 1)
    assert running.stop() == 0
    assert moved.read_text().count("\n") == 2
    assert not any(event["event"] == "connection.closed" for event in running.events)


def test_an_access_log_on_standard_output_is_mixed_with_other_lines(service, tmp_path, greets) -> None:
    running = service(f"--listen=unix:{tmp_path}/s", "--access-log=-")
    assert greets(tmp_path)
    running.wait_line("^start=.* worker=-$")
    running.stop()


def test_workers_send_all_access_log_lines_before_they_exit(service, tmp_path, greets) -> None:
    running = service(f"--listen=unix:{tmp_path}/s", "--workers=2", "--access-log=access")
    for _ in range(200):
        assert greets(tmp_path)
    assert running.stop() == 0
    assert (tmp_path / "access").read_text().count("out=22") == 200


def test_hostile_peer_names_do_not_exceed_the_message_size_of_a_worker(service, tmp_path, greets) -> None:
    running = service(f"--listen=unix:{tmp_path}/s", "--workers=2", "--access-log=access")
    room = 107 - len(os.fsencode(tmp_path)) - 1
    for number in range(300):
        assert greets(tmp_path, f"{number:03}".encode() + b"\x01" * (room - 3))
    assert running.stop() == 0
    assert (tmp_path / "access").read_text().count("out=22") == 300
    assert not any("must not say" in line for line in running.lines)


def test_the_log_of_a_daemon_is_rotated_on_sigusr1(run, tmp_path, wait_for, greets) -> None:
    log = tmp_path / "d.log"
    result = run(f"--pidfile={tmp_path}/pid", f"--logfile={log}", "rtservice", f"--listen=unix:{tmp_path}/s")
    assert (result.returncode, result.stderr) == (0, "")
    pid = int((tmp_path / "pid").read_text())
    try:
        os.kill(pid, signal.SIGUSR1)
        wait_for((tmp_path / "d.log.1").exists)
        assert greets(tmp_path)
        wait_for(lambda: "bytes in" in log.read_text())
        assert "listening on" in (tmp_path / "d.log.1").read_text()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    assert log.read_text().endswith("Server Shut Down.\n")


@pytest.mark.parametrize("twistd", [(), ("--syslog",), ("--logger=twisted.logger.LogPublisher",)], ids=" ".join)
def test_sigusr1_does_not_end_a_process_with_any_logger(start, tmp_path, twistd, greets) -> None:
    process = start(twistd=twistd, stdout=subprocess.DEVNULL)
    for _ in range(10):
        process.send_signal(signal.SIGUSR1)
        assert greets(tmp_path)
    assert stop(process) == 0


# --- invalid options ---


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("-n", "rtservice", "--access-log=no/such"),
            "--access-log no/such: cannot be written: No such file or directory",
        ),
        (("-n", "rtservice", "--access-log=/"), "--access-log /: cannot be written: Is a directory"),
        (
            ("-n", "rtservice", "--check", "--access-log=no/such"),
            "--access-log no/such: cannot be written: No such file or directory",
        ),
        (
            ("--logfile=x", "rtservice", "--access-log=-"),
            "--access-log -: a daemon has no standard output; use a file, or --nodaemon",
        ),
        (("--logfile=-", "rtservice"), "--logfile -: a daemon has no standard output; use a file, or --nodaemon"),
        (("-n", "--logfile=no/such", "rtservice"), "--logfile no/such: cannot be written: No such file or directory"),
        (
            ("-n", "rtservice", "--log-level=loud"),
            "--log-level: 'loud' is not one of debug, info, warn, error, critical",
        ),
        (("-n", "rtservice", "--log-level=info,a b=warn"), "--log-level: 'a b' is not a namespace such as twisted.web"),
        (("-n", "rtservice", "--log-files=101"), "--log-files: '101' is not a whole number from 0 to 100"),
        (("-n", "rtservice", "--log-level=info,debug"), "--log-level: 'info,debug' has two levels for rtservice"),
    ],
)
def test_an_invalid_log_option_is_one_error_line(run, arguments, line) -> None:
    result = run("--pidfile=", *arguments)
    assert (result.returncode, result.stderr) == (1, f"rtservice: {line}\n")
