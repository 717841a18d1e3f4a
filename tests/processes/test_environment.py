"""Services started with unusual signal masks, process numbers and mounts."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.deadline import DEADLINE
from tests.support.hosted import copy_hosted
from tests.support.listen_options import TCP
from tests.support.programs import program

# Run as process 1 of a PID namespace; its end kills all processes of the namespace.
AS_PROCESS_1 = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def can(*command: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return False


needs_namespaces = pytest.mark.skipif(
    not can(*AS_PROCESS_1), reason="unshare (Debian: util-linux) needs to be run by root"
)


def children(pid: int) -> dict[int, str]:
    """Return the children of a process that are not reaped, each with its state (Z: zombie)."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[int(child)] = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    return found


def blocked(pid: int) -> int:
    """Return the mask of blocked signals of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["SigBlk"], 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_signals_blocked_or_ignored_by_the_parent_are_handled(service, wait_for, workers) -> None:
    running = service(TCP, f"--workers={workers}", launcher=program("block_signals"))
    pid = running.process.pid
    assert [blocked(process) for process in (pid, *children(pid))] == [0] * (workers if workers == 1 else 3)
    running.reload()
    if workers > 1:
        # The killed worker is reaped and replaced.
        victim = next(iter(children(pid)))
        os.kill(victim, signal.SIGKILL)
        running.wait_event("worker.killed", pid=victim, signal="SIGKILL")
        os.kill(pid, signal.SIGTTIN)
        running.wait_event("worker.ready", slot=2)
    assert running.stop(signal.SIGINT) == 0
    running.wait_event("stop.requested", signal="SIGINT")


# --- a stop during the start ---


@pytest.fixture
def slow(tmp_path, environment, wait_for) -> Callable[..., subprocess.Popen]:
    """Start a service on a UNIX socket that pauses at a moment of its start; return its process and its pid."""
    copy_hosted("slow", tmp_path)
    started = []

    def start(moment: str, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[subprocess.Popen, int]:
        twistd = [str(Path(sys.executable).with_name("twistd")), "-n", "--pidfile=d.pid", "--logger=slow.logger"]
        process = subprocess.Popen(
            [*launcher, *twistd, "rtservice", "--listen=unix:s", *arguments],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(tmp_path), "SLOW": moment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        wait_for(lambda: (tmp_path / "here").exists() and (tmp_path / "here").read_text() == moment)
        return process, next(iter(children(process.pid))) if launcher else process.pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("workers", "number"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_stop_between_bind_and_serving_removes_socket_and_pidfile(slow, tmp_path, workers, number) -> None:
    process, _ = slow("logger", f"--workers={workers}")
    assert (tmp_path / "s").exists()
    process.send_signal(signal.SIGHUP)  # would end the process if it were not blocked
    process.send_signal(number)
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, "Traceback" in output) == (0, False), output
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "d.pid").exists()


@needs_namespaces
@pytest.mark.parametrize("moment", ["import", "logger"])
def test_a_stop_during_the_start_of_process_1_is_handled(slow, tmp_path, moment) -> None:
    process, pid = slow(moment, "--protocol=slow:Slow", launcher=AS_PROCESS_1)
    os.kill(pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    output, _ = process.communicate(timeout=DEADLINE)
    assert (process.returncode, "Traceback" in output) == (0, False), output
    assert not (tmp_path / "s").exists()


# --- process 1 ---


@needs_namespaces
def test_process_1_reaps_orphans_without_losing_exit_statuses(service, tmp_path, wait_for) -> None:
    copy_hosted("forks", tmp_path)
    services = [
        service(TCP, "--protocol=forks:Forks", f"--workers={count}", launcher=AS_PROCESS_1, PYTHONPATH=str(tmp_path))
        for count in (1, 2)
    ]
    pids = [next(iter(children(running.process.pid))) for running in services]
    for running in services:
        with running.connect() as client:
            client.sendall(b"x")
            assert client.recv(10) == b"7"
    victim = next(iter(children(pids[1])))
    os.kill(victim, signal.SIGKILL)
    services[1].wait_event("worker.killed", signal="SIGKILL")
    for pid in pids:
        wait_for(lambda pid=pid: "Z" not in children(pid).values())
    for running, pid in zip(services, pids, strict=True):
        os.kill(pid, signal.SIGTERM)
        assert running.process.wait(DEADLINE) == 0


# --- no /proc ---


@needs_namespaces
@pytest.mark.parametrize(
    ("workers", "name", "listen"), [(1, "web", "systemd:name=web"), (1, "", "systemd:index=0"), (2, "", "systemd:")]
)
def test_passed_sockets_are_found_without_proc(service, tmp_path, workers, name, listen) -> None:
    # As without a plugin cache: importing endpoints deletes the environment variables.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'twistd' in sys.orig_argv[1]:\n    import twisted.internet.endpoints\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.fileno()
        running = service(
            *(f"--listen={listen}", f"--workers={workers}"),
            launcher=[
                *program("pass_sockets", name, str(number)),
                *("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"),
            ],
            pass_fds=(number,),
            PYTHONPATH=str(tmp_path),
        )
        assert running.port == listening.getsockname()[1]
        with running.connect() as client:
            assert client.recv(22, socket.MSG_WAITALL) == b"Hello from the server!"
        assert running.stop() == 0
