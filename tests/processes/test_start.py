"""Startup errors are reported as one line naming the setting and its value, with a non-zero exit status."""

import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.support.commands import BIN, DAEMON, FOREGROUND
from tests.support.deadline import DEADLINE
from tests.support.free_port import free_port
from tests.support.hosted import copy_hosted, copy_plugin
from tests.support.refused import assert_refused


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--nonsense"], ["nonsense"]),
        (["--port", "70000"], ["--port", "'70000'", "0 to 65535"]),
        (["--port", "http"], ["--port", "'http'"]),
        (["--port"], ["--port"]),
        (["--backlog", "0"], ["--backlog", "'0'"]),
        (["--max-message", "0"], ["--max-message", "'0'"]),
        (["--framing", "xml"], ["--framing", "'xml'", "netstring"]),
        (["--greeting", r"\q"], ["--greeting", "escape"]),
        (["--framing=line", r"--greeting=a\nb"], ["--greeting", "line feed"]),
        (["surplus"], ["'surplus'"]),
        (["--port=0", "--interface", "203.0.113.1"], ["--port 0", "--interface 203.0.113.1", "cannot assign"]),
        (["--interface", "no.such.host.invalid"], ["--interface", "no.such.host.invalid"]),
        (["--listen", "nosuch:1"], ["--listen nosuch:1", "unknown type 'nosuch'; accepted are 8080, "]),
        (["--listen", "ssl:1:privateKey=/no/key"], ["--listen ssl:1:privateKey=/no/key"]),
        (["--listen", "tcp:"], ["--listen tcp:", "port is missing"]),
        (["--listen", "tcp:1:bogus=2"], ["--listen tcp:1:bogus=2", "'bogus'"]),
        (["--listen", "unix:/no/such/place/s"], ["--listen unix:/no/such/place/s", "'/no/such/place'"]),
        (["--listen", "tcp:1\nx"], [r"--listen tcp:1\nx: port"]),
        (["--listen", "systemd:index=0"], ["--listen systemd:index=0", "no sockets were passed"]),
    ],
    ids=" ".join,
)
def test_an_invalid_option_is_one_error_line(run, arguments, names) -> None:
    assert_refused(run("-n", "--pidfile=", "rtservice", *arguments), *names)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can change the root directory")


@pytest.mark.parametrize("daemon", [False, True], ids=["foreground", "daemon"])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--pidfile=/no/such/place/d.pid"], ["--pidfile /no/such/place/d.pid", "no such directory: /no/such/place"]),
        # Root has no permission either.
        (["--pidfile=/proc/sys/d.pid"], ["--pidfile /proc/sys/d.pid", "permission denied"]),
        (["--pidfile=", "--rundir=/no/such/place"], ["--rundir /no/such/place", "no such directory"]),
        (["--pidfile=", "--chroot=/no/such/place"], ["--chroot /no/such/place", "no such directory"]),
        pytest.param(
            ["--pidfile=", "--chroot=/", "--rundir=/no/such"],
            ["--rundir /no/such", "no such directory; in the new root"],
            marks=needs_root,
        ),
        (["--pidfile=", "--rundir=/dev/null"], ["--rundir /dev/null", "not a directory"]),
        (["--pidfile=", "--chroot=/dev/null"], ["--chroot /dev/null", "not a directory"]),
        (["--pidfile=/"], ["--pidfile /", "not a regular file"]),
        (["--pidfile=/dev/null/d.pid"], ["--pidfile /dev/null/d.pid", "not a directory"]),
    ],
)
def test_an_invalid_twistd_option_is_one_error_line(run, tmp_path, daemon, options, names) -> None:
    where = [f"--logfile={tmp_path}/d.log"] if daemon else ["-n"]
    assert_refused(run(*where, *options, "rtservice", "--port=0"), *names)


def run_in_shell(script: str, directory: Path, environment: dict[str, str], *arguments: str):
    """Run a script of sh(1) in which `"$@"` is a `twistd` command line."""
    return subprocess.run(
        ["sh", "-c", script, "sh", str(BIN / "twistd"), *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["-n", "--pidfile=", "rtservice", "--listen=unix:s"],
        ["-n", "--pidfile=", "--rundir=/", "rtservice", "--check"],
        ["--logfile=d.log", "rtservice", "--config=rt.toml"],
    ],
    ids=" ".join,
)
def test_a_removed_working_directory_is_one_error_line(environment, tmp_path, arguments) -> None:
    (tmp_path / "gone").mkdir()
    result = run_in_shell('rmdir ../gone; exec "$@"', tmp_path / "gone", environment, *arguments)
    assert_refused(result, "rtservice: the working directory cannot be used: no such file or directory; change to")


@pytest.mark.parametrize("content", ["", "12 34", "-1", "9" * 20, "\udcff"], ids=ascii)
def test_a_pidfile_without_a_process_id_is_one_error_line_and_is_kept(run, tmp_path, content) -> None:
    data = os.fsencode(content)
    (tmp_path / "d.pid").write_bytes(data)
    assert_refused(
        run("--pidfile=d.pid", "rtservice", "--check"),
        "--pidfile",
        "d.pid: the file does not contain a process id; remove it",
    )
    assert (tmp_path / "d.pid").read_bytes() == data


def test_an_error_of_twistd_after_binding_is_one_error_line(environment, tmp_path) -> None:
    # Twistd cannot write its pidfile; rtservice does not check the limit on file sizes (RLIMIT_FSIZE).
    script = 'ulimit -f 0; exec "$@"'
    result = run_in_shell(script, tmp_path, environment, "-n", "--pidfile=d.pid", "rtservice", "--listen=unix:s")
    assert_refused(result, "rtservice: cannot start: file too large")
    assert result.returncode == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "workers"), [(6, 1), (8, 1), (9, 1), (12, 1), (6, 2), (8, 2), (12, 2), (20, 2), (25, 2)]
)
def test_too_few_descriptors_are_one_error_line(environment, tmp_path, limit, workers) -> None:
    arguments = ("-n", "--pidfile=", "rtservice", "--listen=unix:s", f"--workers={workers}")
    # Coverage measurement needs descriptors too, and prints a traceback without them.
    bare = {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}
    result = run_in_shell(f'ulimit -n {limit}; exec "$@"', tmp_path, bare, *arguments)
    assert_refused(result)
    assert re.search("too many open files|limit of descriptors", result.stderr)
    assert result.returncode == 1
    assert list(tmp_path.iterdir()) == []


def test_the_reported_minimum_of_descriptors_is_sufficient(environment, tmp_path, service) -> None:
    result = run_in_shell('ulimit -n 12; exec "$@"', tmp_path, environment, "-n", "--pidfile=", "rtservice", "--port=0")
    enough = re.search(r"is 12; this service needs at least (\d+)", result.stderr)
    assert enough, result
    running = service("--port=0", launcher=["sh", "-c", f'ulimit -n {enough[1]}; exec "$@"', "sh"])
    with running.connect() as client:
        assert client.recv(100) == b"Hello from the server!"
    assert "Traceback" not in "".join(running.lines)


@pytest.mark.parametrize(
    ("protocol", "workers", "problem"),
    [
        ("interrupted:X", 1, "--protocol interrupted:X: interrupted cannot be imported: KeyboardInterrupt ("),
        ("interrupted:X", 2, "--protocol interrupted:X: interrupted cannot be imported: KeyboardInterrupt ("),
        ("unfit:Interrupts", 2, "--protocol unfit:Interrupts: cannot be created: KeyboardInterrupt ("),
        ("unfit:Exits", 1, "Exits did not start: SystemExit: 0\n"),
        ("unfit:Exits", 2, "Exits did not start: SystemExit: 0\n"),
        ("unfit:Gives", 1, "Gives did not start: TypeError: "),
        ("unfit:Second", 1, "unix:{}/s did not start: LookupError: the second start\n"),
        ("unfit:Second", 2, "unix:{}/s did not start: LookupError: the second start\n"),
        ("unfit:Runs", 1, "the process ended before the service was ready\n"),
    ],
)
def test_a_protocol_that_fails_at_the_start_is_one_error_line(
    run, tmp_path, environment, protocol, workers, problem
) -> None:
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    copy_hosted("unfit", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    result = run(*FOREGROUND, "rtservice", "--listen=unix:s", f"--protocol={protocol}", f"--workers={workers}")
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.startswith(f"rtservice: {problem.format(tmp_path)}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interrupted.py", "unfit.py"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, None], ids=["kill", "segv", "exit"])
def test_the_command_returns_if_the_daemon_is_killed_before_it_serves(run, tmp_path, environment, number) -> None:
    copy_hosted("fatal", tmp_path)
    environment["FATAL"] = "" if number is None else str(int(number))
    environment["PYTHONPATH"] = str(tmp_path)
    result = run("--pidfile=d.pid", "--logfile=d.log", "rtservice", "--listen=unix:s", "--protocol=fatal:Fatal")
    assert result.returncode == 1


def test_a_daemon_stopped_before_it_serves_removes_its_files(run, tmp_path, environment, wait_for) -> None:
    # The endpoint of the plugin listens after the last fork and before the reactor runs.
    copy_plugin("stopping", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)
    result = run("--pidfile=d.pid", "--logfile=d.log", "rtservice", "--listen=unix:s", f"--listen=stopped:{tmp_path}/t")
    assert result.returncode in (0, 1)  # 0 if it served for a moment
    wait_for(lambda: not any((tmp_path / name).exists() for name in ("d.pid", "s", "t")))
    assert "SIGTERM received" in (tmp_path / "d.log").read_text()


@pytest.mark.parametrize(
    "twistd", [["-n", "--pidfile="], ["--pidfile=d.pid", "--logfile=d.log"]], ids=["foreground", "daemon"]
)
def test_a_port_in_use_is_one_error_line_also_for_a_daemon(run, tmp_path, twistd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run(*twistd, "rtservice", "--interface=127.0.0.1", "--port", port)
        assert_refused(result, f"--port {port}", f"127.0.0.1:{port}", "address already in use")
    assert not (tmp_path / "d.pid").exists()


def test_a_second_start_on_the_port_fails_and_the_first_service_keeps_serving(service, run, read_all) -> None:
    first = service("--port", "0")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--port", str(first.port)), f"--port {first.port}")
    with first.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"Hello from the server!"


def test_a_unix_socket_in_use_is_rejected_and_a_stale_one_is_replaced(service, run, tmp_path, read_all) -> None:
    path = tmp_path / "s"
    first = service("--listen", f"unix:{path}")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--listen", f"unix:{path}"), str(path), "is in use")
    first.process.kill()
    first.process.wait()
    assert path.exists()
    service("--listen", f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"Hello from the server!"


def test_a_file_that_is_not_a_socket_is_rejected_and_kept(run, tmp_path) -> None:
    (tmp_path / "s").write_text("precious")
    assert_refused(run("-n", "--pidfile=", "rtservice", "--listen", "unix:s"), "not a socket")
    assert (tmp_path / "s").read_text() == "precious"


@pytest.fixture
def slow_endpoints(tmp_path, environment):
    """Install a plugin with the endpoints slow:fails-now, slow:fails, slow:never and slow:listens:PORT."""
    copy_plugin("slow_endpoint", tmp_path)
    environment["PYTHONPATH"] = str(tmp_path)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=DEADLINE).close()
    except ConnectionRefusedError:
        return True
    return False


both = pytest.mark.parametrize("twistd", [FOREGROUND, DAEMON], ids=["foreground", "daemon"])


@pytest.mark.usefixtures("slow_endpoints")
@pytest.mark.parametrize("outcome", ["fails-now", "fails"])
@both
def test_an_endpoint_that_fails_late_closes_all_listeners_and_is_reported(run, tmp_path, twistd, outcome) -> None:
    port = free_port()
    listen = (f"--listen=tcp:{port}:interface=127.0.0.1", "--listen=unix:s", f"--listen=slow:{outcome}")
    result = run(*twistd, "rtservice", *listen)
    assert result.returncode == 1
    problem = f"--listen slow:{outcome}: broken by design"
    # A daemonizing twistd adds two lines.
    assert result.stderr.splitlines()[0] == f"rtservice: {problem}"
    assert result.stderr.count("\n") == (1 if twistd == FOREGROUND else 3)
    log = result.stdout if twistd == FOREGROUND else (tmp_path / "d.log").read_text()
    assert f"#critical] cannot start: {problem}" in log
    assert "Traceback" not in result.stderr + log
    assert is_refused(port)
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "d.pid").exists()


@pytest.mark.usefixtures("slow_endpoints")
def test_an_error_with_a_long_description_is_not_truncated_in_a_daemon(run) -> None:
    name = "x" * 200
    result = run(*DAEMON, "rtservice", f"--listen=unix:{name}/s", "--listen=slow:fails")
    assert_refused(result, f"--listen unix:{name}/s: ")
    result = run(*DAEMON, "rtservice", "--greeting=" + name, "--listen=slow:fails:" + "0" * 200)
    assert f"rtservice: --listen slow:fails:{'0' * 200}: broken by design\n" in result.stderr


@pytest.mark.usefixtures("slow_endpoints")
def test_the_command_of_a_daemon_returns_once_all_listeners_are_open(run, tmp_path, daemon_ends) -> None:
    port, slow = free_port(), free_port()
    result = run(*DAEMON, "rtservice", f"--listen=slow:listens:{slow}", f"--listen=tcp:{port}:interface=127.0.0.1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    for number in (slow, port):
        with socket.create_connection(("127.0.0.1", number), timeout=DEADLINE) as client:
            assert client.recv(100) == b"Hello from the server!"
    daemon_ends()


@pytest.mark.usefixtures("slow_endpoints")
def test_stopping_a_daemon_during_its_start_is_a_failure(environment, tmp_path, wait_for) -> None:
    command = [BIN / "twistd", *DAEMON, "rtservice", "--listen=slow:never", "--listen=unix:s"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "d.log"
        wait_for(lambda: log.exists() and "listening on unix" in log.read_text())
        os.kill(int((tmp_path / "d.pid").read_text()), signal.SIGTERM)
        errors = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 1
    assert errors.startswith("rtservice: stopped before every listener was ready\n")
    wait_for(lambda: not (tmp_path / "d.pid").exists())
    assert not (tmp_path / "s").exists()


@both
@pytest.mark.parametrize("second", ["taken", "certificate", "unknown", "interface", "directory"])
def test_the_first_listener_is_closed_if_the_second_fails(run, tmp_path, twistd, second) -> None:
    port = free_port()
    (tmp_path / "bad.pem").write_text("garbage")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        description, reason = {
            "taken": (f"tcp:{taken.getsockname()[1]}:interface=127.0.0.1", "address already in use"),
            "certificate": ("ssl:0:privateKey=bad.pem:certKey=bad.pem", "bad.pem"),
            "unknown": ("nosuch:1", "nosuch"),
            "interface": ("tcp:0:interface=203.0.113.1", "cannot assign requested address"),
            "directory": ("unix:/no/such/place/s", "'/no/such/place'"),
        }[second]
        result = run(
            *twistd, "rtservice", f"--listen=tcp:{port}:interface=127.0.0.1", "--listen=unix:s", "--listen", description
        )
    assert_refused(result, f"rtservice: --listen {description}: ", reason)
    assert result.returncode == 1
    assert is_refused(port)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.pem", "d.log"}


@both
def test_an_error_names_the_source_of_the_setting(run, tmp_path, environment, twistd) -> None:
    (tmp_path / "rt.toml").write_text("listen = ['unix:/no/such/place/s']")
    environment["RTSERVICE_CONFIG"] = "rt.toml"
    assert_refused(run(*twistd, "rtservice"), f"rtservice: {tmp_path}/rt.toml: listen unix:/no/such/place/s: ")
    environment["RTSERVICE_LISTEN"] = "tcp:0 nosuch:1"
    assert_refused(run(*twistd, "rtservice"), "rtservice: RTSERVICE_LISTEN nosuch:1: ")
    environment["RTSERVICE_LISTEN"] = ""
    (tmp_path / "rt.toml").write_text("port = 0\ninterface = '203.0.113.1'\nframing = 'line'")
    assert_refused(
        run(*twistd, "rtservice"), f"rtservice: {tmp_path}/rt.toml: port 0 {tmp_path}/rt.toml: interface 203.0.113.1: "
    )
    environment["RTSERVICE_GREETING"] = r"a\n"
    assert_refused(run(*twistd, "rtservice"), "rtservice: RTSERVICE_GREETING: ", "line feed")


@both
@pytest.mark.parametrize("kind", ["directory", "missing", "loop", "long", "pipe", "device"])
def test_an_unreadable_settings_file_is_one_error_line(run, tmp_path, twistd, kind) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    path, reason = {
        "directory": (str(tmp_path), "cannot be read: Is a directory"),
        "missing": ("no/such.toml", "cannot be read: No such file or directory"),
        "loop": ("loop", "cannot be read: Too many levels of symbolic links"),
        "long": ("x" * 300, "cannot be read: File name too long"),
        "pipe": ("pipe", "is not a regular file"),
        "device": ("/dev/zero", "is not a regular file"),
    }[kind]
    assert_refused(run(*twistd, "rtservice", "--config", path), path, reason)


def test_check_binds_nothing_and_ignores_ports_in_use(run, tmp_path, certificates) -> None:
    pair = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run(
            *(*FOREGROUND, "rtservice", "--check", f"--listen=tcp:{port}:interface=127.0.0.1"),
            *(f"--listen=ssl:{port}:interface=127.0.0.2:{pair}", "--listen=unix:s", "--listen=proxy:systemd:name=web"),
        )
    assert (result.returncode, result.stdout) == (0, "rtservice: the configuration is valid\n"), result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--listen=ssl:0:privateKey={0[server.key]}:certKey={0[rsa.pem]}"], ["--listen ssl:0", "does not belong to"]),
        (["--listen=ssl:0:privateKey=/no/key:certKey={0[rsa.pem]}"], ["--listen ssl:0", "'/no/key'"]),
        (["--listen=ssl:0:certificates=/no/such"], ["--listen ssl:0", "'/no/such'"]),
        (["--listen=tcp:0", "--listen=tcp:0:interface=203.0.113.1"], ["--listen tcp:0:interface=203.0.113.1"]),
        (["--port=0", "--interface=203.0.113.1"], ["--port 0 --interface 203.0.113.1"]),
        (["--listen=unix:/no/such/place/s"], ["'/no/such/place'"]),
        (["--listen=nosuch:1"], ["--listen nosuch:1"]),
        (["--framing=line", "--greeting=a\\n"], ["--greeting"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--listen=") else None,
)
def test_check_reports_the_same_errors_as_a_start(run, certificates, arguments, names) -> None:
    for check in (["--check"], []):
        result = run(*FOREGROUND, "rtservice", *check, *(argument.format(certificates) for argument in arguments))
        assert_refused(result, *names)
        assert result.stdout == ""


needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None or os.getuid() != 0,
    reason="strace (Debian: strace) is not installed, or the user is not root",
)


@needs_strace
@both
@pytest.mark.parametrize("calls", ["setuid,setresuid,setreuid", "setgid,setresgid,setregid"])
def test_a_setuid_without_effect_fails_the_start(environment, tmp_path, twistd, calls) -> None:
    port = free_port()
    strace = ["strace", "-f", "-qq", "-o", "trace", "-e", f"trace={calls}", "-e", f"inject={calls}:retval=0"]
    command = [
        *strace,
        BIN / "twistd",
        *twistd,
        "--uid=nobody",
        "rtservice",
        f"--listen=tcp:{port}:interface=127.0.0.1",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert "INJECTED" in (tmp_path / "trace").read_text(), result
    what = calls[3:6]
    assert result.returncode == 1
    assert re.match(rf"rtservice: --{what} \d+: the process still runs as {what} 0\n", result.stderr)
    assert "Traceback" not in result.stderr
    assert is_refused(port)
    # Without root privileges the pidfile of root cannot be removed.
    assert what == "gid" or not (tmp_path / "d.pid").exists()


def test_a_daemon_without_standard_descriptors_serves(run, tmp_path, environment, daemon_ends) -> None:
    port = free_port()
    command = f'exec "$0" {" ".join(DAEMON)} rtservice --listen=tcp:{port}:interface=127.0.0.1 <&- >&- 2>&-'
    result = subprocess.run(
        ["sh", "-c", command, BIN / "twistd"], cwd=tmp_path, env=environment, timeout=DEADLINE, check=False
    )
    assert result.returncode == 0
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE) as client:
        assert client.recv(100) == b"Hello from the server!"
    daemon_ends()
    assert "Traceback" not in (tmp_path / "d.log").read_text()


@pytest.mark.parametrize("option", ["--check", "--print-config", "--help", "--version"])
def test_a_failed_write_to_standard_output_is_one_error_line(environment, tmp_path, option) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [BIN / "twistd", *FOREGROUND, "rtservice", option],
            cwd=tmp_path,
            env=environment,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=DEADLINE,
        )
    assert result.returncode == 1
    assert result.stderr == "rtservice: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize("option", ["--access-log=/nonex\x1b[31m/a", "--fo\x1b[31mo", "--listen=tcp:1\x1b[31m"])
def test_control_characters_of_an_option_do_not_reach_the_terminal(run, option) -> None:
    result = run(*FOREGROUND, "rtservice", option)
    assert result.returncode == 1
    assert result.stderr.startswith("rtservice: ")
    assert r"\x1b[31m" in result.stderr
    assert result.stderr.removesuffix("\n").isprintable()


@pytest.fixture
def twist(environment, tmp_path):
    """Start `twist rtservice` with arguments, and with `log` as its log file."""
    started = []

    def start(*arguments: str):
        process = subprocess.Popen(
            [BIN / "twist", "--log-format=text", "--log-file=log", "rtservice", *arguments],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_twist_reloads_drains_and_exits_with_status_0(twist, tmp_path, wait_for) -> None:
    process = twist("--listen=unix:s")

    def logged(text: str) -> None:
        wait_for(lambda: (tmp_path / "log").exists() and text in (tmp_path / "log").read_text())

    logged("listening on")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{tmp_path}/s")
        assert client.recv(100) == b"Hello from the server!"
        process.send_signal(signal.SIGHUP)
        logged("settings reloaded, changed: none")
        process.send_signal(signal.SIGTERM)
        logged("open connections: 1")
        client.sendall(b"still")
        assert client.recv(100) == b"still"
    assert process.wait(DEADLINE) == 0
    logged("drained: 1 ended, 0 aborted")
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("slow_endpoints")
@pytest.mark.parametrize("outcome", ["fails-now", "fails"])
def test_twist_exits_with_status_1_if_the_start_fails(twist, outcome, tmp_path) -> None:
    process = twist("--listen=unix:s", f"--listen=slow:{outcome}")
    errors = process.communicate(timeout=DEADLINE)[1]
    assert process.returncode == 1
    # Twist opens its log when the reactor runs; until then critical events are printed, too.
    assert errors.splitlines()[-1] == f"rtservice: --listen slow:{outcome}: broken by design"
    assert "Traceback" not in errors
    assert not (tmp_path / "s").exists()


@pytest.fixture
def daemon_ends(tmp_path, wait_for):
    """Stop the daemon of d.pid, and wait until it has exited; also at the end of the test."""

    def end() -> None:
        if (tmp_path / "d.pid").exists():
            os.kill(int((tmp_path / "d.pid").read_text()), signal.SIGTERM)
            wait_for(lambda: not (tmp_path / "d.pid").exists())

    yield end
    end()


def test_help_and_version_name_the_service(run) -> None:
    result = run("rtservice", "--help")
    assert result.returncode == 0
    for option in ("--port", "--listen", "--greeting", "--framing"):
        assert option in result.stdout
    assert run("rtservice", "--version").stdout.startswith("rtservice ")
