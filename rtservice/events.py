"""Every record that rtservice logs, declared once: name, level, text, fields and meaning.

`WORKER_READY.log(logger, worker=…, slot=…, pid=…)` logs a record. It has the field `event` with the stable name, here
`worker.ready`, and exactly the fields that the event declares. A field has one type and one meaning in all events: see
FIELDS. The text is for people and may change at any time. Programs and tests use names and fields.

A new event is declared here, under its area. `docs/reference/events.md` is generated from this module, and
`tests/test_events.py` holds the code to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from twisted.logger import Logger, LogLevel
from twisted.python.failure import Failure


class Event:
    """A kind of log record.

    `name` is the area, a dot, and what has happened. `text` is a log_format of twisted.logger. `meaning` is a sentence
    for the reference.
    """

    __slots__ = ("fields", "level", "meaning", "name", "text")

    def __init__(self, name: str, level: Any, text: str, *, fields: tuple[str, ...] = (), meaning: str) -> None:
        self.name = name
        self.level = level
        self.text = text
        self.fields = fields
        self.meaning = meaning

    def log(self, logger: Logger, /, **fields: object) -> None:
        """Log a record with these fields."""
        logger.emit(self.level, self.text, event=self.name, **fields)

    def failure(
        self, logger: Logger, failure: Failure | None = None, /, *, level: Any = None, **fields: object
    ) -> None:
        """Log a record with a traceback: that of a failure, or of the exception that is handled.

        `level` replaces the level of the event.
        """
        logger.failure(self.text, failure, self.level if level is None else level, event=self.name, **fields)


class LimitedEvent(Event):
    """An event of which some records are left out. The field `suppressed` says how many since the last record."""

    __slots__ = ()

    def __init__(self, name: str, level: Any, text: str, *, fields: tuple[str, ...], meaning: str) -> None:
        super().__init__(name, level, text, fields=(*fields, "suppressed"), meaning=meaning)

    def log(self, logger: Logger, /, **fields: object) -> None:
        """Log a record with these fields. Its text has the number of suppressed records only if there are some."""
        text = f"{self.text} ({{suppressed}} more since the last such record)" if fields["suppressed"] else self.text
        logger.emit(self.level, text, event=self.name, **fields)


class Field(NamedTuple):
    """A field of events. `types` are those that its values may have."""

    types: tuple[type, ...]
    meaning: str


_TEXT, _INTEGER, _NUMBER = (str,), (int,), (int, float)
_NONE = type(None)

FIELDS = {
    "aborted": Field(_INTEGER, "connections that were aborted at the end of a graceful shutdown"),
    "address": Field(_TEXT, "value of `NOTIFY_SOCKET`"),
    "beginning": Field(_TEXT, "first bytes that the client sent, at most 64, escaped"),
    "bytes_in": Field(_INTEGER, "bytes received; with TLS those inside TLS, with `library=pyopenssl` those below it"),
    "bytes_out": Field(_INTEGER, "bytes sent, counted as `bytes_in`"),
    "connections": Field(_INTEGER, "value of `--max-connections`"),
    "count": Field(_INTEGER, "number of the things that the event is about"),
    "days_left": Field(_INTEGER, "whole days until the certificate expires; negative after that"),
    "ended": Field(_INTEGER, "connections that ended by themselves during a graceful shutdown"),
    "exit_status": Field(_INTEGER, "exit status of the process"),
    "factory": Field(_TEXT, "class of the factory that is served"),
    "file": Field(_TEXT, "path of a file"),
    "gid": Field((int, _NONE), "group id, or null if it is not changed"),
    "hint": Field(_TEXT, "how to try and to stop the service, for people"),
    "host": Field(_TEXT, "IP address"),
    "interface": Field(_TEXT, "`interface=` of a listen description"),
    "left": Field(_TEXT, "time that is left, for people"),
    "limit": Field(_INTEGER, "the limit that is reached or in the way"),
    "line": Field(_TEXT, "line of output, escaped"),
    "listener": Field(_TEXT, "the listener, such as `tcp:0.0.0.0:8080` or `ssl:[::]:8443`"),
    "memory": Field(_INTEGER, "resident memory in MiB"),
    "method": Field(_TEXT, "method that raised the exception"),
    "names": Field(_TEXT, "names in a certificate, separated by commas"),
    "next_update": Field((int, float, _NONE), "next update of a revocation list, in seconds since 1970, or null"),
    "not_after": Field(_NUMBER, "time at which a certificate expires, in seconds since 1970"),
    "output": Field(_TEXT, "path of a log or access log, or `standard output`"),
    "path": Field(_TEXT, "path of a certificate or revocation list, escaped"),
    "peer": Field(_TEXT, "address and port of the client; behind a proxy those of the PROXY header"),
    "pid": Field(_INTEGER, "process id"),
    "platform": Field(_TEXT, "platform, as `sys.platform` has it"),
    "problem": Field(_TEXT, "what is wrong, for people"),
    "protocol": Field(_TEXT, "class of the protocol, or the value of `--protocol`"),
    "reason": Field(_TEXT, "why a connection ended: see [](logs.md#why-a-connection-ended)"),
    "record": Field(_TEXT, "the whole text; JSON logs have it as `message` only"),
    "seconds": Field(_NUMBER, "duration in seconds"),
    "setting": Field(_TEXT, "name of a setting, without `--`"),
    "settings": Field(_TEXT, "names of settings, separated by commas, or `none`"),
    "signal": Field(_TEXT, "name of a signal, such as `SIGTERM`"),
    "slot": Field(_INTEGER, "number of the worker, from 0; also in each record that a worker logs"),
    "stack": Field(_TEXT, "stack of the blocked thread"),
    "status": Field(_TEXT, "state of the service in one line"),
    "suppressed": Field(_INTEGER, "number of records left out since the last one of this kind"),
    "task": Field(_TEXT, "task: `reload`, `certificate check`, `certificate log` or `periodic check`"),
    "uid": Field((int, _NONE), "user id, or null if it is not changed"),
    "warning": Field(_TEXT, "the whole text; JSON logs have it as `message` only"),
    "worker": Field(_TEXT, "number and process id of a worker, for people: `worker 2 (pid 4711)`"),
}

_debug, _info, _warn = LogLevel.debug, LogLevel.info, LogLevel.warn
_error, _critical = LogLevel.error, LogLevel.critical


# --- start ---

START_FAILED = Event(
    "start.failed",
    _critical,
    "cannot start: {problem}",
    fields=("problem",),
    meaning="The service cannot start. The same line is on standard error.",
)
SERVICE_FAILED = Event(
    "service.failed",
    _critical,
    "cannot serve: {problem}",
    fields=("problem",),
    meaning="A listener fails while the service runs, which ends the process with a non-zero exit status.",
)
START_EXCEPTION = Event(
    "start.exception",
    _error,
    "exception in the start",
    meaning="Traceback of a start that failed; at level `debug` if the operating system rejected a call.",
)
START_REACTOR_UNAVAILABLE = Event(
    "start.reactor_unavailable",
    _warn,
    "reactor of rtservice not available on {platform}, using Twisted's: {problem}",
    fields=("platform", "problem"),
    meaning="The platform has no `epoll`. The service is slower.",
)
PRIVILEGES_DROPPED = Event(
    "privileges.dropped",
    _info,
    "privileges dropped: uid {uid}, gid {gid}",
    fields=("uid", "gid"),
    meaning="The process runs as the user and group of `--uid` and `--gid`.",
)
PRIVILEGES_KEPT = Event(
    "privileges.kept",
    _warn,
    "privileges kept: --gid {gid} without --uid serves as root, with the supplementary groups of root",
    fields=("gid",),
    meaning="`--gid` without `--uid` does not drop the privileges of root.",
)
SYSTEMD_UNUSABLE = Event(
    "systemd.unusable",
    _warn,
    "NOTIFY_SOCKET {address!r} cannot be used: {problem}",
    fields=("address", "problem"),
    meaning="The service manager is not notified.",
)
SYSTEMD_DISCONNECTED = Event(
    "systemd.disconnected",
    _warn,
    "notifications to the service manager stopped: {problem}",
    fields=("problem",),
    meaning="The service manager closed its socket. It gets no further notifications.",
)

SERVICE_SERVING = Event(
    "service.serving",
    _info,
    "serving {protocol}: {hint}",
    fields=("protocol", "hint"),
    meaning="The start is complete: every listener accepts connections.",
)

# --- listeners ---

LISTENER_LISTENING = Event(
    "listener.listening",
    _info,
    "listening on {listener}",
    fields=("listener",),
    meaning="Clients can connect. Logged once for each listener; with workers, when every worker is ready.",
)
LISTENER_ADDRESS_SKIPPED = Event(
    "listener.address_skipped",
    _warn,
    "address {host} of {interface} skipped: this host has no IPv6",
    fields=("host", "interface"),
    meaning="A host name has an IPv6 address, and the host has no IPv6. The other addresses are served.",
)
LISTENER_FILE_KEPT = Event(
    "listener.file_kept",
    _warn,
    "socket file of {listener} not removed: {problem}",
    fields=("listener", "problem"),
    meaning="The user of the process may not write to the directory. The next start replaces the file.",
)
LISTENER_STOP_FAILED = Event(
    "listener.stop_failed",
    _critical,
    "stopping a listener failed",
    meaning="An endpoint of a plugin raised an exception when it stopped listening.",
)
ACCEPT_PAUSED = Event(
    "accept.paused",
    _error,
    "accepting on {listener} paused: {problem}",
    fields=("listener", "problem"),
    meaning="The system is out of descriptors or memory. Clients wait in the queue; the service tries again by itself.",
)

# --- connections ---

CONNECTION_CLOSED = Event(
    "connection.closed",
    _info,
    "{record}",
    fields=("record", "peer", "listener", "seconds", "bytes_in", "bytes_out", "reason"),
    meaning="A connection ended. With an access log, its line there replaces this record.",
)
CONNECTION_REFUSED = LimitedEvent(
    "connection.refused",
    _warn,
    "refused {peer} on {listener}: {problem}",
    fields=("peer", "listener", "setting", "problem"),
    meaning="A client was refused because of a setting. At most one record in ten seconds for each setting.",
)
CONNECTION_LIMIT_REACHED = Event(
    "connection.limit_reached",
    _warn,
    "--max-connections {limit} reached: clients wait in the queue",
    fields=("limit",),
    meaning="New clients are served when a connection ends.",
)
CONNECTION_LIMIT_UNREACHABLE = Event(
    "connection.limit_unreachable",
    _warn,
    "--max-connections {connections} cannot be reached: the limit of descriptors is {limit}",
    fields=("connections", "limit"),
    meaning="The limit of descriptors (RLIMIT_NOFILE) is lower than `--max-connections`.",
)
CONNECTION_FAILED = Event(
    "connection.failed",
    _critical,
    "connection of {peer} on {listener} failed",
    fields=("peer", "listener"),
    meaning="An exception outside the methods of a protocol, often from a producer, ended the connection.",
)
CONNECTION_COUNT_FAILED = Event(
    "connection.count_failed",
    _critical,
    "counting the connections failed",
    meaning="A bug. Metrics and the status page show earlier values.",
)
CONNECTION_LIST_FAILED = Event(
    "connection.list_failed",
    _critical,
    "listing the connections failed",
    meaning="A bug. The status page lacks the connections of this worker.",
)
PROXY_HEADER_INVALID = Event(
    "proxy.header_invalid",
    _info,
    "invalid PROXY header from {peer} on {listener}: {problem}; it begins with {beginning}",
    fields=("peer", "listener", "problem", "beginning"),
    meaning="A proxy sent no valid PROXY header. At most five records in ten seconds for each listener.",
)
PROXY_HEADERS_SUPPRESSED = Event(
    "proxy.headers_suppressed",
    _info,
    "invalid PROXY headers on {listener} not logged: {count}",
    fields=("listener", "count"),
    meaning="Number of invalid PROXY headers without a record `proxy.header_invalid`.",
)
TLS_THREAD_FAILED = Event(
    "tls.thread_failed",
    _critical,
    "TLS handshake in a thread failed",
    meaning="A bug. Failed handshakes of clients are `connection.closed` with the reason `TLS failed (…)`.",
)

# --- hosted protocols ---

PROTOCOL_FAILED = Event(
    "protocol.failed",
    _critical,
    "{protocol} failed in {method}: connection of {peer} on {listener}",
    fields=("protocol", "method", "peer", "listener"),
    meaning="A protocol raised an exception, which ended its connection.",
)
PRODUCER_FAILED = Event(
    "protocol.producer_failed",
    _critical,
    "producer failed in stopProducing: connection of {peer} on {listener}",
    fields=("peer", "listener"),
    meaning="The producer of a protocol raised an exception at the end of its connection.",
)
FACTORY_FAILED = Event(
    "factory.failed",
    _critical,
    "{factory} failed in {method}",
    fields=("factory", "method"),
    meaning="A factory raised an exception. In `buildProtocol`, it ended the connection.",
)
FACTORY_START_FAILED = Event(
    "factory.start_failed",
    _debug,
    "{factory} failed to start",
    fields=("factory",),
    meaning="Traceback of `startFactory` or `IStartable.start`; `start.failed` has the line.",
)
FACTORY_METRICS_REJECTED = Event(
    "factory.metrics_rejected",
    _warn,
    "metrics of {factory} rejected: {problem}",
    fields=("factory", "problem"),
    meaning="`IMetrics.metrics` returned a name or value that is not allowed.",
)
ECHO_MESSAGE_REJECTED = Event(
    "echo.message_rejected",
    _warn,
    "closing connection of {peer}: {problem}",
    fields=("peer", "problem"),
    meaning="A client of echo sent a message that breaks the rules of its framing.",
)
REACTOR_BLOCKED = Event(
    "reactor.blocked",
    _error,
    "reactor blocked: nothing was served for {seconds:.1f} s, by this code:\n{stack}",
    fields=("seconds", "stack"),
    meaning="Hosted code blocks the reactor. At most one record in ten seconds.",
)

# --- certificates ---

CERTIFICATE_LOADED = Event(
    "certificate.loaded",
    _info,
    "certificate {path} for {names}: expires in {left}",
    fields=("path", "names", "left", "not_after", "days_left"),
    meaning="A certificate is shown to clients. Logged at the start and after each reload.",
)
CERTIFICATE_NOT_YET_VALID = Event(
    "certificate.not_yet_valid",
    _warn,
    "certificate {path} for {names}: not valid yet",
    fields=("path", "names", "not_after", "days_left"),
    meaning="Clients reject the certificate until its first day.",
)
CERTIFICATE_EXPIRED = Event(
    "certificate.expired",
    _warn,
    "certificate {path} for {names}: expired",
    fields=("path", "names", "not_after", "days_left"),
    meaning="Clients reject the certificate.",
)
REVOCATION_LOADED = Event(
    "revocation.loaded",
    _info,
    "revocation list {path}: next update in {left}",
    fields=("path", "left", "next_update"),
    meaning="Client certificates are looked up in this list.",
)
REVOCATION_UNDATED = Event(
    "revocation.undated",
    _info,
    "revocation list {path}: no next update",
    fields=("path", "next_update"),
    meaning="Client certificates are looked up in this list, which never expires.",
)
REVOCATION_EXPIRED = Event(
    "revocation.expired",
    _warn,
    "revocation list {path}: next update has passed, clients of its authority are refused",
    fields=("path", "next_update"),
    meaning="A new list is needed.",
)
TLS_GROUPS_LIMITED = Event(
    "tls.groups_limited",
    _warn,
    "{warning}",
    fields=("warning",),
    meaning="OpenSSL cannot be set to the preferred key exchange groups.",
)
CERTIFICATES_CHANGED = Event(
    "certificates.changed",
    _info,
    "certificate files changed: loading them",
    meaning="`--watch-certificates` has found new files.",
)
CERTIFICATES_REJECTED = Event(
    "certificates.rejected",
    _error,
    "certificates not loaded, keeping the current ones: {problem}",
    fields=("problem",),
    meaning="The new files are invalid or incomplete. The service tries again when they change.",
)

# --- reload ---

RELOAD_STARTED = Event(
    "reload.started",
    _info,
    "reload started",
    meaning="SIGHUP was received, or the certificates of workers have changed.",
)
SETTINGS_RELOADED = Event(
    "settings.reloaded",
    _info,
    "settings reloaded, changed: {settings}",
    fields=("settings",),
    meaning="The settings are valid and used from now on, with workers by each new worker.",
)
SETTINGS_NEED_RESTART = Event(
    "settings.need_restart",
    _warn,
    "restart needed for changed settings: {settings}",
    fields=("settings",),
    meaning="A reload does not change these settings.",
)
RELOAD_DONE = Event(
    "reload.done",
    _info,
    "reload done: {status}",
    fields=("status",),
    meaning="The reload succeeded; with workers, all are replaced.",
)
RELOAD_FAILED = Event(
    "reload.failed",
    _error,
    "reload failed, keeping current settings: {problem}",
    fields=("problem",),
    meaning="A setting or a certificate is invalid. Nothing has changed.",
)
TASK_CANCELLED = Event(
    "task.cancelled",
    _info,
    "{task} cancelled: the service stops",
    fields=("task",),
    meaning="A task was in progress when the stop signal arrived.",
)
TASK_FAILED = Event(
    "task.failed",
    _critical,
    "{task} failed",
    fields=("task",),
    meaning="A bug: an unexpected exception in a task.",
)

# --- workers ---

WORKER_READY = Event(
    "worker.ready",
    _info,
    "{worker} is ready",
    fields=("worker", "slot", "pid"),
    meaning="A worker serves. If it is a successor, its predecessor begins to drain.",
)
WORKER_ENDED = Event(
    "worker.ended",
    _info,
    "{worker} ended with status {exit_status}",
    fields=("worker", "slot", "pid", "exit_status"),
    meaning="A worker process has exited.",
)
WORKER_KILLED = Event(
    "worker.killed",
    _info,
    "{worker} was ended by {signal}",
    fields=("worker", "slot", "pid", "signal"),
    meaning="A worker process was ended by a signal.",
)
WORKER_PRINTED = Event(
    "worker.printed",
    _info,
    "{worker} printed: {line}",
    fields=("worker", "slot", "pid", "line"),
    meaning="A worker wrote to standard output.",
)
WORKER_PRINTED_ERROR = Event(
    "worker.printed_error",
    _error,
    "{worker} printed: {line}",
    fields=("worker", "slot", "pid", "line"),
    meaning="A worker wrote to standard error; often its last words.",
)
WORKER_START_TIMED_OUT = Event(
    "worker.start_timed_out",
    _error,
    "{worker} is not ready after {seconds:g} s and is killed",
    fields=("worker", "slot", "pid", "seconds"),
    meaning="`IStartable.start` takes too long, or the machine is overloaded.",
)
WORKER_HUNG = Event(
    "worker.hung",
    _error,
    "{worker} sent no heartbeat for {seconds:.1f} s: its stack is printed, and it is killed",
    fields=("worker", "slot", "pid", "seconds"),
    meaning="Hosted code blocks the reactor of a worker for `--hang-timeout`.",
)
WORKER_UNRESPONSIVE = Event(
    "worker.unresponsive",
    _error,
    "{worker} did not answer for {seconds:.1f} s and is killed",
    fields=("worker", "slot", "pid", "seconds"),
    meaning="A worker sends heartbeats, and does not read what the supervisor sends.",
)
WORKER_VIOLATION = Event(
    "worker.violation",
    _error,
    "{worker} violated the control protocol and is killed: {problem}",
    fields=("worker", "slot", "pid", "problem"),
    meaning="Code in the worker wrote to the channel of the supervisor, or its metrics break the rules of `IMetrics`.",
)
WORKER_MESSAGE_FAILED = Event(
    "worker.message_failed",
    _error,
    "{worker} sent a message that cannot be handled and is killed: {problem}",
    fields=("worker", "slot", "pid", "problem"),
    meaning="A bug in the supervisor, or a lack of memory.",
)
WORKER_RESTARTING = Event(
    "worker.restarting",
    _error,
    "slot {slot} gets a new worker in {seconds:.1f} s: {problem}",
    fields=("slot", "seconds", "problem"),
    meaning="A worker ended by itself. The time grows while its successors end, too.",
)
WORKER_SPAWN_FAILED = Event(
    "worker.spawn_failed",
    _error,
    "slot {slot}: {problem}",
    fields=("slot", "problem"),
    meaning="The operating system rejected a new process.",
)
WORKER_NOT_REPLACED = Event(
    "worker.not_replaced",
    _error,
    "workers not replaced: {problem}",
    fields=("problem",),
    meaning="A new worker failed. The workers that serve go on. It ends a reload.",
)
WORKER_TOO_OLD = Event(
    "worker.too_old",
    _info,
    "{worker} is replaced: --max-worker-age reached",
    fields=("worker", "slot", "pid"),
    meaning="A worker is replaced because of its age. No client is refused.",
)
WORKER_TOO_LARGE = Event(
    "worker.too_large",
    _info,
    "{worker} is replaced: {memory} MiB exceed --max-worker-memory",
    fields=("worker", "slot", "pid", "memory"),
    meaning="A worker is replaced because of its memory. No client is refused.",
)
WORKER_START_EXCEPTION = Event(
    "worker.start_exception",
    _critical,
    "exception in the start of a worker",
    meaning="Traceback of a worker that cannot start.",
)
SUPERVISOR_MESSAGE_FAILED = Event(
    "worker.supervisor_message_failed",
    _error,
    "message of the supervisor cannot be handled, draining: {problem}",
    fields=("problem",),
    meaning="A bug, or hosted code read from the channel of the supervisor. The worker is replaced.",
)
SLOT_REMOVED = Event(
    "slot.removed",
    _info,
    "slot {slot} removed",
    fields=("slot",),
    meaning="The last worker has drained after SIGTTOU.",
)
SLOT_NOT_REMOVED = Event(
    "slot.not_removed",
    _warn,
    "SIGTTOU ignored: the last worker stays",
    meaning="At least one worker is needed.",
)
SLOT_NOT_ADDED = Event(
    "slot.not_added",
    _error,
    "no worker can be added: {problem}",
    fields=("problem",),
    meaning="SIGTTIN was received, and a socket for one more worker cannot be bound.",
)

# --- logs and status server ---

LOG_DROPPED = Event(
    "log.dropped",
    _warn,
    "records dropped, too many at once: {count}",
    fields=("count",),
    meaning="A worker logs faster than the supervisor can write.",
)
LOG_FILES_KEPT = Event(
    "log.files_kept",
    _warn,
    "{file} and older files not rotated: --log-files is {count}",
    fields=("file", "count"),
    meaning="Rotated files with higher numbers exist. They are never renamed or removed.",
)
OUTPUT_FAILED = Event(
    "output.failed",
    _error,
    "{output} cannot be written: {problem}",
    fields=("output", "problem"),
    meaning="Records are kept in memory up to 1 MiB, then counted and dropped.",
)
OUTPUT_RECOVERED = Event(
    "output.recovered",
    _warn,
    "{output} is written again, lines dropped: {count}",
    fields=("output", "count"),
    meaning="A log or access log works again after `output.failed`.",
)
OUTPUT_NOT_REPLACED = Event(
    "output.not_replaced",
    _error,
    "{output}: {problem}",
    fields=("output", "problem"),
    meaning="A file cannot be reopened or rotated. The file that was open is still written.",
)
OUTPUT_REPLACED = Event(
    "output.replaced",
    _warn,
    "{output} is the file at its path again",
    fields=("output",),
    meaning="A file could be reopened or rotated after `output.not_replaced`.",
)
STATUS_LISTENING = Event(
    "status.listening",
    _info,
    "status on {listener}",
    fields=("listener",),
    meaning="The status server accepts connections.",
)
STATUS_ANSWER_FAILED = LimitedEvent(
    "status.answer_failed",
    _error,
    "status: an answer failed: {problem}",
    fields=("problem",),
    meaning="A bug, or a value that a protocol counts cannot be shown. The answer is 500.",
)
STATUS_NO_METRICS = Event(
    "status.no_metrics",
    _warn,
    "metrics need prometheus_client; pip install 'rtservice[metrics]'",
    meaning="`/metrics` answers 501.",
)

# --- stop ---

STOP_REQUESTED = Event(
    "stop.requested",
    _info,
    "{signal} received: stopping",
    fields=("signal",),
    meaning="The graceful shutdown begins.",
)
STOP_REPEATED = Event(
    "stop.repeated",
    _info,
    "{signal} received again: aborting open connections",
    fields=("signal",),
    meaning="The graceful shutdown ends early.",
)
STOP_FORCED = Event(
    "stop.forced",
    _error,
    "{signal} received again: exiting at once",
    fields=("signal",),
    meaning="The process did not end after two signals, and exits without cleaning up.",
)
DRAIN_STARTED = Event(
    "drain.started",
    _info,
    "draining for at most {seconds:g} s, open connections: {count}",
    fields=("count", "seconds"),
    meaning="New clients are not accepted. With workers, each worker logs it.",
)
DRAIN_DONE = Event(
    "drain.done",
    _info,
    "drained: {ended} ended, {aborted} aborted, {seconds:.1f} s",
    fields=("ended", "aborted", "seconds"),
    meaning="All connections have ended. With workers, each worker logs it, and then the supervisor with the sums.",
)
DRAIN_FAILED = Event(
    "drain.failed",
    _critical,
    "draining failed",
    meaning="A bug. The worker ends at once.",
)


EVENTS = {event.name: event for event in list(globals().values()) if isinstance(event, Event)}

# The areas of the reference, each with the first words of its events.
AREAS = {
    "Start": ("start", "service", "privileges", "systemd"),
    "Listeners": ("listener", "accept"),
    "Connections": ("connection", "proxy"),
    "Hosted protocols": ("protocol", "factory", "echo", "reactor"),
    "TLS and certificates": ("tls", "certificate", "certificates", "revocation"),
    "Reload": ("reload", "settings", "task"),
    "Workers": ("worker", "slot"),
    "Logs": ("log", "output"),
    "Status server": ("status",),
    "Graceful shutdown": ("stop", "drain"),
}
