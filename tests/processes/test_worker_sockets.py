"""Listening sockets of every kind, with workers."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import connect, greeted
from tests.support.deadline import DEADLINE
from tests.support.listen_options import TCP
from tests.support.listening import port_of
from tests.support.load import Load, assert_no_client_lost
from tests.support.processes import alive, children
from twisted import plugins

# --- balance ---


def test_sequential_connections_are_balanced_over_the_workers(workers, wait_for) -> None:
    running = workers("--workers=4", TCP)
    port = running.service.port
    for _ in range(800):
        with greeted(port) as client:
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
    wait_for(lambda: len(running.recorded("connection.closed")) == 800)
    counts = Counter(str(event["slot"]) for event in running.recorded("connection.closed"))
    assert len(counts) == 4
    assert max(counts.values()) <= 1.5 * min(counts.values()), counts


# --- sockets of every kind ---


@pytest.fixture
def privileged_port() -> int:
    """A free port below 1024."""
    if os.getuid() != 0:
        pytest.skip("only root can bind a privileged port and change the user")
    for port in range(1023, 600, -1):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("every port below 1024 is in use")


def unprivileged_user_can_run(interpreter: str) -> bool:
    try:
        result = subprocess.run([interpreter, "-c", "import ssl"], user="nobody", group="nogroup", cwd="/", check=False)
    except OSError:
        return False
    return result.returncode == 0


@pytest.fixture
def run_for_all(environment) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Run twistd with an interpreter and packages that every user can execute and read."""
    interpreters = [sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"]
    interpreter = next(filter(unprivileged_user_can_run, interpreters), None)
    if interpreter is None:
        pytest.skip("no interpreter of the version of this one that an unprivileged user can run")
    with tempfile.TemporaryDirectory() as name:
        packages = Path(name)
        packages.chmod(0o755)
        for module in ("twisted", "zope.interface", "attr", "attrs", "automat", "constantly", "hyperlink", "idna"):
            copy_package(module, packages)
        for module in ("incremental", "typing_extensions", "rtservice"):
            copy_package(module, packages)
        plugin = next(Path(place) / "rtservice_plugin.py" for place in plugins.__path__ if has_plugin(Path(place)))
        shutil.copy(plugin, packages / "twisted" / "plugins")

        def run(*arguments: str) -> subprocess.CompletedProcess:
            twistd = [interpreter, "-c", "from twisted.scripts.twistd import run; run()"]
            env = {**environment, "PYTHONPATH": name}
            # Supplementary groups of root, which the service must drop.
            groups = [4, 27] if os.getuid() == 0 else None
            return subprocess.run(
                [*twistd, *arguments], env=env, capture_output=True, text=True, timeout=DEADLINE, extra_groups=groups
            )

        yield run


def has_plugin(directory: Path) -> bool:
    return (directory / "rtservice_plugin.py").exists()


def copy_package(module: str, to: Path) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin)
    target = to / module.replace(".", "/")
    if source.name == "__init__.py":
        shutil.copytree(source.parent, target, ignore=shutil.ignore_patterns("test", "__pycache__"))
    else:
        shutil.copy(source, to)


def test_a_daemon_that_dropped_privileges_serves_with_workers_on_a_privileged_port(
    run_for_all, public_directory, privileged_port, certificates, wait_for
) -> None:
    here, port = public_directory, privileged_port
    shutil.copy(certificates["server.pem"], here)
    shutil.copy(certificates["server.key"], here)
    (here / "server.key").chmod(0o600)
    log = here / "d.log"
    log.touch()
    shutil.chown(log, "nobody")  # required for rotation by twistd
    result = run_for_all(
        *(f"--pidfile={here}/d.pid", f"--logfile={log}", f"--rundir={here}", "--uid=nobody", "--gid=nogroup"),
        *("rtservice", "--workers=2", "--listen=unix:s:mode=666"),
        f"--listen=ssl:{port}:interface=127.0.0.1:privateKey=server.key:certKey=server.pem",
    )
    assert (result.returncode, result.stderr) == (0, "")
    pid = int((here / "d.pid").read_text())  # the command returns once every listener is open
    pids = children(pid)
    try:
        wait_for(lambda: "listening on" in log.read_text())
        assert len(pids) == 2
        for process in (pid, *pids):
            status = Path(f"/proc/{process}/status").read_text()
            assert set(re.search(r"Uid:(.*)", status)[1].split()) == {"65534"}
            assert set(re.search(r"Gid:(.*)", status)[1].split()) == {"65534"}
            assert set(re.search(r"Groups:(.*)", status)[1].split()) == {"65534"}
        with (
            Load(port=port, short=4, long=4, ca=certificates["ca.pem"]) as load,
            Load(path=f"{here}/s", short=4, long=4) as local,
        ):
            load.more(20)
            for count in range(1, 4):
                os.kill(pid, signal.SIGTTIN)
                wait_for(lambda count=count: len(re.findall("worker 2 .* is ready", log.read_text())) == count)
                load.more(20)
                os.kill(pid, signal.SIGTTOU)
                wait_for(lambda count=count: len(re.findall("slot 2 removed", log.read_text())) == count)
            pids = children(pid)
            os.kill(pid, signal.SIGHUP)
            # None of these processes can read the key: the workers keep serving.
            line = wait_for(lambda: re.search("reload failed, .*", log.read_text()))[0]
            assert "server.key" in line
            load.more(20)
            os.kill(pid, signal.SIGUSR1)
            wait_for(lambda: (here / "d.log.1").exists())
            load.more(20)
            wait_for(lambda: "bytes in" in log.read_text())
            assert_no_client_lost(load.stop())
            assert_no_client_lost(local.stop())
        assert children(pid) == pids
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(alive(process) for process in (pid, *pids)))
    assert {path.name for path in here.iterdir()} == {"d.log", "d.log.1", "server.pem", "server.key"}
    assert re.search(r"\[rtservice#info\] drained: \d+ ended, 0 aborted", log.read_text())
    assert len(re.findall(r"worker \d\] drained: ", log.read_text())) == 2


def test_adding_workers_beyond_the_reserve_sockets_is_refused(
    run_for_all, public_directory, privileged_port, wait_for
) -> None:
    here = public_directory
    log = here / "d.log"
    result = run_for_all(
        *(f"--pidfile={here}/d.pid", f"--logfile={log}", f"--rundir={here}", "--uid=nobody", "rtservice"),
        *("--workers=2", f"--listen=tcp:{privileged_port}:interface=127.0.0.1"),
    )
    assert (result.returncode, result.stderr) == (0, "")
    pid = int((here / "d.pid").read_text())
    pids = children(pid)
    try:
        for process in (pid, *pids):
            status = Path(f"/proc/{process}/status").read_text()
            for field in ("Uid", "Gid", "Groups"):  # without --gid
                assert set(re.search(rf"{field}:(.*)", status)[1].split()) == {"65534"}
        for slot in range(2, 10):
            os.kill(pid, signal.SIGTTIN)
            wait_for(lambda slot=slot: f"worker {slot} " in log.read_text())
        os.kill(pid, signal.SIGTTIN)
        wait_for(lambda: re.search("worker not added: tcp:.* has no reserve socket left: 8 ", log.read_text()))
        pids = wait_for(lambda: len(found := children(pid)) == 10 and found)
        for _ in range(20):
            greeted(privileged_port).close()
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not any(alive(process) for process in (pid, *pids)))


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None,
    reason="systemd-socket-activate (Debian: systemd) is not installed",
)
def test_passed_sockets_are_shared_by_the_workers(workers, tmp_path, wait_for) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = f"{tmp_path}/activated"
    client_thread = threading.Thread(target=lambda: (wait_for(lambda: os.path.exists(path)), greeted(path).close()))
    client_thread.start()  # the first connection activates the service
    activate = ["systemd-socket-activate", "-l", f"127.0.0.1:{port}", "-l", path, "-E", "PYTHONUNBUFFERED=1"]
    running = workers("--listen=systemd:", launcher=activate)
    client_thread.join(DEADLINE)
    with Load(port=port, short=16, long=16) as load, Load(path=path, short=16, long=16) as local:
        for count in range(1, 4):
            load.more(30)
            local.more(30)
            running.send(signal.SIGHUP)
            running.wait_event("reload.done", count)
            running.send(signal.SIGTTIN)
            running.wait_event("worker.ready", count, slot=2)
            running.send(signal.SIGTTOU)
            running.wait_event("slot.removed", count, slot=2)
        assert_no_client_lost(load.stop())
        assert_no_client_lost(local.stop())
    assert running.stop() == 0
    assert os.path.exists(path)


def test_reloads_lose_no_client_with_tls_proxy_headers_and_unix_sockets(workers, certificates, tmp_path) -> None:
    tls = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    running = workers(f"--listen=proxy:ssl:0:interface=127.0.0.1:{tls}", "--listen=unix:s")
    port = port_of(running, "proxy:ssl")
    with (
        Load(port=port, short=8, long=8, ca=certificates["ca.pem"], proxied=True) as load,
        Load(path=f"{tmp_path}/s", short=8, long=8) as local,
    ):
        for count in range(1, 4):
            load.more(20)
            running.send(signal.SIGHUP)
            running.wait_event("reload.done", count)
        assert_no_client_lost(load.stop())
        assert_no_client_lost(local.stop())
    running.wait_event("connection.closed", peer="192.0.2.1:4711", listener=re.compile("^proxy:ssl:"))
    assert running.stop() == 0
    assert not (tmp_path / "s").exists()


def test_every_worker_uses_a_renewed_certificate_after_a_reload(workers, certificates, tmp_path) -> None:
    for name in ("server.pem", "server.key"):
        shutil.copy(certificates[name], tmp_path)
    running = workers("--listen=ssl:0:interface=127.0.0.1:privateKey=server.key:certKey=server.pem")
    for name in ("pem", "key"):
        shutil.copy(certificates[f"rsa.{name}"], tmp_path / f"server.{name}")
    running.send(signal.SIGHUP)
    running.wait_event("drain.started", 2)
    wanted = ssl.PEM_cert_to_DER_cert(Path(certificates["rsa.pem"]).read_text())
    context = ssl.create_default_context(cafile=certificates["ca.pem"])
    for _ in range(20):
        with context.wrap_socket(connect(running.service.port), server_hostname="localhost") as client:
            assert client.getpeercert(binary_form=True) == wanted
    assert running.stop() == 0
