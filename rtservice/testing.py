"""Pytest fixtures for tests of a protocol: serve it in the process of the test, or in a real `twistd`.

`pytest_plugins = "rtservice.testing"` in a test module or `conftest.py` makes the fixtures available. They need
pytest, and all except `hosted` also pytest-twisted: `pip install 'rtservice[testing]'`.
"""

from __future__ import annotations

import contextlib
import json
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
from typing import Any, TypeVar

import pytest
from twisted.internet.defer import Deferred, gatherResults
from twisted.logger import Logger
from zope.interface import implementer

from rtservice.hub.hub import Hub
from rtservice.hub.local import LocalCarrier
from rtservice.hub.mesh import MeshCarrier
from rtservice.interfaces import IReceiver
from rtservice.net.connection import Connection
from rtservice.net.port import Port
from rtservice.pool.mesh_links import LinkChannel, MeshLinks

_T = TypeVar("_T")

_log = Logger()

DEADLINE = 30  # seconds for something that takes a fraction of one; generous, since test machines are busy


class _Process:
    """A process with a hub, inside the process of the test: what `MeshCarrier` asks of a worker."""

    def __init__(self, reactor: Any, links: MeshLinks) -> None:
        self.problems: list[str] = []
        self._links = links
        self._channel = LinkChannel(reactor)
        self.hub = Hub(MeshCarrier(self._channel.inherited.detach(), self, _log), _log)

    def join_mesh(self) -> None:
        """Link this process with the others."""
        self._links.add(self._channel)

    def end(self) -> None:
        """Close the channel, after the hub has stopped."""
        self._links.remove(self._channel)

    def report_peer(self, incarnation: int, problem: str) -> None:
        """Keep the problem of a peer, which fails the test."""
        self.problems.append(f"hub {incarnation} {problem}")

    def failed(self, problem: str) -> None:
        """Keep the problem of this process, which fails the test."""
        self.problems.append(f"a hub cannot be linked: {problem}")


def _stop(hubs: list[Hub]) -> None:
    from pytest_twisted import blockon  # type: ignore[import-untyped]  # it is not

    blockon(gatherResults([hub.stop() for hub in hubs]))


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The hub of a service with one process, for a factory that provides IHubUser: `factory.use(hub)`.

    It provides IHub. `hub.gap(topic)` reports a gap to the receivers of a topic, as after the loss of a message. The
    hub stops at the end of the test, after the connections of `serve` are closed.
    """
    from twisted.internet import reactor

    started = Hub(LocalCarrier(), _log)
    started.start(reactor)
    yield started
    _stop([started])


@pytest.fixture
def hubs() -> Iterator[Callable[[int], list[Hub]]]:
    """Start hubs that are linked as those of workers, all in the process of the test: `first, second = hubs(2)`.

    Each is for a factory that stands for the one of a worker process. See `hub`.
    """
    from twisted.internet import reactor

    processes: list[_Process] = []

    def start(count: int) -> list[Hub]:
        links = MeshLinks()
        added = [_Process(reactor, links) for _ in range(count)]
        processes.extend(added)
        for process in added:
            process.hub.start(reactor)
        return [process.hub for process in added]

    yield start
    _stop([process.hub for process in processes])
    for process in processes:
        process.end()
    assert not [problem for process in processes for problem in process.problems]


@implementer(IReceiver)
class RecordingReceiver:
    """A receiver for `hub.subscribe` that keeps what it receives.

    `messages` is the list of all messages, `gaps` the list of the topics of all gaps, and `events` has both in their
    order: a message, or None for a gap.
    """

    def __init__(self) -> None:
        self.events: list[bytes | None] = []
        self.messages: list[bytes] = []
        self.gaps: list[str] = []
        self._waiting: list[tuple[list[Any], int, Deferred[None]]] = []

    def received(self, topic: str, message: bytes) -> None:
        """Keep a message."""
        self.events.append(message)
        self.messages.append(message)
        self._check()

    def gap(self, topic: str) -> None:
        """Keep a gap."""
        self.events.append(None)
        self.gaps.append(topic)
        self._check()

    def wait(self, count: int) -> Deferred[list[bytes]]:
        """Wait for this number of messages, and return all messages.

        The number includes those that were received before. The Deferred fails with AssertionError after 30 seconds.
        """
        return self._wait(self.messages, count, "messages")

    def wait_gap(self, count: int = 1) -> Deferred[list[str]]:
        """Wait for this number of gaps, and return the topics of all gaps. Otherwise as `wait`."""
        return self._wait(self.gaps, count, "gaps")

    def _wait(self, kept: list[_T], count: int, what: str) -> Deferred[list[_T]]:
        from twisted.internet import reactor

        reached: Deferred[None] = Deferred()
        self._waiting.append((kept, count, reached))

        def late() -> None:
            self._waiting.remove((kept, count, reached))
            reached.errback(AssertionError(f"{len(kept)} of {count} {what} after {DEADLINE} s: {self.events}"))

        timer = reactor.callLater(DEADLINE, late)

        def finished(result: Any) -> Any:
            if timer.active():
                timer.cancel()
            return result

        self._check()
        return reached.addBoth(finished).addCallback(lambda _: list(kept))

    def _check(self) -> None:
        """Fire the Deferreds whose number is reached."""
        reached = [waiting for waiting in self._waiting if len(waiting[0]) >= waiting[1]]
        for waiting in reached:
            self._waiting.remove(waiting)
        for _, _, deferred in reached:
            deferred.callback(None)


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[..., Port]]:
    """Serve a factory on a free port of 127.0.0.1, in the reactor of pytest-twisted: `port = serve(factory)`.

    `port.getHost().port` is the port number. With `tls`, an `ssl.SSLContext`, connections use TLS. Connections that are
    open when the test ends are aborted, and their protocols get connectionLost before the next test.
    """
    from pytest_twisted import blockon
    from twisted.internet import reactor

    # Set up before `serve`, they stop after the connections are closed, as in a service.
    for name in {"hub", "hubs"}.intersection(request.fixturenames):
        request.getfixturevalue(name)
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


JSON_LOGGER = "--logger=rtservice.observe.logs.json"

# The ends of a reload.
_RELOADED = ("reload.done", "reload.failed", "worker.not_replaced")


class Service:
    """A `twistd` process in the foreground, which logs as JSON.

    `records` are its log records so far, as dictionaries; `events` are those that have an event. `lines` are all lines
    of its output: the records as JSON, and what is printed, such as the reason why a start fails. Tests should wait for
    events, since texts may change.
    """

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        env: dict[str, str],
        launcher: list[str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self.lines: list[str] = []
        self.records: list[dict[str, Any]] = []
        self._ended = False  # all output was read
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
            record = _record(line)
            with self._news:
                self.lines.append(line.rstrip("\n"))
                if record is not None:
                    self.records.append(record)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self.lines.append("<end of output>")
            self._news.notify_all()

    @property
    def events(self) -> list[dict[str, Any]]:
        """The log records so far that have an event."""
        return [record for record in list(self.records) if "event" in record]

    def wait_event(self, name: str, number: int = 1, /, **fields: Any) -> dict[str, Any]:
        """Wait for an event with these fields, and return its record: the first one, or the one of this number.

        The value of a field may be a compiled regular expression, which is searched for in the field's text. The
        reference of events lists names and fields. `message` is the text of the record, `slot` the number of the worker
        that logged it. Raises AssertionError if the process ends, or after 30 seconds.
        """
        wanted = {"event": name, **fields}
        return self._wait(lambda: _matching(list(self.records), wanted), number, f"event {wanted}")

    def wait_record(self, message: str, number: int = 1, /, **fields: Any) -> dict[str, Any]:
        """Wait for a log record whose text matches a regular expression, and that has these fields; return it.

        For records of the protocol, which are no events of rtservice. Otherwise as `wait_event`.
        """
        wanted = {"message": re.compile(message), **fields}
        return self._wait(lambda: _matching(list(self.records), wanted), number, f"record {wanted}")

    def wait_line(self, pattern: str, count: int = 1) -> str:
        """Wait for a line of output that matches a regular expression, the one with number `count`, and return it.

        For output that is no log record, such as what is printed: in `lines` log records are JSON. Raises
        AssertionError as `wait_event`.
        """
        return self._wait(
            lambda: [line for line in list(self.lines) if re.search(pattern, line)], count, f"line {pattern!r}"
        )

    def _wait(self, find: Callable[[], list[_T]], count: int, what: str) -> _T:
        end = time.monotonic() + DEADLINE
        with self._news:
            while True:
                found = find()
                if len(found) >= count:
                    return found[count - 1]
                if self._ended or not self._news.wait(end - time.monotonic()):
                    number = f" number {count}" if count > 1 else ""
                    raise AssertionError(f"no {what}{number} in:\n" + "\n".join(self.lines))

    @property
    def port(self) -> int:
        """The TCP port that the service listens on."""
        listening = self.wait_event("listener.listening", listener=re.compile(r"^(tcp|ssl):.*:\d+$"))
        return int(listening["listener"].rpartition(":")[2])

    @property
    def peak_memory(self) -> int:
        """The highest resident memory of the process so far, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024

    def connect(self) -> socket.socket:
        """Connect to the service, and return the socket."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE)

    def reload(self) -> dict[str, Any]:
        """Send SIGHUP, wait for the event that reports the result, and return its record.

        The event is `reload.done`, `reload.failed` or `worker.not_replaced`.
        """

        def results() -> list[dict[str, Any]]:
            return [record for record in self.events if record["event"] in _RELOADED]

        before = len(results())
        self.process.send_signal(signal.SIGHUP)
        return self._wait(results, before + 1, "end of the reload")

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


def _record(line: str) -> dict[str, Any] | None:
    """The log record that a line is, or ends with: what is printed without a line feed may stand before it."""
    begin = line.find('{"time": ')
    if begin < 0:
        return None
    try:
        record = json.loads(line[begin:])
    except ValueError:  # it was printed
        return None
    return record if isinstance(record, dict) else None


def _matching(records: list[dict[str, Any]], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        record
        for record in records
        if all(name in record and _is_wanted(record[name], value) for name, value in wanted.items())
    ]


def _is_wanted(value: Any, wanted: Any) -> bool:
    return bool(wanted.search(str(value))) if isinstance(wanted, re.Pattern) else bool(value == wanted)


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Serve a protocol in a real `twistd rtservice`: `service = hosted("mine:Factory", "--workers=2")`.

    The service listens on a free port of 127.0.0.1, unless an argument sets another. It runs in `tmp_path`, with the
    import path of the test. Keywords are environment variables. Returns a `Service`.
    """
    started: list[Service] = []

    def start(protocol: str, *arguments: str, **env: str) -> Service:
        twistd = [str(Path(sys.executable).parent / "twistd"), "--nodaemon", "--pidfile=", JSON_LOGGER, "rtservice"]
        where = any(argument.startswith(("--listen", "--port", "-l", "-p")) for argument in arguments)
        listen = [] if where else ["--listen=tcp:0:interface=127.0.0.1"]
        importable = os.pathsep.join(filter(None, sys.path))
        service = Service(
            [*twistd, f"--protocol={protocol}", *listen, *arguments],
            tmp_path,
            {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": importable, **env},
        )
        started.append(service)
        service.wait_event("listener.listening")
        return service

    yield start
    for service in started:
        service.kill()
