"""The entry point of a worker process: receive settings and sockets from the supervisor, and run a Server."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.logger import LogEvent, Logger, LogLevel, globalLogBeginner, globalLogPublisher
from twisted.python.failure import Failure

from rtservice.config.schema import Settings
from rtservice.config.sources import LoadedSettings, load_settings
from rtservice.config.values import SettingError
from rtservice.events import (
    CONNECTION_LIST_FAILED,
    DRAIN_FAILED,
    LOG_DROPPED,
    SERVICE_FAILED,
    START_FAILED,
    SUPERVISOR_MESSAGE_FAILED,
    WORKER_START_EXCEPTION,
)
from rtservice.hosting.aliases import ALIASES
from rtservice.hosting.factory import make_factory
from rtservice.hub.carrier import Carrier
from rtservice.hub.choice import make_carrier, warn_if_unused
from rtservice.hub.hub import Hub
from rtservice.hub.mesh import MeshCarrier
from rtservice.hub.redis_url import BadHubURL
from rtservice.net.listener import Listener
from rtservice.net.tls import TLSError, ignore_bad_names
from rtservice.observe.logs import AccessLog, Levels, Log, message_and_traceback
from rtservice.pool.control import (
    BEAT,
    CONTROL_IN,
    CONTROL_OUT,
    FIRST_SOCKET,
    LINK_CHANNEL,
    LONGEST_FROM_WORKER,
    ProtocolViolation,
    SupervisorMessages,
    encode,
)
from rtservice.pool.start_message import adopt_listener
from rtservice.pool.worker_counters import encode_counters
from rtservice.pool.worker_messages import (
    LONGEST_PEER_PROBLEM,
    LONGEST_PROBLEM,
    MOST_COUNTERS,
    MOST_LINES,
    MOST_RECORDS,
    encode_records,
    finished_record,
    shortened,
)
from rtservice.process.counters import CounterKey
from rtservice.process.meter import ProcessMeter
from rtservice.process.server import Server
from rtservice.process.signals import reset_inherited_signals
from rtservice.process.slices import in_slices
from rtservice.process_settings import levels, runtime_settings
from rtservice.references import OptionValue
from rtservice.steps import Steps

_log = Logger()

# Seconds for which log records below `warn`, and lines of the access log, are collected into one message; and the
# maximum number of characters of these lines, which JSON may double: UNIX clients can have very long names.
_BATCH_SECONDS, _BATCH_SIZE = 0.1, 48 * 1024

# Levels of records that are collected. Others are sent at once.
_BATCHED_LEVELS = frozenset((LogLevel.debug, LogLevel.info))

# Seconds of a slice of the start. Messages are read between slices, and no client is served yet.
_START_SLICE = 0.05

_EVERY_EVENT_HAS = frozenset(("log_namespace", "log_level", "log_time"))

# Seconds until the process ends, even if its last messages are not sent.
_LAST_MESSAGES = 5.0


class Worker(Protocol):
    """The worker's end of the control channel, and the Host of its Server."""

    transport: Any

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._messages = SupervisorMessages()
        self._server: Server | None = None
        self._kinds: list[str] = []  # of the listeners: `passed`, `slot` or `own`
        self._files: list[tuple[str, int]] = []  # paths and inodes of UNIX sockets, which the supervisor removes
        self._listeners: list[Listener] = []
        self._settings = Settings()
        self._slot, self._slots = 0, 1
        self._loading: Deferred[None] | None = None
        self._finish: list[str] | None = None  # the value of a `drain` that was received while it loads
        self._beating = LoopingCall(self._beat)
        self._ending = False
        self._begun = False  # `start` was received
        self._ready = False  # `ready` was sent
        self._draining = False
        self._ignoring = False  # the supervisor has violated the protocol
        self._full = False  # the pipe is full: the supervisor reads more slowly than this process writes
        self._dropped = 0  # records since the pipe was full
        self._levels = Levels({})
        self._lines: list[str] = []  # for the access log
        self._lines_size = 0
        self._records: list[list[Any]] = []  # formatted, not yet sent
        self._dropped_before = 0
        self._sent: dict[CounterKey, float] = {}  # the counters that were sent last
        self._meter = ProcessMeter(lambda: self._dropped_before + self._dropped)
        self.status = 0

    # --- messages ---

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)

    def dataReceived(self, data: bytes) -> None:
        if self._ignoring:
            return
        try:
            for word, value in self._messages.feed(data):
                self._received(word, value)
        except Exception as problem:
            # Later messages cannot be decoded either. Drain, so that another worker takes over.
            self._ignoring = True
            SUPERVISOR_MESSAGE_FAILED.log(_log, problem=ascii(problem)[:200])
            self._drain([])

    def _received(self, word: str, value: Any) -> None:
        if word == "start":
            if self._begun:
                raise ProtocolViolation("a second start")
            self._begun = True
            # In slices, so that messages are handled meanwhile: thousands of certificates take seconds to load.
            self._loading = in_slices(self._start(value), self._reactor, size=_START_SLICE, pause=0.0)
            self._loading.addErrback(self._not_loaded).addCallback(self._loaded)
        elif word == "share":
            self._slots = value
            if self._server is not None:
                self._server.apply(runtime_settings(self._settings, slot=self._slot, slots=value))
        elif word == "drain":
            if "own" in value:  # the supervisor has removed the files; new ones belong to a successor
                self._files.clear()
            self._drain(value)
        elif word == "abort_drain":
            self._abort_drain()
        elif word == "rows" and self._server is not None:
            rows = self._server.connections.rows(value["sort"], value["count"])
            rows.addErrback(self._no_rows)
            rows.addCallback(self._send_rows, value["id"])

    def _no_rows(self, failure: Failure) -> list[list[Any]]:
        CONNECTION_LIST_FAILED.failure(self._log, failure)
        return []  # without an answer, the supervisor would take this process for one that does not read its messages

    def _send_rows(self, rows: list[list[Any]], number: int) -> None:
        while len(message := encode("rows", {"id": number, "rows": rows})) > LONGEST_FROM_WORKER["rows"]:
            rows = rows[: len(rows) // 2]
        self.transport.write(message)

    def _send_message(self, word: str, value: object = None) -> None:
        self.transport.write(encode(word, value))

    def connectionLost(self, reason: object = None) -> None:
        if self._ending:
            self._reactor.stop()
        else:
            self._orphaned()

    def pauseProducing(self) -> None:
        self._full = True

    def resumeProducing(self) -> None:
        self._full = False
        dropped, self._dropped = self._dropped, 0
        self._dropped_before += dropped
        if dropped and self._server is not None:
            LOG_DROPPED.log(self._log, count=dropped)

    def stopProducing(self) -> None:
        self._full = True

    def _orphaned(self) -> None:
        """Drain without a supervisor, which has died: serve connections and backlogs, and remove the socket files."""
        for path, inode in self._files:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        self._full = True  # no process reads the log
        self._drain(["slot", "own"])

    # --- start and stop ---

    def _not_loaded(self, failure: Failure) -> None:
        if not failure.check(CancelledError):  # a `drain` cancels the start
            WORKER_START_EXCEPTION.failure(_log, failure)
            self._fail(repr(failure.value))

    def _loaded(self, result: object) -> None:
        self._loading = None
        if self._finish is not None:
            self._drain(self._finish)

    def _start(self, message: dict[str, Any]) -> Steps[None]:
        try:
            yield from self._serve(message)
        except (SettingError, BadHubURL, TLSError, OSError) as error:
            self._fail(str(error))
        except GeneratorExit:  # a `drain` cancels the start
            raise
        except BaseException as error:  # SystemExit too: the supervisor reports the problem
            WORKER_START_EXCEPTION.failure(_log)
            self._fail(repr(error))

    def _serve(self, message: dict[str, Any]) -> Steps[None]:
        self._settings = load_settings(message["settings"], {}, None, ALIASES).settings
        loaded = LoadedSettings(self._settings, message["sources"])
        self._slot, self._slots = message["slot"], message["slots"]
        self._levels.change(levels(self._settings))
        self._log = Log(self._levels, globalLogPublisher)
        self._kinds = [listener["kind"] for listener in message["listeners"]]
        # Before the first step: if the supervisor dies during the start, this process removes the files.
        self._files = [tuple(listener["file"]) for listener in message["listeners"] if listener["file"] is not None]
        factory = make_factory(
            loaded,
            options=[OptionValue(*option) for option in message["options"]],
            directory=message["directory"],
            processes=message["slots"],
        )
        warn_if_unused(message["hub"], factory, self._log)
        for place, listener in enumerate(message["listeners"]):
            self._listeners.append((yield from adopt_listener(listener, FIRST_SOCKET + place)))
        self._server = Server(
            factory,
            listeners=self._listeners,
            settings=runtime_settings(self._settings, slot=self._slot, slots=self._slots),
            log=self._log,
            hub=Hub(make_carrier(message["hub"], self._log, self._make_mesh), self._log),
            record=AccessLog(self._access, self._slot) if self._settings.access_log else None,
        )
        self._server.prepare(self)
        self._meter.start(self._reactor)
        self._beating.clock = self._reactor
        self._beating.start(BEAT)
        self._server.start(self._reactor)

    def _make_mesh(self) -> Carrier:
        """Return the carrier of a hub between the workers of this machine."""
        return MeshCarrier(LINK_CHANNEL, self, self._log)

    def join_mesh(self) -> None:
        """Ask the supervisor for links to the other workers."""
        self._send_message("mesh")

    def report_peer(self, incarnation: int, problem: str) -> None:
        """Report another worker to the supervisor, which kills it."""
        self._send_message("peer", {"incarnation": incarnation, "problem": problem[:LONGEST_PEER_PROBLEM]})

    def accepting(self) -> None:
        """Do nothing: the supervisor logs the listeners."""

    def ready(self) -> None:
        """Report to the supervisor that every listener accepts."""
        self._ready = True
        if self._server is not None and self._server.hub.started:
            self._beat()  # first, so that the supervisor knows whether the hub has its connection
        self._send_message("ready")

    def failed(self, problem: str) -> None:
        """End this process, whose server has failed. The supervisor starts another one."""
        if self._draining or self._ending:
            return
        if self._ready:
            SERVICE_FAILED.log(self._log, problem=problem)
            self._end()
        else:
            START_FAILED.log(self._log, problem=problem)
            self._fail(problem)

    def draining(self) -> None:
        """Do nothing: the supervisor has sent `drain`."""

    def drained(self) -> None:
        """Do nothing: the supervisor has the status server."""

    def reloaded(self) -> None:
        """Do nothing: a reload replaces this process."""

    def extend_timeout(self, seconds: float) -> None:
        """Do nothing: the supervisor extends the timeout of the service manager."""

    def _fail(self, problem: str) -> None:
        if self._ending:  # one reason was sent, and a second one would violate the protocol
            return
        self.status = 1
        self._send_message("failed", shortened(problem, LONGEST_PROBLEM))
        self._end()

    def ask_for_replacement(self) -> None:
        """Ask the supervisor for a replacement. Called for SIGTERM."""
        self._send_message("leave")

    def _beat(self) -> None:
        assert self._server is not None
        counters, sent = self._server.counters() | self._meter.counters(), self._sent
        changed = {key: count for key, count in counters.items() if sent.get(key) != count}
        # A counter disappears if it is that of a phase without connections.
        changed |= dict.fromkeys(sent.keys() - counters.keys(), 0)
        encoded = list(encode_counters(changed).items())
        for start in range(0, len(encoded) or 1, MOST_COUNTERS):
            self._send_message("beat", dict(encoded[start : start + MOST_COUNTERS]))
        self._sent = counters

    def _drain(self, finish: list[str]) -> None:
        if self._loading is not None and finish:  # clients may wait in a backlog that only this process serves
            self._finish = finish
            return
        if self._server is None:
            self._give_up()
            return
        if self._draining:
            return
        self._draining = True
        if not self._ready:
            self._fail(self._server.stopped_before_ready)
        for kind, listener in zip(self._kinds, self._listeners, strict=True):
            listener.shared = kind not in finish
        self._server.drain().addBoth(self._drained)

    def _abort_drain(self) -> None:
        if self._server is None:
            self._give_up()
        else:
            self._server.abort()

    def _give_up(self) -> None:
        """End the process before it serves any client."""
        self._finish = None
        if self._loading is not None:
            self._loading.cancel()
        self._end()

    def _access(self, line: str) -> None:
        if self._full:
            self._dropped += 1
            return
        if not self._lines and not self._records:
            self._reactor.callLater(_BATCH_SECONDS, self._send)
        self._lines.append(line)
        self._lines_size += len(line)
        if len(self._lines) >= MOST_LINES or self._lines_size >= _BATCH_SIZE:
            self._send()

    def _send(self) -> None:
        """Send the collected records and lines."""
        if self._records:
            records, self._records = self._records, []
            self.transport.write(encode_records(records))
        if self._lines:
            lines, self._lines, self._lines_size = self._lines, [], 0
            self.transport.write(encode("access", lines))

    def _drained(self, result: object) -> None:
        if isinstance(result, Failure):
            DRAIN_FAILED.failure(self._log, result)
        if self._beating.running:
            self._beat()
            self._beating.stop()
        self._meter.stop()
        self._end()

    def _end(self) -> None:
        if not self._ending:
            self._send()
            self._ending = True
            if self.transport.disconnected:  # the supervisor is dead
                self._stop()
                return
            self.transport.unregisterProducer()
            self._reactor.callLater(_LAST_MESSAGES, self._stop)
            self.transport.loseConnection()  # after all messages are sent

    def _stop(self) -> None:
        with contextlib.suppress(Exception):  # the reactor may be stopping already
            self._reactor.stop()

    # --- log ---

    def observe(self, event: LogEvent) -> None:
        """Send a record to the supervisor. Called in any thread."""
        if not event.keys() >= _EVERY_EVENT_HAS:  # not from a Logger
            event = {"log_namespace": "-", "log_level": LogLevel.info, "log_time": time.time(), **event}
        if not self._levels.allow(event["log_namespace"], event["log_level"]):
            return
        if threading.current_thread() is not threading.main_thread():
            self._reactor.callFromThread(self.observe, event)
            return
        if self._full or self._ending:
            self._dropped += 1
            return
        text, traceback = message_and_traceback(event)
        self._records.append(finished_record(event, text, traceback))
        if traceback or event["log_level"] not in _BATCHED_LEVELS or len(self._records) >= MOST_RECORDS:
            self._send()
        elif len(self._records) == 1 and not self._lines:
            self._reactor.callLater(_BATCH_SECONDS, self._send)


def main() -> int:
    """Serve until the supervisor sends `drain` or dies; return the exit status."""
    # First, to cover crashes and hangs of all later code. The output goes to the supervisor's log.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    reset_inherited_signals()
    ignore_bad_names()
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # only the supervisor, in the same process group, handles these
    try:
        from rtservice.net.reactor import install
    except ImportError:  # no epoll(7)
        pass
    else:
        install()
    from twisted.internet import reactor as installed
    from twisted.internet.stdio import StandardIO

    reactor: Any = installed  # typed as a module
    worker = Worker(reactor)
    for descriptor in (CONTROL_IN, CONTROL_OUT, LINK_CHANNEL):
        os.set_inheritable(descriptor, False)
    StandardIO(worker, CONTROL_IN, CONTROL_OUT)  # type: ignore[call-arg]  # mypy sees the variant for Windows, too
    globalLogBeginner.beginLoggingTo([worker.observe], redirectStandardIO=False)  # type: ignore[list-item]  # a method

    def handle_signals() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: reactor.callFromThread(worker.ask_for_replacement))
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    reactor.callWhenRunning(handle_signals)
    reactor.run()
    return worker.status


if __name__ == "__main__":
    sys.exit(main())
