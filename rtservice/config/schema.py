"""Every setting once: its name, type, range, default, help, and whether a reload applies a change.

The command line, the environment variables, the TOML file and the reference pages are made from this schema. Options of
shipped protocols that are settings too are not declared here; callers add them as `aliases`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rtservice.config.values import (
    DESCRIPTION,
    FLAG,
    HOSTS,
    HUB_URL,
    LEVELS,
    NETWORKS,
    NON_EMPTY,
    PROTOCOL_OPTION,
    TEXT,
    AppliedBy,
    AtLimit,
    Kind,
    LevelRule,
    Network,
    either,
    one_of,
    parse_levels,
    parse_networks,
    seconds,
    whole_number,
)


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    A `repeatable` setting is a tuple of parsed values. `help` is one or two short sentences for `--help`, and `details`
    continue it on the reference page; text that a user may type is in backticks. `metavar` stands for the value in
    `--help`. `applied_by` is `reload` if a reload applies a change. `protocol` is the protocol whose option an alias
    is, and empty for other settings.
    """

    name: str
    topic: str
    kind: Kind
    default: Any
    help: str
    details: str = ""
    metavar: str = ""
    short: str = ""
    repeatable: bool = False
    applied_by: AppliedBy = "restart"
    protocol: str = ""

    @property
    def field(self) -> str:
        """The name of its field in Settings, unless it is an alias."""
        return self.name.replace("-", "_")


def _setting(
    default: Any,
    kind: Kind,
    topic: str,
    help: str,
    details: str = "",
    *,
    metavar: str = "",
    short: str = "",
    repeatable: bool = False,
    applied_by: AppliedBy = "restart",
) -> Any:
    metadata = {
        "topic": topic,
        "kind": kind,
        "help": help,
        "details": details,
        "metavar": metavar or kind.metavar,
        "short": short,
        "repeatable": repeatable,
        "applied_by": applied_by,
    }
    return field(default=default, metadata=metadata, repr=kind.show is None)


_LISTENING = "Listening"
_PROTOCOL = "Protocol"
_LIMITS = "Limits and timeouts"
_TLS = "TLS"
_WORKERS = "Workers"
_HUB = "Hub"
_STATUS = "Status server"
_LOGGING = "Logging"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Validated settings. Users meet them in the order of the fields, which is grouped by topic."""

    port: int = _setting(
        8080,
        whole_number(0, 65535),
        _LISTENING,
        "TCP port, on IPv4 and IPv6. `0` lets the system choose; the log shows the address.",
        "IPv6 is used if the host has it. The two sockets have the same port number.",
        metavar="PORT",
        short="p",
    )
    interface: str = _setting(
        "",
        TEXT,
        _LISTENING,
        "Address or host name for `--port`, such as `127.0.0.1`, `::1` or `localhost`. Default: all addresses.",
        "A link-local address needs its interface: `fe80::1%eth0`.",
        metavar="ADDRESS",
        short="i",
    )
    listen: tuple[str, ...] = _setting(
        (),
        DESCRIPTION,
        _LISTENING,
        "Listen description, instead of `--port`. Examples: `tcp:8080`, `ssl:8443:certificates=/dir`, "
        "`unix:/run/rt.sock`.",
        "The syntax is that of Twisted's endpoints. Further examples: `127.0.0.1:8080`, `[::1]:8080`, "
        "`tcp6:8080:interface=::1`, `ssl:8443:privateKey=key.pem:certKey=cert.pem`, `unix:/run/rt.sock:mode=660`, "
        "`systemd:name=web`. `proxy:` before one of them accepts PROXY headers. Other types that Twisted or a plugin "
        "provides are accepted without workers. See [](listen.md).",
        short="l",
        repeatable=True,
    )
    # With Twisted's 50, a burst overflows the queue, and a client waits a second before it sends its SYN again. 1024 is
    # more than what connects while one batch of events is handled. Linux caps it at net.core.somaxconn (4096).
    backlog: int = _setting(
        1024,
        whole_number(1, 65535),
        _LISTENING,
        "Connections that may wait in the kernel until they are accepted, for each listener.",
        "The kernel caps it at `net.core.somaxconn`.",
    )
    proxy_from: tuple[Network, ...] = _setting(
        parse_networks("127.0.0.0/8,::1/128"),
        NETWORKS,
        _LISTENING,
        "Peers whose PROXY header is trusted on `proxy:` listeners: addresses and networks, separated by commas.",
        applied_by="reload",
    )
    protocol: str = _setting(
        "echo",
        NON_EMPTY,
        _PROTOCOL,
        "Protocol to serve: a name, or `package.module:name` of a Factory or Protocol. `--protocol help` lists names.",
        "`package.module:name` is a Factory class, a function that returns a factory, or a Protocol class.",
        metavar="NAME",
    )
    protocol_option: tuple[str, ...] = _setting(
        (),
        PROTOCOL_OPTION,
        _PROTOCOL,
        "Option of the protocol. `key=@FILE` and `key=$VARIABLE` read a secret from a file or the environment.",
        "The options are passed as keyword arguments. The values of `key=@/path/to/file` and `key=$VARIABLE` are not "
        "shown by `ps`. `@@` and `$$` begin a value that begins with `@` or `$`.",
        repeatable=True,
    )
    max_connections: int | None = _setting(
        None,
        either("auto", None, whole_number(1, 10_000_000)),
        _LIMITS,
        "Open connections of the whole service at once. `auto` is what the file descriptor limit allows.",
        "Several workers share the limit equally. `auto` raises the descriptor limit to its hard limit at the start, "
        "keeps a reserve, and applies to each worker.",
        applied_by="reload",
    )
    max_connections_per_peer: int = _setting(
        0,
        whole_number(0, 1_000_000),
        _LIMITS,
        "Open connections of one client address at once; `0` means no limit.",
        "An IPv4-mapped IPv6 address counts as the IPv4 address. Several workers share the limit equally, rounded up.",
        applied_by="reload",
    )
    # One customer usually has a whole /64 (RFC 6177, RFC 4291 section 2.5.4), and with it 2^64 addresses.
    peer_prefix_v6: int = _setting(
        64,
        whole_number(1, 128),
        _LIMITS,
        "IPv6 addresses that share this many leading bits count as one client address.",
        metavar="BITS",
        applied_by="reload",
    )
    at_limit: AtLimit = _setting(
        "pause",
        one_of(AtLimit),
        _LIMITS,
        "At `--max-connections`: `pause` leaves new clients in the backlog, `reject` closes them at once.",
        applied_by="reload",
    )
    # Ten times what a client needs on a slow line that loses packets.
    handshake_timeout: float = _setting(
        10.0,
        seconds(0.1, 3600),
        _LIMITS,
        "Timeout for the PROXY header, and again for the TLS handshake, in seconds.",
        "The connection is closed then.",
        applied_by="reload",
    )
    # An active client sends something every minute or so; one that is silent for ten has mostly lost its network.
    idle_timeout: float = _setting(
        600.0,
        either("0", 0.0, seconds(0.1, 10_000_000)),
        _LIMITS,
        "Close a connection after this many seconds without a byte in either direction; `0` disables it.",
        applied_by="reload",
    )
    # Below the time after which service managers kill: 90 s with systemd.
    drain_timeout: float = _setting(
        30.0,
        seconds(0, 86400),
        _LIMITS,
        "Graceful shutdown timeout, in seconds. Connections that are still open then are aborted.",
        applied_by="reload",
    )
    watch_certificates: bool = _setting(
        False,
        FLAG,
        _TLS,
        "Reload certificates when their files change, and not only on SIGHUP.",
        applied_by="reload",
    )
    workers: int | None = _setting(
        1,
        either("auto", None, whole_number(1, 1024)),
        _WORKERS,
        "Number of worker processes; `auto` is one per available CPU. With `1` a single process does everything.",
    )
    # Longer than what stalls a healthy worker: a page-in from a slow disk, a large garbage collection.
    hang_timeout: float = _setting(
        30.0,
        either("0", 0.0, seconds(1, 86400)),
        _WORKERS,
        "Kill and replace a worker that sends no heartbeat for this many seconds; `0` disables it.",
        "The log then has the worker's stack.",
        applied_by="reload",
    )
    max_worker_age: float = _setting(
        0.0,
        either("0", 0.0, seconds(1, 100_000_000)),
        _WORKERS,
        "Replace a worker after this many seconds; `0` disables it.",
        "The time is varied by up to a tenth, so that workers are not replaced all at once.",
        applied_by="reload",
    )
    max_worker_memory: int = _setting(
        0,
        # A worker starts with about 50 MiB, and would be replaced repeatedly.
        either("0", 0, whole_number(64, 1024 * 1024)),
        _WORKERS,
        "Replace a worker whose resident memory exceeds this many MiB, 64 or more; `0` disables it.",
        metavar="MIB",
        applied_by="reload",
    )
    hub: str = _setting(
        "",
        HUB_URL,
        _HUB,
        "Redis that connects the hubs of several machines, such as `redis://redis.example.com:6379/0`. Default: none.",
        "By default, the hub connects the clients of this service alone, in all its workers. Valkey works as Redis "
        "does. `rediss://` uses TLS. `redis+sentinel://host1,host2/name` asks sentinels for the master, and "
        "`redis+unix:///run/redis.sock` uses a UNIX socket. A user, a password and the values of options are "
        "percent-encoded. The URL needs the extra `redis`. `ps` shows a password on the command line to other users: "
        "set it in the environment or in `--hub-file`. A protocol that does not use the hub ignores the URL.",
    )
    hub_file: str = _setting(
        "",
        TEXT,
        _HUB,
        "File that contains the URL of `--hub` in one line, for a URL with a password.",
        "A relative path starts in the directory of the command. The file is read at the start, before privileges are "
        "dropped. A reload reads it again for the new workers, and so gives them a new password.",
        metavar="FILE",
    )
    hub_required: bool = _setting(
        False,
        FLAG,
        _HUB,
        "Report the service as not ready while the hub has no connection.",
        "`/readyz` then answers 503, and a load balancer sends new clients elsewhere. With workers, one ready worker "
        "whose hub has a connection is enough. The start does not wait for the hub, and connections stay open and are "
        "accepted as before. By default, the hub does not affect readiness: an outage of Redis would make all machines "
        "unavailable.",
        applied_by="reload",
    )
    status: str = _setting(
        "",
        TEXT,
        _STATUS,
        "Listen description of the HTTP status server, such as `tcp:9090` (loopback only) or `*:9090`. Default: none.",
        "It serves the status page, `/status.json`, `/metrics`, `/healthz` and `/readyz`. A description without an "
        "address listens on loopback.",
        metavar="LISTENER",
    )
    # A name of an attacker that resolves to our address lets a page of theirs read the answers (DNS rebinding).
    status_host: tuple[str, ...] = _setting(
        (),
        HOSTS,
        _STATUS,
        "Host names that clients of the status server may use, separated by commas; `*` allows any.",
        "IP addresses, `localhost` and the `interface=` of `--status` are always allowed. A request for another host "
        "is answered with 421. UNIX sockets accept every name.",
        applied_by="reload",
    )
    log_level: tuple[LevelRule, ...] = _setting(
        parse_levels("info"),
        LEVELS,
        _LOGGING,
        "Lowest level that is logged: `debug`, `info`, `warn`, `error` or `critical`. By namespace: "
        "`info,twisted=warn`.",
        "A level without a namespace is that of rtservice's own records. Several namespaces are separated by commas: "
        "`info,rtservice.net=debug,twisted=warn`. The record of a closed connection has the level `info`.",
        applied_by="reload",
    )
    access_log: str = _setting(
        "",
        TEXT,
        _LOGGING,
        "File for one line per closed connection, instead of a log record; `-` is standard output. Default: none.",
        "SIGUSR1 reopens the file.",
        metavar="FILE",
    )
    # Each rotation renames all files in one event: 30 took 1.5 ms on a busy machine, 100 took 3 ms.
    log_files: int = _setting(
        30,
        whole_number(0, 100),
        _LOGGING,
        "Rotated files of 1 MB to keep for twistd's `--logfile`. `0` disables rotation; logrotate needs that.",
        "The oldest file is replaced. SIGUSR1 reopens the file.",
    )
    aliases: Mapping[Setting, Any] = field(default_factory=dict, repr=False)

    def items(self) -> Iterator[tuple[Setting, Any]]:
        """Yield each setting with its value, in the order of `all_settings`."""
        for setting in all_settings(self.aliases):
            yield setting, self.aliases[setting] if setting.protocol else getattr(self, setting.field)


_SETTINGS = tuple(
    Setting(name=declared.name.replace("_", "-"), default=declared.default, **declared.metadata)
    for declared in dataclasses.fields(Settings)
    if declared.metadata
)


def all_settings(aliases: Iterable[Setting] = ()) -> Iterator[Setting]:
    """Yield every setting in the order in which users meet them; aliases follow `protocol-option`."""
    for setting in _SETTINGS:
        yield setting
        if setting.kind is PROTOCOL_OPTION:
            yield from aliases


def changes(old: Settings, new: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the settings that differ: those that a reload applies, and those that need a restart."""
    before = dict(old.items())
    changed = [setting for setting, value in new.items() if before.get(setting, setting.default) != value]
    by_reload = tuple(setting.name for setting in changed if setting.applied_by == "reload")
    return by_reload, tuple(setting.name for setting in changed if setting.applied_by == "restart")
