"""A worker process: what `tap` is to twistd, this is to the supervisor that spawned it."""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import signal
import socket
import sys
from typing import Any

from twisted.internet.protocol import Protocol
from twisted.internet.task import LoopingCall
from twisted.logger import LogEvent, eventAsJSON, formatEvent, globalLogBeginner, globalLogPublisher
from twisted.python.failure import Failure

from rtservice import settings
from rtservice.host.connections import Limits
from rtservice.host.control import (
    BEAT,
    CONTROL_IN,
    CONTROL_OUT,
    FIRST_SOCKET,
    LONGEST_FROM_WORKER,
    LONGEST_TO_WORKER,
    TO_WORKER,
    Messages,
    encode,
)
from rtservice.host.server import Live, Server, default_max_connections, raise_descriptor_limit
from rtservice.net.listeners import Listener
from rtservice.net.tls import DirectoryTLS, Files, RecordedFiles, ServerTLS, TLSError
from rtservice.observe.logs import Log
from rtservice.protocols.echo import EchoFactory
from rtservice.settings import Loaded, SettingError

# Seconds that its last words may take to reach the supervisor.
_LAST_WORDS = 5.0

# --- what tap uses too: from settings to what the host takes ---


def make_factory(loaded: Loaded) -> EchoFactory:
    """The factory of these settings; raises SettingError."""
    wanted = loaded.settings
    try:
        return EchoFactory(wanted.greeting, wanted.greet, wanted.framing, wanted.max_message)
    except ValueError as error:
        raise SettingError(f"{loaded.where('greeting')}: {error}") from None


def make_live(in_force: settings.Settings, *, slot: int = 0, slots: int = 1) -> Live:
    """What may change while the service runs, as the host takes it; of `slots` processes, this one's share.

    The descriptor limit is each process's own. `max_connections` is divided evenly, `max_connections_per_peer` too, but
    rounded up, since the kernel spreads a peer's connections by chance.
    """
    descriptors = raise_descriptor_limit()
    total = in_force.max_connections
    return Live(
        limits=Limits(
            max_connections=default_max_connections(descriptors) if total is None else share(total, slot, slots),
            max_connections_per_peer=-(-in_force.max_connections_per_peer // slots),
            peer_prefix_v6=in_force.peer_prefix_v6,
            at_limit=in_force.at_limit,
            idle_timeout=in_force.idle_timeout,
            proxy_from=in_force.proxy_from,
        ),
        handshake_timeout=in_force.handshake_timeout,
        drain_timeout=in_force.drain_timeout,
        watch_certificates=in_force.watch_certificates and slots == 1,
    )


def share(total: int, slot: int, slots: int) -> int:
    """What of a total one slot may have: together it is the total, and 1 at the least."""
    return max(1, total // slots + (slot < total % slots))


# --- the supervisor's side: what a worker is started with ---


def describe(in_force: settings.Settings, listeners: list[Listener]) -> dict[str, Any]:
    """The value of a `start` message, but for `slot` and `slots`. Raises TLSError.

    Certificates and keys are read here: a worker may not have the rights to.
    """
    texts = {
        setting.name: settings.as_text(getattr(in_force, setting.field))
        for setting in settings.schema()
        if setting.name not in ("listen", "port", "interface")  # it gets sockets
    }
    return {"settings": texts, "listeners": [_described(listener) for listener in listeners]}


def _described(listener: Listener) -> dict[str, Any]:
    kind = "passed" if listener.shared else "slot" if listener.copies else "own"
    tls = None
    if listener.source is not None:
        files = Files()
        listener.source.load(files)
        tls = {
            "directory": isinstance(listener.source, DirectoryTLS),
            "fields": dataclasses.asdict(listener.source),
            "texts": files.texts,
            "entries": files.entries,
        }
    return {"name": listener.name, "kind": kind, "proxied": listener.proxied, "tls": tls, "file": listener.file}


# --- the worker's side ---


def _adopted(given: dict[str, Any], descriptor: int) -> Listener:
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    listener = Listener(sock, given["name"], proxied=given["proxied"], shared=True)
    tls = given["tls"]
    if tls is not None:
        fields = {**tls["fields"], "alpn": tuple(tls["fields"]["alpn"])}
        source = DirectoryTLS(**fields) if tls["directory"] else ServerTLS(**fields)
        listener.adopt(source.load(RecordedFiles(tls["texts"], tls["entries"])))
    return listener


class Worker(Protocol):
    """Its supervisor's messages in, a Server's life out."""

    transport: Any

    def __init__(self, reactor: Any) -> None:
        self._reactor = reactor
        self._messages = Messages(TO_WORKER, LONGEST_TO_WORKER)
        self._server: Server | None = None
        self._kinds: list[str] = []
        self._files: list[tuple[str, int]] = []  # of UNIX sockets, to be removed by the supervisor
        self._listeners: list[Listener] = []
        self._settings = settings.Settings()
        self._slot = 0
        self._beating = LoopingCall(self._beat)
        self._ending = False
        self._full = False  # the supervisor does not read as fast as is written
        self._dropped = 0  # records, since then
        self._dropped_before = 0
        self._told: dict[str, int] = {}  # the counters that the supervisor has
        self.status = 0

    # --- messages ---

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)

    def dataReceived(self, data: bytes) -> None:
        for word, value in self._messages.feed(data):
            if word == "start":
                self._start(value)
            elif word == "share" and self._server is not None:
                self._server.apply(make_live(self._settings, slot=self._slot, slots=value))
            elif word == "drain":
                self._drain(value)
            elif word == "hurry" and self._server is not None:
                self._server.hurry()
            elif word == "rows" and self._server is not None:
                rows = self._server.connections.rows(value["sort"], value["count"])
                self._tell("rows", {"id": value["id"], "rows": rows})

    def _tell(self, word: str, value: object = None) -> None:
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
            self._log.logger.warn("{count} log records were dropped: too many at once", count=dropped)

    def stopProducing(self) -> None:
        self._full = True

    def _orphaned(self) -> None:
        """The supervisor is dead: serve who is here or in a queue, and leave nothing behind."""
        for path, inode in self._files:
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:
                    os.unlink(path)
        self._full = True  # nobody reads the log
        self._drain(["slot", "own"])

    # --- its life ---

    def _start(self, given: dict[str, Any]) -> None:
        try:
            loaded = settings.load(given["settings"], {}, None)
            self._settings = loaded.settings
            self._slot = given["slot"]
            self._log = Log(self._settings.log_level, globalLogPublisher)
            factory = make_factory(loaded)
            for place, listener in enumerate(given["listeners"]):
                self._kinds.append(listener["kind"])
                if listener["file"] is not None:
                    self._files.append(tuple(listener["file"]))
                self._listeners.append(_adopted(listener, FIRST_SOCKET + place))
        except (SettingError, TLSError, OSError) as error:
            self._failed(str(error))
            return
        self._server = Server(
            factory,
            listeners=self._listeners,
            endpoints=[],
            live=make_live(self._settings, slot=self._slot, slots=given["slots"]),
            log=self._log.logger,
            report=self._started,
            announce=False,
            dropped=lambda: self._dropped_before + self._dropped,
        )
        self._beating.clock = self._reactor
        self._beating.start(BEAT)
        self._server.startService()

    def _started(self, problem: str | None) -> None:
        if problem is None:
            self._tell("ready")
        else:
            self._failed(problem)

    def _failed(self, problem: str) -> None:
        self.status = 1
        self._tell("failed", problem)
        self._end()

    def leave(self) -> None:
        """Ask to be replaced. Called for SIGTERM: a supervisor that wants it to end says so."""
        self._tell("leave")

    def _beat(self) -> None:
        assert self._server is not None
        counters, told = self._server.counters(), self._told
        changed = {name: count for name, count in counters.items() if told.get(name) != count}
        # What is not there any more is a phase that no connection is in.
        self._tell("beat", changed | dict.fromkeys(told.keys() - counters.keys(), 0))
        self._told = counters

    def _drain(self, finish: list[str]) -> None:
        if self._server is None:
            self._end()
            return
        for kind, listener in zip(self._kinds, self._listeners, strict=True):
            listener.shared = kind not in finish
        self._server.stopService().addBoth(self._drained)

    def _drained(self, result: object) -> None:
        if isinstance(result, Failure):
            self._log.logger.failure("a drain failed", result)
        if self._beating.running:
            self._beat()
            self._beating.stop()
        self._end()

    def _end(self) -> None:
        if not self._ending:
            self._ending = True
            if self.transport.disconnected:  # there is nobody to tell
                self._stop()
                return
            self.transport.unregisterProducer()
            self._reactor.callLater(_LAST_WORDS, self._stop)
            self.transport.loseConnection()  # which sends what is written

    def _stop(self) -> None:
        with contextlib.suppress(Exception):  # it is stopping already
            self._reactor.stop()

    # --- its log ---

    def observe(self, event: LogEvent) -> None:
        """Send a record to the supervisor."""
        if self._full or self._ending:
            self._dropped += 1
            return
        try:
            text = eventAsJSON(event)
        except Exception:  # something in it that JSON cannot hold
            text = ""
        if not text or len(text) > LONGEST_FROM_WORKER - 10:
            kept = {key: event[key] for key in ("log_time", "log_level", "log_namespace")}
            kept |= {"log_format": "{text}", "text": (formatEvent(event) or "")[:10_000]}
            text = eventAsJSON(kept)
        self.transport.write(b"log " + text.encode() + b"\n")


def main() -> int:
    """Serve until the supervisor says otherwise; gives the exit status."""
    # Before anything can hang. What it writes goes to the supervisor's log.
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the supervisor, whose group or terminal is ours too
    try:
        from rtservice.net.reactor import install
    except ImportError:  # no epoll(7)
        pass
    else:
        install()
    from twisted.internet import reactor as installed
    from twisted.internet.stdio import StandardIO

    reactor: Any = installed  # the module stands for the object
    worker = Worker(reactor)
    for descriptor in (CONTROL_IN, CONTROL_OUT):
        os.set_inheritable(descriptor, False)
    StandardIO(worker, CONTROL_IN, CONTROL_OUT)  # type: ignore[call-arg]  # to mypy it is Windows's too
    globalLogBeginner.beginLoggingTo([worker.observe], redirectStandardIO=False)  # type: ignore[list-item]  # a function is one

    def handle_signals() -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: reactor.callFromThread(worker.leave))
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    reactor.callWhenRunning(handle_signals)
    reactor.run()
    return worker.status


if __name__ == "__main__":
    sys.exit(main())
