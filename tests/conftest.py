"""Fixtures for `twistd` processes and certificates, and the check that CI skips no tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from twisted.logger import LogEvent, globalLogPublisher
from twisted.python.failure import Failure

from tests.support.commands import BIN
from tests.support.deadline import DEADLINE

# These variables are settings: the environment of the developer must not affect the tests.
for name in [name for name in os.environ if name.startswith("RTSERVICE_")]:
    del os.environ[name]

# Tests in this process run on the reactor of rtservice, like a service; on Twisted's if TESTS_ON_STOCK_REACTOR is set.
if sys.platform == "linux" and "TESTS_ON_STOCK_REACTOR" not in os.environ:
    from rtservice.net import reactor

    reactor.install()

# rtservice.testing imports the reactor; `hosted`, `hub`, `hubs` and `serve` are fixtures.
from rtservice.testing import JSON_LOGGER, Service, hosted, hub, hubs, serve  # noqa: E402, F401  # see above
from tests.support import checked_events  # noqa: E402  # after the reactor is chosen

checked_events.install()


@pytest.fixture(autouse=True)
def check_declared_fields() -> Iterator[None]:
    """Check that the events logged in this process have exactly their declared fields."""
    checked_events.found.clear()
    yield
    assert checked_events.found == []


@pytest.fixture(autouse=True)
def raise_logged_assertions() -> Iterator[None]:
    """Fail a test for an assertion that failed in a callback and was logged, for example in a receiver of the hub."""
    logged: list[Failure] = []

    def observe(event: LogEvent) -> None:
        failure = event.get("log_failure")
        if failure is not None and failure.check(AssertionError):
            logged.append(failure)

    globalLogPublisher.addObserver(observe)
    yield
    globalLogPublisher.removeObserver(observe)
    for failure in logged:
        failure.raiseException()


@pytest.fixture
def environment() -> dict[str, str]:
    """The environment of a user without settings of rtservice."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def service(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[..., Service]]:
    """Start `twistd -n rtservice` with arguments, and wait until it listens."""
    started: list[Service] = []

    def start(
        *arguments: str,
        twistd: tuple[str, ...] = (),
        launcher: list[str] | None = None,
        pass_fds: tuple[int, ...] = (),
        awaits: str = "",
        **env: str,
    ) -> Service:
        logger = () if any(option.startswith("--logger=") for option in twistd) else (JSON_LOGGER,)
        command = [str(BIN / "twistd"), "--nodaemon", "--pidfile=", *logger, *twistd, "rtservice", *arguments]
        running = Service(command, tmp_path, {**environment, **env}, launcher or [], pass_fds)
        started.append(running)
        if awaits or not logger:
            running.wait_line(awaits or "listening on")
        else:
            running.wait_event("listener.listening")
        return running

    yield start
    for running in started:
        running.kill()


@pytest.fixture
def run(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a `twistd` command line that is expected to exit."""

    def run_to_exit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "twistd"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=DEADLINE)

    return run_to_exit


@pytest.fixture
def read_all() -> Callable[[socket.socket], bytes]:
    """Read a socket until end of file."""

    def read(sock: socket.socket) -> bytes:
        received = bytearray()
        while data := sock.recv(1 << 20):
            received += data
        return bytes(received)

    return read


@pytest.fixture
def wait_for() -> Callable[..., Any]:
    """Wait until a function returns a true value, and return it."""

    def wait(condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + DEADLINE
        pause = threading.Event()
        while not (value := condition()):
            assert time.monotonic() < end, "the deadline has passed"
            pause.wait(0.02)
        return value

    return wait


@pytest.fixture
def wait_listening(wait_for) -> Callable[[Path], None]:
    """Wait until a process listens on a UNIX socket; bind() creates its file before listen()."""

    def is_listening(path: Path) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            probe.connect(str(path))
            return True
        return False

    return lambda path: wait_for(lambda: is_listening(path))


class Certificates:
    """Certificates and keys in PEM files of one directory, created by `openssl`: NAME.pem and NAME.key.

    `ca` is a root; `server` and `rsa` (for localhost) and `client` are signed by it. `inner` is an authority below the
    root, and `leaf` is for localhost and signed by that. `other` is a second root, with a client `stranger`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        # The configuration of the system would add extensions.
        (directory / "openssl.cnf").write_text("[req]\ndistinguished_name = dn\n[dn]\n")
        self.make("ca", "authority")
        self.make("other", "authority")
        self.make("server", "server", "ca")
        self.make("rsa", "server", "ca", newkey=("rsa:2048",))
        self.make("client", "client", "ca")
        self.make("stranger", "client", "other")
        self.make("inner", "authority", "ca")
        self.make("leaf", "server", "inner")

    def make(
        self,
        name: str,
        kind: Literal["authority", "server", "client"],
        issuer: str = "",
        *,
        newkey: tuple[str, ...] = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        alternative: str = "DNS:localhost,IP:127.0.0.1",
        days: int = 90,
    ) -> None:
        """Create a key and a certificate for it; without an issuer it is self-signed.

        The certificate of a server is for its `alternative` names, or without them for its common name, NAME.
        """
        extensions = ["subjectKeyIdentifier=hash"]
        if kind == "authority":
            extensions += ["basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign"]
        else:
            extensions += ["basicConstraints=critical,CA:FALSE", "keyUsage=critical,digitalSignature"]
            extensions += [f"extendedKeyUsage={kind}Auth"]
        if kind == "server" and alternative:
            extensions += [f"subjectAltName={alternative}"]
        if issuer:
            extensions += ["authorityKeyIdentifier=keyid"]
        self.openssl(
            *("req", "-x509", "-sha256", "-nodes", "-days", str(days), "-config", self["openssl.cnf"]),
            *("-newkey", *newkey, "-keyout", self[f"{name}.key"], "-out", self[f"{name}.pem"]),
            *("-subj", f"/CN={'localhost' if kind == 'server' and alternative else name}"),
            *(word for extension in extensions for word in ("-addext", extension)),
            *(("-CA", self[f"{issuer}.pem"], "-CAkey", self[f"{issuer}.key"]) if issuer else ()),
        )

    def openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=DEADLINE)

    def __getitem__(self, file: str) -> str:
        """Return the path of a file, such as `server.key`."""
        return str(self.directory / file)

    def join(self, name: str, *files: str) -> str:
        """Create a file with the contents of these; return its path."""
        (self.directory / name).write_text("".join(Path(self[file]).read_text() for file in files))
        return self[name]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates of authorities, servers and clients; see Certificates."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl (Debian: openssl) is not installed")
    return Certificates(tmp_path_factory.mktemp("certificates"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("TESTS_SKIP_NOTHING"):
        return
    # Some hosts cannot boot a container, even with everything installed.
    if any("no systemd can be booted here" not in running.longrepr[2] for running in reporter.stats.get("skipped", ())):
        reporter.write_line("tests were skipped although TESTS_SKIP_NOTHING is set", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def trusting(certificates: Certificates) -> ssl.SSLContext:
    """A client context that trusts the root certificate."""
    return ssl.create_default_context(cafile=certificates["ca.pem"])
