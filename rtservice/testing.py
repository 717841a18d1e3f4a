"""Pytest fixtures for tests of a protocol: serve it in the process of the test, or in a real `twistd`.

`pytest_plugins = "rtservice.testing"` in a test module or `conftest.py` makes the fixtures available. They need pytest.
`serve` also needs pytest-twisted.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred

from rtservice.net.connection import Connection
from rtservice.net.port import Port

DEADLINE = 30  # seconds for something that takes a fraction of one; generous, since test machines are busy


@pytest.fixture
def serve() -> Iterator[Callable[..., Port]]:
    """Serve a factory on a free port of 127.0.0.1, in the reactor of pytest-twisted: `port = serve(factory)`.

    `port.getHost().port` is the port number. With `tls`, an `ssl.SSLContext`, connections use TLS. Connections that are
    open when the test ends are aborted, and their protocols get connectionLost before the next test.
    """
    from pytest_twisted import blockon  # type: ignore[import-untyped]  # it is not
    from twisted.internet import reactor

    ports: list[Port] = []
    opened: dict[Connection, None] = {}
    empty: list[Deferred[None]] = []

    def closed(connection: Connection, reason: object) -> None:
        opened.pop(connection, None)
        if empty and not opened:
            empty.pop().callback(None)

    def start(factory: Any, tls: ssl.SSLContext | None = None) -> Port:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        name = f"tcp:127.0.0.1:{listening.getsockname()[1]}"
        port = Port(
            reactor,
            listening,
            factory,
            name=name,
            tls=tls,
            opened=lambda connection: opened.update({connection: None}),
            closed=closed,
        )
        ports.append(port)
        port.startListening()
        return port

    yield start
    for port in ports:
        port.stopListening()
        port.socket.close()
    if opened:
        empty.append(Deferred())
        waiting = empty[0]
        for connection in list(opened):
            connection.abortConnection()
        blockon(waiting)


class Service:
    """A `twistd` process in the foreground. `lines` contains its output so far."""

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: dict[str, str],
        launcher: list[str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [*(launcher or []), *command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="backslashreplace",
            pass_fds=pass_fds,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.lines.append("<end of output>")
            self._news.notify_all()

    def wait_line(self, pattern: str, count: int = 1) -> str:
        """Wait for the line number `count` that matches a regular expression. Raises AssertionError after DEADLINE."""
        end = time.monotonic() + DEADLINE
        with self._news:
            while True:
                found = [line for line in self.lines if re.search(pattern, line)]
                if len(found) >= count:
                    return found[count - 1]
                ended = self.lines and self.lines[-1] == "<end of output>"
                if ended or not self._news.wait(end - time.monotonic()):
                    raise AssertionError(f"no line {pattern!r} in:\n" + "\n".join(self.lines))

    @property
    def port(self) -> int:
        """The TCP port that the service listens on."""
        return int(self.wait_line(r"listening on (?:tcp|ssl):.*:\d+$").rpartition(":")[2])

    @property
    def peak_memory(self) -> int:
        """The highest resident memory of the process so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def connect(self) -> socket.socket:
        """Connect to the service, and return the socket."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)

    def reload(self) -> str:
        """Send SIGHUP, wait for the log line with the result, and return it."""
        told = r"rtservice.*\] (reloaded[;:] |nothing is reloaded|workers are not replaced: )"
        before = sum(bool(re.search(told, line)) for line in self.lines)
        self.process.send_signal(signal.SIGHUP)
        return self.wait_line(told, before + 1)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        """Send a signal, wait until the process has exited, and return its exit status: 0 after a graceful shutdown."""
        self.process.send_signal(sig)
        status = self.process.wait(DEADLINE)
        self._close(DEADLINE)
        return status

    def _close(self, seconds: float) -> None:
        assert self.process.stdout is not None
        self._reader.join(seconds)
        if not self._reader.is_alive():  # another process may have the other end open
            self.process.stdout.close()

    def kill(self) -> None:
        """Kill the process if it is running."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._close(1)


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Serve a protocol in a real `twistd rtservice`: `service = hosted("mine:Factory", "--workers=2")`.

    The service listens on a free port of 127.0.0.1, unless an argument sets another. It runs in `tmp_path`, with the
    import path of the test. Keywords are environment variables. Returns a `Service`.
    """
    started: list[Service] = []

    def start(protocol: str, *arguments: str, **env: str) -> Service:
        twistd = [str(Path(sys.executable).parent / "twistd"), "--nodaemon", "--pidfile=", "rtservice"]
        where = any(argument.startswith(("--listen", "--port", "-l", "-p")) for argument in arguments)
        listen = [] if where else ["--listen=tcp:0:interface=127.0.0.1"]
        importable = os.pathsep.join(filter(None, sys.path))
        one = Service(
            [*twistd, f"--protocol={protocol}", *listen, *arguments],
            tmp_path,
            {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": importable, **env},
        )
        started.append(one)
        one.wait_line("listening on")
        return one

    yield start
    for one in started:
        one.kill()
