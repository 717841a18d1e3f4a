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
class Place:
    """Where a process of a server listens on 127.0.0.1, and what it uses."""

    port: int
    certificate: Certificate | None = None
    redis: int | None = None
    """The port of Redis."""


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
    launch: Callable[[Place], Launch]
    """Returns the launch for a place. Raises `UnavailableError`."""
    tls: bool = True
    says: str = ""
    """Text in its log when all of its processes are ready, which a greeting does not show."""
    broadcasts: bool = False
    """Sends each line of a client to all clients, for ``fanout``. Otherwise it echoes."""
    redis: bool = False
    """Uses a redis-server, which is started before it."""
    launches: int = 1
    """Number of times that it is started, each on its own port. All use the same redis-server."""


@dataclass(frozen=True)
class Running:
    """A server that accepts connections."""

    ports: list[int]
    pids: list[int]
    """The process ids of the server and all descendants."""
    engine_pids: list[int]
    """The process id of Redis, if it is used."""
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

    Redis, if the server uses it, runs on the same core. Raises `UnavailableError` with the last line of the output if
    a process does not start.
    """
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(_running_redis(cpu, log.with_suffix(".redis.log"))) if server.redis else None
        ports, pids = [], []
        began = time.monotonic()
        for number in range(server.launches):
            place = Place(_free_port(), certificate, redis.port if redis else None)
            output = log.with_suffix(f".{number}.log")
            process = stack.enter_context(_started(server.launch(place), cpu, output))
            _wait_until_it_accepts(process, place.port, output, greets=certificate is None, says=server.says)
            ports.append(place.port)
            pids += _family(process.pid)
        yield Running(ports, pids, [redis.pid] if redis else [], time.monotonic() - began)


@contextlib.contextmanager
def _started(launch: Launch, cpu: int, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a process on a core, and stop it and its descendants at the end."""
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
        yield process
    finally:
        _stop(process)


@dataclass(frozen=True)
class _Redis:
    port: int
    pid: int


@contextlib.contextmanager
def _running_redis(cpu: int, log: Path) -> Iterator[_Redis]:
    """Run a redis-server that stores nothing on disk."""
    program = shutil.which("redis-server")
    if program is None:
        raise UnavailableError("no redis-server on PATH")
    port = _free_port()
    options = f"--port {port} --bind 127.0.0.1 --save --appendonly no"
    with _started(Launch([program, *options.split()], {}), cpu, log) as process:
        _wait_until_it_accepts(process, port, log, greets=False, says="Ready to accept connections")
        yield _Redis(port, process.pid)


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


def _description(place: Place) -> str:
    """Return the endpoint description of the port."""
    if place.certificate is None:
        return f"tcp:{place.port}:interface=127.0.0.1"
    files = f"privateKey={place.certificate.key}:certKey={place.certificate.certificate}"
    return f"ssl:{place.port}:interface=127.0.0.1:{files}"


def _arguments(place: Place) -> list[str]:
    """Return the arguments that all peers accept: the port, and the files of the certificate or the port of Redis."""
    files = [place.certificate.key, place.certificate.certificate] if place.certificate else []
    return [str(place.port), *map(str, files), *([str(place.redis)] if place.redis else [])]


def _rtservice(place: Place) -> Launch:
    command = [_twistd(), "-n", "--pidfile=", "rtservice", "--listen", _description(place)]
    return Launch(command, {})


def _workers(place: Place) -> Launch:
    launch = _rtservice(place)
    return Launch([*launch.command, "--workers", "2"], launch.environment)


def _hub(*options: str) -> Callable[[Place], Launch]:
    def launch(place: Place) -> Launch:
        command = [*_rtservice(place).command, "--protocol=benchmarks.peers.broadcast_hosted:Broadcast", *options]
        if place.redis:
            command.append(f"--hub=redis://127.0.0.1:{place.redis}/0")
        return Launch(command, {"PYTHONPATH": str(ROOT)})

    return launch


def _hosted(place: Place) -> Launch:
    launch = _rtservice(place)
    launch.command.append("--protocol=benchmarks.peers.echo_hosted:Echo")
    return Launch(launch.command, {"PYTHONPATH": str(ROOT)})


def _stock_twisted(place: Place) -> Launch:
    command = [_twistd(), "-n", "--pidfile=", "-y", str(PEERS / "echo_twisted.py")]
    return Launch(command, {"ECHO_ENDPOINT": _description(place)})


def _python(module: str, requires: str | None = None) -> Callable[[Place], Launch]:
    def launch(place: Place) -> Launch:
        if requires and importlib.util.find_spec(requires) is None:
            raise UnavailableError(f"{requires} is not installed")
        command = [sys.executable, "-m", f"benchmarks.peers.{module}", *_arguments(place)]
        return Launch(command, {})

    return launch


def _go(place: Place) -> Launch:
    return Launch([str(go_program("peers/echo.go")), *_arguments(place)], {})


def _node(script: str) -> Callable[[Place], Launch]:
    def launch(place: Place) -> Launch:
        node = shutil.which("node")
        if node is None:
            raise UnavailableError("no node on PATH")
        return Launch([node, str(PEERS / script), *_arguments(place)], {})

    return launch


def _c(place: Place) -> Launch:
    return Launch([str(c_program("peers/echo.c")), str(place.port)], {})


_fan_asyncio, _fan_asyncio_redis = _python("broadcast_asyncio"), _python("broadcast_asyncio", requires="redis")
_fan_node = _node("broadcast.js")

SERVERS = (
    Server("rtservice", "rtservice", _rtservice),
    Server("workers", "rtservice, 2 workers", _workers, says="listening on"),
    # Should equal rtservice's own echo, which uses the same API.
    Server("hosted", "hosted", _hosted),
    Server("twisted", "Twisted, stock", _stock_twisted),
    Server("streams", "asyncio streams", _python("echo_streams")),
    Server("asyncio", "asyncio Protocol", _python("echo_asyncio")),
    Server("uvloop", "uvloop Protocol", _python("echo_uvloop", requires="uvloop")),
    Server("node", "Node", _node("echo.js")),
    Server("go", "Go", _go),
    Server("c", "C epoll", _c, tls=False),
    # For fan-out. One process; two workers of one service; one or two services of one process with Redis.
    Server("hub", "rtservice", _hub(), broadcasts=True),
    Server("hub-mesh", "rtservice, 2 workers", _hub("--workers=2"), says="listening on", broadcasts=True),
    Server("hub-redis", "rtservice + Redis", _hub(), broadcasts=True, redis=True),
    Server("hub-redis-2", "2 rtservice + Redis", _hub(), broadcasts=True, redis=True, launches=2),
    Server("fan-asyncio", "asyncio", _fan_asyncio, broadcasts=True),
    Server("fan-asyncio-redis", "asyncio + Redis", _fan_asyncio_redis, broadcasts=True, redis=True),
    Server("fan-asyncio-redis-2", "2 asyncio + Redis", _fan_asyncio_redis, broadcasts=True, redis=True, launches=2),
    Server("fan-node", "Node", _fan_node, broadcasts=True),
    Server("fan-node-redis", "Node + Redis", _fan_node, broadcasts=True, redis=True),
    Server("fan-node-redis-2", "2 Node + Redis", _fan_node, broadcasts=True, redis=True, launches=2),
)
