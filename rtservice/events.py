"""Every record that rtservice logs, declared once: name, level, text, fields and meaning.

`WORKER_READY.log(logger, worker=…, slot=…, pid=…)` logs a record. Its field `event` is the stable name, here
`worker.ready`. Its other fields are exactly those that the event declares. A field has one type and one meaning in all
events: see FIELDS. The text is for people and may change at any time. Programs and tests use names and fields.

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
    """An event whose records are rate-limited. The field `suppressed` is the number left out since the last record."""

    __slots__ = ()

    def __init__(self, name: str, level: Any, text: str, *, fields: tuple[str, ...], meaning: str) -> None:
        super().__init__(name, level, text, fields=(*fields, "suppressed"), meaning=meaning)

    def log(self, logger: Logger, /, **fields: object) -> None:
        """Log a record with these fields. Its text includes the number of suppressed records unless that is 0."""
        logger.emit(self.level, self._text_of(fields), event=self.name, **fields)

    def failure(
        self, logger: Logger, failure: Failure | None = None, /, *, level: Any = None, **fields: object
    ) -> None:
        """Log a record with a traceback, as Event. Its text includes the number of suppressed records unless 0."""
        text = self._text_of(fields)
        logger.failure(text, failure, self.level if level is None else level, event=self.name, **fields)

    def _text_of(self, fields: dict[str, object]) -> str:
        return f"{self.text} ({{suppressed}} more since the last such record)" if fields["suppressed"] else self.text


class Field(NamedTuple):
    """A field of events. `types` are the allowed types of its values."""

    types: tuple[type, ...]
    meaning: str


_TEXT, _INTEGER, _NUMBER = (str,), (int,), (int, float)
_NONE = type(None)

FIELDS = {
    "aborted": Field(_INTEGER, "connections that were aborted at the end of a graceful shutdown"),
    "address": Field(_TEXT, "value of `NOTIFY_SOCKET`"),
    "beginning": Field(_TEXT, "first bytes that the client sent, at most 64, escaped"),
    "bytes_in": Field(_INTEGER, "bytes received; with TLS, decrypted bytes; with `library=pyopenssl`, encrypted bytes"),
    "bytes_out": Field(_INTEGER, "bytes sent; with TLS, counted as for `bytes_in`"),
    "connections": Field(_INTEGER, "value of `--max-connections`"),
    "count": Field(_INTEGER, "number of connections, records or files, depending on the event"),
    "days_left": Field(_INTEGER, "whole days until the certificate expires; negative after that"),
    "engine": Field(_TEXT, "the Redis of the hub: `--hub` without secrets; with sentinels also the master"),
    "ended": Field(_INTEGER, "connections that ended by themselves during a graceful shutdown"),
    "exit_status": Field(_INTEGER, "exit status of the process"),
    "factory": Field(_TEXT, "class of the factory that is served"),
    "file": Field(_TEXT, "path of a file"),
    "gid": Field((int, _NONE), "group id, or null if it is not changed"),
    "hint": Field(_TEXT, "how to try and to stop the service, for people"),
    "host": Field(_TEXT, "IP address"),
    "interface": Field(_TEXT, "`interface=` of a listen description"),
    "left": Field(_TEXT, "remaining time, for people"),
    "limit": Field(_INTEGER, "limit of connections or descriptors"),
    "line": Field(_TEXT, "line that a worker printed, escaped"),
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
    "platform": Field(_TEXT, "value of `sys.platform`"),
    "problem": Field(_TEXT, "what is wrong, for people; texts may change"),
    "protocol": Field(_TEXT, "class of the protocol, or the value of `--protocol`"),
    "reason": Field(_TEXT, "why a connection ended: see [](logs.md#why-a-connection-ended)"),
    "record": Field(_TEXT, "the text; in JSON logs only as `message`"),
    "seconds": Field(_NUMBER, "duration in seconds"),
    "setting": Field(_TEXT, "name of a setting, without `--`"),
    "settings": Field(_TEXT, "names of settings, separated by commas, or `none`"),
    "signal": Field(_TEXT, "name of a signal, such as `SIGTERM`"),
    "slot": Field(_INTEGER, "number of the worker, from 0; also in each record that a worker logs"),
    "stack": Field(_TEXT, "stack of the blocked thread"),
    "status": Field(_TEXT, "state of the service in one line"),
    "suppressed": Field(_INTEGER, "number of records of this kind left out since the last one"),
    "task": Field(_TEXT, "`reload`, `certificate check`, `certificate log` or `periodic check`"),
    "topic": Field(_TEXT, "topic of the hub, escaped"),
    "uid": Field((int, _NONE), "user id, or null if it is not changed"),
    "warning": Field(_TEXT, "the text; in JSON logs only as `message`"),
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
    "service failed, stopping: {problem}",
    fields=("problem",),
    meaning="A listener failed while the service was running. The process exits with a non-zero status.",
)
START_EXCEPTION = Event(
    "start.exception",
    _error,
    "start failed with an exception",
    meaning="Traceback of a failed start; at level `debug` if the operating system rejected a call.",
)
START_REACTOR_UNAVAILABLE = Event(
    "start.reactor_unavailable",
    _warn,
    "rtservice reactor unavailable on {platform}, using Twisted's default: {problem}",
    fields=("platform", "problem"),
    meaning="The platform has no `epoll`. The service works, but is slower.",
)
PRIVILEGES_DROPPED = Event(
    "privileges.dropped",
    _info,
    "privileges dropped: uid {uid}, gid {gid}",
    fields=("uid", "gid"),
    meaning="The process now runs as the user and group of `--uid` and `--gid`.",
)
PRIVILEGES_KEPT = Event(
    "privileges.kept",
    _warn,
    "root privileges kept: --gid {gid} is set without --uid",
    fields=("gid",),
    meaning="`--gid` changes only the group. The process runs as root, with root's supplementary groups.",
)
SYSTEMD_UNUSABLE = Event(
    "systemd.unusable",
    _warn,
    "NOTIFY_SOCKET {address!r} cannot be used: {problem}",
    fields=("address", "problem"),
    meaning="The service manager gets no notifications, such as readiness.",
)
SYSTEMD_DISCONNECTED = Event(
    "systemd.disconnected",
    _warn,
    "notifications to the service manager stopped: {problem}",
    fields=("problem",),
    meaning="The socket of the service manager is closed. It gets no further notifications.",
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
    meaning="The listener accepts clients. Logged once for each listener; with workers, when every worker is ready.",
)
LISTENER_ADDRESS_SKIPPED = Event(
    "listener.address_skipped",
    _warn,
    "address {host} of {interface} skipped: this host has no IPv6",
    fields=("host", "interface"),
    meaning="A host name resolves to an IPv6 address, but this host has no IPv6. Its other addresses are served.",
)
LISTENER_FILE_KEPT = Event(
    "listener.file_kept",
    _warn,
    "socket file of {listener} not removed: {problem}",
    fields=("listener", "problem"),
    meaning="The process has no permission to write to the directory. The next start replaces the file.",
)
LISTENER_STOP_FAILED = Event(
    "listener.stop_failed",
    _critical,
    "listener failed to stop",
    meaning="An endpoint of Twisted or of a plugin raised an exception when it stopped listening.",
)
ACCEPT_PAUSED = Event(
    "accept.paused",
    _error,
    "accepting on {listener} paused: {problem}",
    fields=("listener", "problem"),
    meaning="The process is out of descriptors or memory. Clients wait in the backlog until a retry succeeds.",
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
    "client {peer} on {listener} refused: {problem}",
    fields=("peer", "listener", "setting", "problem"),
    meaning="A client was refused because of a setting. At most one record in ten seconds for each setting. A refused "
    "client has no `connection.closed` and no line in the access log.",
)
CONNECTION_LIMIT_REACHED = Event(
    "connection.limit_reached",
    _warn,
    "--max-connections {limit} reached: new clients wait in the backlog",
    fields=("limit",),
    meaning="A waiting client is accepted when a connection ends. At most one record in ten seconds.",
)
CONNECTION_LIMIT_UNREACHABLE = Event(
    "connection.limit_unreachable",
    _warn,
    "--max-connections {connections} cannot be reached: the limit of descriptors is {limit}",
    fields=("connections", "limit"),
    meaning="The limit of descriptors (RLIMIT_NOFILE) is not higher than `--max-connections`.",
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
    meaning="A bug in rtservice. Metrics and the status page show earlier values.",
)
CONNECTION_LIST_FAILED = Event(
    "connection.list_failed",
    _critical,
    "listing the connections failed",
    meaning="A bug in rtservice. The status page lacks the connections of this worker.",
)
PROXY_HEADER_INVALID = Event(
    "proxy.header_invalid",
    _info,
    "invalid PROXY header from {peer} on {listener}: {problem}; it begins with {beginning}",
    fields=("peer", "listener", "problem", "beginning"),
    meaning="A client or proxy sent no valid PROXY header. At most five records in ten seconds for each listener.",
)
PROXY_HEADERS_SUPPRESSED = Event(
    "proxy.headers_suppressed",
    _info,
    "invalid PROXY headers on {listener} not logged: {count}",
    fields=("listener", "count"),
    meaning="The number of invalid PROXY headers in the last ten seconds that have no record `proxy.header_invalid`.",
)
TLS_THREAD_FAILED = Event(
    "tls.thread_failed",
    _critical,
    "TLS handshake in a thread failed",
    meaning="A bug in rtservice. When a client fails, `connection.closed` has the reason `TLS failed (…)`.",
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
    meaning="Traceback of `startFactory` or `IStartable.start`. `start.failed` has the exception in one line.",
)
FACTORY_METRICS_REJECTED = Event(
    "factory.metrics_rejected",
    _warn,
    "metrics of {factory} rejected: {problem}",
    fields=("factory", "problem"),
    meaning="`IMetrics.metrics` returned a name or value that is not allowed. The valid ones are used.",
)
ECHO_MESSAGE_REJECTED = Event(
    "echo.message_rejected",
    _warn,
    "closing connection of {peer}: {problem}",
    fields=("peer", "problem"),
    meaning="A client of echo sent a message that is too long or violates the framing.",
)
REACTOR_BLOCKED = Event(
    "reactor.blocked",
    _error,
    "reactor blocked for {seconds:.1f} s, all clients wait for this code:\n{stack}",
    fields=("seconds", "stack"),
    meaning="Code, usually of the hosted protocol, blocks the reactor. At most one record in ten seconds.",
)

# --- the hub ---

HUB_PASSWORD_VISIBLE = Event(
    "hub.password_visible",
    _warn,
    "--hub contains a password, which ps shows to other users: set RTSERVICE_HUB or --hub-file instead",
    meaning="The URL of the hub is on the command line and contains a password. Logged at the start.",
)
HUB_UNUSED = Event(
    "hub.unused",
    _warn,
    "the hub has a URL, but {factory} does not use the hub: it does not provide IHubUser",
    fields=("factory",),
    meaning="`--hub` or `--hub-file` has no effect with this protocol. Each worker logs it.",
)
HUB_RECEIVER_FAILED = LimitedEvent(
    "hub.receiver_failed",
    _critical,
    "receiver of the topic {topic} failed",
    fields=("topic",),
    meaning="A receiver raised an exception in `received` or `gap`. Other receivers are not affected. At most ten "
    "records in ten seconds.",
)
HUB_LINK_FULL = LimitedEvent(
    "hub.link_full",
    _warn,
    "messages of the topic {topic} to another worker dropped: it reads too slowly",
    fields=("topic",),
    meaning="More than 4 MiB wait for another worker. Its receivers of the topic get a gap. At most three records "
    "in ten seconds.",
)

HUB_CONNECTED = Event(
    "hub.connected",
    _info,
    "hub connected to {engine}",
    fields=("engine",),
    meaning="The hub works. All topics are subscribed, and members and claims of this process are in Redis.",
)
HUB_CONNECTION_LOST = Event(
    "hub.connection_lost",
    _warn,
    "hub unavailable: the connection to {engine} ended: {problem}; reconnecting",
    fields=("engine", "problem"),
    meaning="The hub is unavailable until `hub.connected`. Then receivers get a gap.",
)
HUB_UNAVAILABLE = Event(
    "hub.unavailable",
    _error,
    "hub unavailable: {engine}: {problem}; trying again",
    fields=("engine", "problem"),
    meaning="The hub has no connection to Redis, and tries again every 2 seconds or more often. Each reason is logged "
    "once until `hub.connected`, and at most three.",
)
HUB_REFUSED = LimitedEvent(
    "hub.refused",
    _error,
    "hub impaired: {engine} refused a command: {problem}",
    fields=("engine", "problem"),
    meaning="Redis refused a command, for example because it is out of memory or the user lacks a permission. Members "
    "and claims of this process may be missing for others; they are sent again every 2 seconds. At most three records "
    "in a minute.",
)
HUB_STOP_INCOMPLETE = Event(
    "hub.stop_incomplete",
    _warn,
    "hub stopped before {engine} had confirmed everything: {problem}",
    fields=("engine", "problem"),
    meaning="The last messages of this process may be lost. Its members and claims disappear within 20 seconds.",
)
HUB_EVICTION = Event(
    "hub.eviction",
    _warn,
    "hub at risk: {engine} may remove members and claims when its memory is full; set maxmemory-policy noeviction",
    fields=("engine",),
    meaning="Redis has a limit of memory, and a policy that removes keys without expiry.",
)
HUB_UNVERIFIED = Event(
    "hub.unverified",
    _warn,
    "hub not protected: the certificate of {engine} is not verified, because of verify=no",
    fields=("engine",),
    meaning="Anyone who can redirect the connection to Redis can read and change messages, and learns the password.",
)
HUB_EXCEPTION = Event(
    "hub.exception",
    _critical,
    "connection of the hub failed with an exception",
    meaning="A bug in rtservice. The hub reconnects.",
)

# --- certificates ---

CERTIFICATE_LOADED = Event(
    "certificate.loaded",
    _info,
    "certificate {path} for {names}: expires in {left}",
    fields=("path", "names", "left", "not_after", "days_left"),
    meaning="New connections get this certificate. Logged at the start and after each reload.",
)
CERTIFICATE_NOT_YET_VALID = Event(
    "certificate.not_yet_valid",
    _warn,
    "certificate {path} for {names}: not valid yet",
    fields=("path", "names", "not_after", "days_left"),
    meaning="Clients reject the certificate until its validity begins.",
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
    meaning="Client certificates are checked against this list.",
)
REVOCATION_UNDATED = Event(
    "revocation.undated",
    _info,
    "revocation list {path}: no next update",
    fields=("path", "next_update"),
    meaning="Client certificates are checked against this list, which never expires.",
)
REVOCATION_EXPIRED = Event(
    "revocation.expired",
    _warn,
    "revocation list {path}: expired, refusing all clients of its authority",
    fields=("path", "next_update"),
    meaning="The next update of the list has passed. Install a new list and reload.",
)
TLS_GROUPS_LIMITED = Event(
    "tls.groups_limited",
    _warn,
    "{warning}",
    fields=("warning",),
    meaning="Python's `ssl` cannot select the preferred key exchange groups.",
)
CERTIFICATES_CHANGED = Event(
    "certificates.changed",
    _info,
    "certificate files changed: loading them",
    meaning="`--watch-certificates` has found that files have changed.",
)
CERTIFICATES_REJECTED = Event(
    "certificates.rejected",
    _error,
    "certificates not loaded, keeping the current ones: {problem}",
    fields=("problem",),
    meaning="The changed files are invalid or incomplete. They are loaded when they change again.",
)

# --- reload ---

RELOAD_STARTED = Event(
    "reload.started",
    _info,
    "reload started",
    meaning="SIGHUP was received; or, with workers, watched certificate files have changed.",
)
SETTINGS_RELOADED = Event(
    "settings.reloaded",
    _info,
    "settings reloaded, changed: {settings}",
    fields=("settings",),
    meaning="The new settings are valid and now current; with workers, for each new worker.",
)
SETTINGS_NEED_RESTART = Event(
    "settings.need_restart",
    _warn,
    "restart needed for changed settings: {settings}",
    fields=("settings",),
    meaning="A reload does not apply these settings. They stay unchanged until a restart.",
)
RELOAD_DONE = Event(
    "reload.done",
    _info,
    "reload done: {status}",
    fields=("status",),
    meaning="The reload succeeded; with workers, all have been replaced.",
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
    meaning="The task was in progress when the service began to stop.",
)
TASK_FAILED = Event(
    "task.failed",
    _critical,
    "{task} failed",
    fields=("task",),
    meaning="A bug in rtservice: an unexpected exception in the task.",
)

# --- workers ---

WORKER_READY = Event(
    "worker.ready",
    _info,
    "{worker} is ready",
    fields=("worker", "slot", "pid"),
    meaning="The worker accepts clients. If it replaces a worker, that one begins to drain.",
)
WORKER_ENDED = Event(
    "worker.ended",
    _info,
    "{worker} ended with status {exit_status}",
    fields=("worker", "slot", "pid", "exit_status"),
    meaning="The worker process has exited.",
)
WORKER_KILLED = Event(
    "worker.killed",
    _info,
    "{worker} was ended by {signal}",
    fields=("worker", "slot", "pid", "signal"),
    meaning="A signal has ended the worker process. SIGKILL may come from the kernel's out-of-memory killer.",
)
WORKER_PRINTED = Event(
    "worker.printed",
    _info,
    "{worker} printed: {line}",
    fields=("worker", "slot", "pid", "line"),
    meaning="The worker wrote this line to standard output.",
)
WORKER_PRINTED_ERROR = Event(
    "worker.printed_error",
    _error,
    "{worker} printed: {line}",
    fields=("worker", "slot", "pid", "line"),
    meaning="The worker wrote this line to standard error. It is often part of the traceback of a crash.",
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
    "{worker} sent no heartbeat for {seconds:.1f} s and is killed; its stack follows",
    fields=("worker", "slot", "pid", "seconds"),
    meaning="Hosted code has blocked the reactor of the worker for `--hang-timeout`.",
)
WORKER_UNRESPONSIVE = Event(
    "worker.unresponsive",
    _error,
    "{worker} did not answer for {seconds:.1f} s and is killed",
    fields=("worker", "slot", "pid", "seconds"),
    meaning="The worker sends heartbeats, but does not read messages of the supervisor.",
)
WORKER_VIOLATION = Event(
    "worker.violation",
    _error,
    "{worker} violated the control protocol and is killed: {problem}",
    fields=("worker", "slot", "pid", "problem"),
    meaning="Code in the worker wrote to the control channel, or its metrics violate the rules of `IMetrics`.",
)
WORKER_MESSAGE_FAILED = Event(
    "worker.message_failed",
    _error,
    "{worker} sent a message that cannot be handled and is killed: {problem}",
    fields=("worker", "slot", "pid", "problem"),
    meaning="A bug in rtservice, or the supervisor is out of memory.",
)
WORKER_UNLINKED = Event(
    "worker.unlinked",
    _error,
    "{worker} cannot be linked with the other workers and is killed: {problem}",
    fields=("worker", "slot", "pid", "problem"),
    meaning="The worker uses the hub, but another worker reports that it does not read or sends invalid data; or the "
    "supervisor has no descriptors for its links.",
)
WORKER_RESTARTING = Event(
    "worker.restarting",
    _error,
    "slot {slot} gets a new worker in {seconds:.1f} s: {problem}",
    fields=("slot", "seconds", "problem"),
    meaning="A worker ended unexpectedly. The delay doubles with each further failure, up to 30 s.",
)
WORKER_SPAWN_FAILED = Event(
    "worker.spawn_failed",
    _error,
    "slot {slot}: {problem}",
    fields=("slot", "problem"),
    meaning="The operating system rejected a new worker process.",
)
WORKER_NOT_REPLACED = Event(
    "worker.not_replaced",
    _error,
    "workers not replaced: {problem}",
    fields=("problem",),
    meaning="A new worker failed. The current workers continue to serve. A reload in progress has failed.",
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
    "{worker} is replaced: its {memory} MiB exceed --max-worker-memory",
    fields=("worker", "slot", "pid", "memory"),
    meaning="A worker is replaced because of its memory. No client is refused.",
)
WORKER_START_EXCEPTION = Event(
    "worker.start_exception",
    _critical,
    "worker failed to start",
    meaning="Traceback of a worker that cannot start.",
)
SUPERVISOR_MESSAGE_FAILED = Event(
    "worker.supervisor_message_failed",
    _error,
    "message of the supervisor cannot be handled, draining: {problem}",
    fields=("problem",),
    meaning="A bug in rtservice, or hosted code read from the control channel. The worker is replaced.",
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
    "worker not added: {problem}",
    fields=("problem",),
    meaning="SIGTTIN was received, but a socket for another worker cannot be bound.",
)

# --- logs and status server ---

LOG_DROPPED = Event(
    "log.dropped",
    _warn,
    "log records dropped: {count}",
    fields=("count",),
    meaning="A worker logs faster than the supervisor can write.",
)
LOG_FILES_KEPT = Event(
    "log.files_kept",
    _warn,
    "{file} and older files not rotated: --log-files is {count}",
    fields=("file", "count"),
    meaning="Rotated files with numbers above `--log-files` exist. They are never renamed or removed.",
)
OUTPUT_FAILED = Event(
    "output.failed",
    _error,
    "{output} cannot be written: {problem}",
    fields=("output", "problem"),
    meaning="Up to 1 MiB of lines is kept in memory. Further lines are dropped and counted.",
)
OUTPUT_RECOVERED = Event(
    "output.recovered",
    _warn,
    "{output} is written again, lines dropped: {count}",
    fields=("output", "count"),
    meaning="The log or access log works again after `output.failed`.",
)
OUTPUT_NOT_REPLACED = Event(
    "output.not_replaced",
    _error,
    "{output}: {problem}",
    fields=("output", "problem"),
    meaning="The file cannot be reopened or rotated. Lines are still written to the open file.",
)
OUTPUT_REPLACED = Event(
    "output.replaced",
    _warn,
    "{output} reopened: lines go to the file at its path again",
    fields=("output",),
    meaning="The file was reopened or rotated after `output.not_replaced`.",
)
STATUS_LISTENING = Event(
    "status.listening",
    _info,
    "status server ready on {listener}",
    fields=("listener",),
    meaning="The status server accepts connections. Logged once for each of its listeners.",
)
STATUS_ANSWER_FAILED = LimitedEvent(
    "status.answer_failed",
    _error,
    "status server failed to answer a request: {problem}",
    fields=("problem",),
    meaning="A bug in rtservice, or a metric of the protocol cannot be shown. The client gets status 500.",
)
STATUS_NO_METRICS = Event(
    "status.no_metrics",
    _warn,
    "metrics unavailable: prometheus_client is not installed; run pip install 'rtservice[metrics]'",
    meaning="`/metrics` answers with status 501.",
)

# --- stop ---

STOP_REQUESTED = Event(
    "stop.requested",
    _info,
    "{signal} received: stopping",
    fields=("signal",),
    meaning="A graceful shutdown begins.",
)
STOP_REPEATED = Event(
    "stop.repeated",
    _info,
    "{signal} received again: aborting open connections",
    fields=("signal",),
    meaning="A second stop signal ends the graceful shutdown early.",
)
STOP_FORCED = Event(
    "stop.forced",
    _error,
    "{signal} received again: exiting at once",
    fields=("signal",),
    meaning="The process did not end after earlier stop signals, and exits without cleaning up.",
)
DRAIN_STARTED = Event(
    "drain.started",
    _info,
    "draining for at most {seconds:g} s, open connections: {count}",
    fields=("count", "seconds"),
    meaning="No new clients are accepted. With workers, each worker logs this.",
)
DRAIN_DONE = Event(
    "drain.done",
    _info,
    "drained: {ended} ended, {aborted} aborted, {seconds:.1f} s",
    fields=("ended", "aborted", "seconds"),
    meaning="All connections have ended. With workers, each worker logs this, and then the supervisor with the sums.",
)
DRAIN_FAILED = Event(
    "drain.failed",
    _critical,
    "draining failed",
    meaning="A bug in rtservice. The worker exits at once.",
)


EVENTS = {event.name: event for event in list(globals().values()) if isinstance(event, Event)}

# The areas of the reference, each with the first parts of the names of its events.
AREAS = {
    "Start": ("start", "service", "privileges", "systemd"),
    "Listeners": ("listener", "accept"),
    "Connections": ("connection", "proxy"),
    "Hosted protocols": ("protocol", "factory", "echo", "reactor"),
    "Hub": ("hub",),
    "TLS and certificates": ("tls", "certificate", "certificates", "revocation"),
    "Reload": ("reload", "settings", "task"),
    "Workers": ("worker", "slot"),
    "Logs": ("log", "output"),
    "Status server": ("status",),
    "Graceful shutdown": ("stop", "drain"),
}
