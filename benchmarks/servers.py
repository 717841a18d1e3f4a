"""The measured servers: how each is started, checked for readiness, and stopped.

To add a server, add a line to ``SERVERS``.
"""

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.build import UnavailableError, c_program, go_program

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
GREETING = b"Hello from the server!"
START_SECONDS = 20.0
STOP_SECONDS = 3.0


@dataclass(frozen=True)
class Certificate:
    """PEM files of the certificate that all servers use."""

    key: Path
    certificate: Path


@dataclass(frozen=True)
class Launch:
    """The command that starts a server, and variables that are added to the environment."""

    command: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Server:
    """One server to measure."""

    name: str
    """Name for ``--servers``."""
    title: str
    launch: Callable[[int, Certificate | None], Launch]
    """Returns the launch for a port and, for TLS, a certificate. Raises `UnavailableError`."""
    tls: bool = True
    says: str = ""
    """Text in its log when all of its processes are ready, which a greeting does not show."""


@dataclass(frozen=True)
class Running:
    """A server that accepts connections."""

    port: int
    pids: list[int]
    """The process ids of the server and all descendants."""
    log: Path
    started: float
    """Seconds from the command until it accepted connections."""


def make_certificate(directory: Path) -> Certificate:
    """Create a self-signed ECDSA P-256 certificate with the ``openssl`` command. Raises `UnavailableError`."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise UnavailableError("no openssl on PATH, which is needed for a certificate")
    made = Certificate(directory / "key.pem", directory / "certificate.pem")
    request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    command = [openssl, *request.split(), "-keyout", str(made.key), "-out", str(made.certificate)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnavailableError(f"openssl cannot create a certificate: {done.stderr.strip().splitlines()[-1]}")
    return made


@contextlib.contextmanager
def running(server: Server, cpu: int, log: Path, certificate: Certificate | None) -> Iterator[Running]:
    """Run the server alone on a core: wait until it accepts connections, and stop all of its processes at the end.

    Raises `UnavailableError` with the last line of its output if it does not start.
    """
    port = _free_port()
    launch = server.launch(port, certificate)
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command,
            cwd=ROOT,
            env=os.environ | launch.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )
    try:
        _wait_until_it_accepts(process, port, log, greets=certificate is None, says=server.says)
        yield Running(port, _family(process.pid), log, time.monotonic() - began)
    finally:
        _stop(process)


def last_line(log: Path) -> str:
    """Return the last line that a server has printed, which usually tells why it failed."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _wait_until_it_accepts(
    process: "subprocess.Popen[bytes]", port: int, log: Path, *, greets: bool, says: str
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise UnavailableError(last_line(log))
        # From another address: with the same address at both ends, the kernel may choose the server's port for the
        # client too, and connect the socket to itself.
        try:
            with socket.create_connection(("127.0.0.1", port), 1, source_address=("127.0.0.2", 0)) as client:
                if (not greets or client.recv(len(GREETING))) and says in log.read_text(errors="replace"):
                    return
        except OSError:
            pass
        time.sleep(0.02)
    raise UnavailableError(f"does not accept connections after {START_SECONDS:.0f} s: {last_line(log)}")


def _family(pid: int) -> list[int]:
    """Return the process ids of a process and its descendants."""
    pids = [pid]
    for parent in pids:
        for task in Path(f"/proc/{parent}/task").iterdir():
            with contextlib.suppress(OSError):  # a thread that has just ended
                pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def _stop(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _twistd() -> str:
    twistd = Path(sys.executable).with_name("twistd")
    if not twistd.exists():
        raise UnavailableError(f"no twistd beside {sys.executable}")
    return str(twistd)


def _description(port: int, certificate: Certificate | None) -> str:
    """Return the endpoint description of the port."""
    if certificate is None:
        return f"tcp:{port}:interface=127.0.0.1"
    files = f"privateKey={certificate.key}:certKey={certificate.certificate}"
    return f"ssl:{port}:interface=127.0.0.1:{files}"


def _arguments(port: int, certificate: Certificate | None) -> list[str]:
    """Return the arguments that all peers accept."""
    files = [certificate.key, certificate.certificate] if certificate else []
    return [str(port), *map(str, files)]


def _rtservice(port: int, certificate: Certificate | None) -> Launch:
    command = [_twistd(), "-n", "--pidfile=", "rtservice", "--listen", _description(port, certificate)]
    return Launch(command, {})


def _workers(port: int, certificate: Certificate | None) -> Launch:
    launch = _rtservice(port, certificate)
    return Launch([*launch.command, "--workers", "2"], launch.environment)


def _hosted(port: int, certificate: Certificate | None) -> Launch:
    launch = _rtservice(port, certificate)
    launch.command.append("--protocol=benchmarks.peers.echo_hosted:Echo")
    return Launch(launch.command, {"PYTHONPATH": str(ROOT)})


def _stock_twisted(port: int, certificate: Certificate | None) -> Launch:
    command = [_twistd(), "-n", "--pidfile=", "-y", str(PEERS / "echo_twisted.py")]
    return Launch(command, {"ECHO_ENDPOINT": _description(port, certificate)})


def _python(module: str, requires: str | None = None) -> Callable[[int, Certificate | None], Launch]:
    def launch(port: int, certificate: Certificate | None) -> Launch:
        if requires and importlib.util.find_spec(requires) is None:
            raise UnavailableError(f"{requires} is not installed")
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", *_arguments(port, certificate)]
        return Launch(command, {})

    return launch


def _go(port: int, certificate: Certificate | None) -> Launch:
    return Launch([str(go_program("peers/echo.go")), *_arguments(port, certificate)], {})


def _node(port: int, certificate: Certificate | None) -> Launch:
    node = shutil.which("node")
    if node is None:
        raise UnavailableError("no node on PATH")
    return Launch([node, str(PEERS / "echo.js"), *_arguments(port, certificate)], {})


def _c(port: int, certificate: Certificate | None) -> Launch:
    return Launch([str(c_program("peers/echo.c")), str(port)], {})


SUBJECT = Server("rtservice", "rtservice", _rtservice)

SERVERS = (
    SUBJECT,
    Server("workers", "rtservice, 2 workers", _workers, says="listening on"),
    # Should equal rtservice's own echo, which uses the same API.
    Server("hosted", "hosted", _hosted),
    Server("twisted", "Twisted, stock", _stock_twisted),
    Server("streams", "asyncio streams", _python("echo_streams")),
    Server("asyncio", "asyncio Protocol", _python("echo_asyncio")),
    Server("uvloop", "uvloop Protocol", _python("echo_uvloop", requires="uvloop")),
    Server("node", "Node", _node),
    Server("go", "Go", _go),
    Server("c", "C epoll", _c, tls=False),
)
