"""Every setting once: its name, type, range, default, help, and when a change of it takes effect.

The command line, the environment's variables, the TOML file and the reference are made from this schema.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rtservice.config.values import (
    DESCRIPTION,
    ESCAPED,
    FLAG,
    HOSTS,
    LEVELS,
    NETWORKS,
    NON_EMPTY,
    PROTOCOL_OPTION,
    TEXT,
    AtLimit,
    Kind,
    LevelRule,
    Network,
    Takes,
    either,
    one_of,
    parse_levels,
    parse_networks,
    seconds,
    whole_number,
)
from rtservice.protocols.echo import Framing, Greet


@dataclass(frozen=True)
class Setting:
    """One setting: what it is called, and how its text becomes a value.

    `repeatable` settings are tuples of parsed values. `help` has what a user may type in backticks. `takes` says what
    it takes for a change of it to have an effect.
    """

    name: str
    kind: Kind
    default: Any
    help: str
    short: str = ""
    repeatable: bool = False
    takes: Takes = "restart"

    @property
    def field(self) -> str:
        """What it is called in Settings."""
        return self.name.replace("-", "_")


# The protocols that this package has; none of their options is a secret. Not entry points: to read what all installed
# packages offer would be a tenth of a worker's start.
SHIPPED = {"echo": "rtservice.protocols.echo:EchoFactory", "chat": "rtservice.protocols.chat:ChatFactory"}


def _setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    short: str = "",
    repeatable: bool = False,
    takes: Takes = "restart",
) -> Any:
    metadata = {"kind": kind, "help": help, "short": short, "repeatable": repeatable, "takes": takes}
    return dataclasses.field(default=default, metadata=metadata, repr=kind.show is None)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings in force, validated."""

    port: int = _setting(
        8080,
        whole_number(0, 65535),
        "TCP port, on IPv4 and, where the host has it, IPv6: two sockets with one number. `0`: the system picks, the "
        "log says which.",
        short="p",
    )
    interface: str = _setting(
        "",
        TEXT,
        "Address or host name that `--port` listens on, instead of all: `127.0.0.1`, `::1`, `fe80::1%eth0`, "
        "`localhost`.",
        short="i",
    )
    listen: tuple[str, ...] = _setting(
        (),
        DESCRIPTION,
        "A description in Twisted's endpoint syntax, instead of `--port`; repeatable: `tcp:8080`, "
        "`127.0.0.1:8080`, `[::1]:8080`, `tcp6:8080:interface=::1`, "
        "`ssl:8443:privateKey=key.pem:certKey=cert.pem`, `ssl:8443:certificates=/dir`, "
        "`unix:/run/rt.sock:mode=660`, `systemd:name=web`, any other that Twisted knows; `proxy:` before one of them "
        "takes PROXY headers.",
        short="l",
        repeatable=True,
    )
    # Twisted's 50 makes a burst's losers wait a second for their SYN to be sent again; 1024 is beyond what connects
    # while one batch of events is handled. Linux caps it at 4096 unless told otherwise (net.core.somaxconn).
    backlog: int = _setting(
        1024,
        whole_number(1, 65535),
        "Connections that wait in the kernel, for each listener, until they are accepted; the kernel caps it at "
        "net.core.somaxconn.",
    )
    max_connections: int | None = _setting(
        None,
        either("auto", None, whole_number(1, 10_000_000)),
        "Open connections of the whole service at once; each of several workers has an equal share. `auto`: what the "
        "descriptor limit, raised to its hard limit at the start, allows less a reserve, in each worker.",
        takes="reload",
    )
    max_connections_per_peer: int = _setting(
        0,
        whole_number(0, 1_000_000),
        "Open connections of one address at once; `0`: no limit. An IPv4-mapped IPv6 address counts as the IPv4 one. "
        "Each of several workers has an equal share, rounded up.",
        takes="reload",
    )
    # One customer usually has a whole /64 (RFC 6177, RFC 4291 section 2.5.4), and with it 2^64 addresses.
    peer_prefix_v6: int = _setting(
        64,
        whole_number(1, 128),
        "IPv6 addresses that share this many leading bits count as one peer.",
        takes="reload",
    )
    at_limit: AtLimit = _setting(
        "pause",
        one_of(AtLimit),
        "At `--max-connections`: `pause`, clients wait in the kernel until there is room, or `reject`, they are closed "
        "at once.",
        takes="reload",
    )
    # Ten times what a client needs on a line that is slow and loses packets.
    handshake_timeout: float = _setting(
        10.0,
        seconds(0.1, 3600),
        "Seconds that a client may take for its PROXY header, and again for its TLS handshake; then it is closed.",
        takes="reload",
    )
    # Clients that are there say something every minute or so; one that is silent for ten has mostly lost its network.
    idle_timeout: float = _setting(
        600.0,
        either("0", 0.0, seconds(0.1, 10_000_000)),
        "Seconds without a byte in either direction, after which a connection is closed; `0`: never.",
        takes="reload",
    )
    # Below what service managers grant before they kill: 90 s with systemd.
    drain_timeout: float = _setting(
        30.0,
        seconds(0, 86400),
        "Seconds that connections get to end by themselves once the service is told to stop.",
        takes="reload",
    )
    proxy_from: tuple[Network, ...] = _setting(
        parse_networks("127.0.0.0/8,::1/128"),
        NETWORKS,
        "The only peers that a `proxy:` listener believes: addresses and networks, with commas between them.",
        takes="reload",
    )
    watch_certificates: bool = _setting(
        False,
        FLAG,
        "Load certificates again when their files change, and not only on SIGHUP.",
        takes="reload",
    )
    workers: int | None = _setting(
        1,
        either("auto", None, whole_number(1, 1024)),
        "Processes that serve; `auto`: one for each CPU that this one may use. With `1` nothing is spawned.",
    )
    # Longer than any stall that is none: a page-in from a slow disk, a large garbage collection.
    hang_timeout: float = _setting(
        30.0,
        either("0", 0.0, seconds(1, 86400)),
        "Seconds without a sign of life after which a worker is killed and replaced, its stack in the log; `0`: never.",
        takes="reload",
    )
    max_worker_age: float = _setting(
        0.0,
        either("0", 0.0, seconds(1, 100_000_000)),
        "Seconds after which a worker is replaced, give or take a tenth; `0`: never.",
        takes="reload",
    )
    max_worker_memory: int = _setting(
        0,
        # A worker begins with about 50, and would be replaced for ever.
        either("0", 0, whole_number(64, 1024 * 1024)),
        "MiB of resident memory, 64 or more, above which a worker is replaced; `0`: no limit.",
        takes="reload",
    )
    protocol: str = _setting(
        "echo",
        NON_EMPTY,
        "What is served: `echo`, another that is installed, or `package.module:name` of anybody's Factory class, "
        "function that returns a factory, or Protocol class. `help` lists what is installed.",
    )
    protocol_option: tuple[str, ...] = _setting(
        (),
        PROTOCOL_OPTION,
        "An option of the protocol, `key=value`; repeatable. They become keyword arguments. `key=@/path/to/file` and "
        "`key=$VARIABLE` take the value from a file or from the environment, where `ps` does not show it; `@@` and "
        "`$$` begin a value that begins with `@` or `$`.",
        repeatable=True,
    )
    status: str = _setting(
        "",
        TEXT,
        "Where to serve the status page, `/status.json`, `/metrics`, `/healthz` and `/readyz` over HTTP, as `--listen` "
        "has it: `tcp:9090` is on loopback unless it has an address, such as `*:9090`. Nowhere if empty.",
    )
    # A page of an attacker's, whose name resolves to our address by now, asks with that name (DNS rebinding).
    status_host: tuple[str, ...] = _setting(
        (),
        HOSTS,
        "Host names under which clients may ask `--status`, with commas between them, beside IP addresses, `localhost` "
        "and the description's `interface=`; others get 421. `*`: any. On UNIX sockets nothing is checked.",
        takes="reload",
    )
    greeting: bytes = _setting(
        b"Hello from the server!",
        ESCAPED,
        r"Of echo, as what follows: what each client is sent first; empty for nothing; `\r \n \t \0 \e \\ \xHH` are "
        "understood.",
    )
    greet: Greet = _setting("connect", one_of(Greet), "When to greet: on `connect`, or on `first-data`.")
    framing: Framing = _setting(
        "raw",
        one_of(Framing),
        "What is echoed: `raw` bytes, or each `line`, `netstring` or `int32` message.",
    )
    max_message: int = _setting(
        64 * 1024,
        whole_number(1, 2**30),
        "Longest message of a framing, in bytes; a longer one closes its connection.",
    )
    log_level: tuple[LevelRule, ...] = _setting(
        parse_levels("info"),
        LEVELS,
        "Least level of rtservice's own records: `debug`, `info`, `warn`, `error` or `critical`; one record for each "
        "connection, at its end, is an `info`. After a comma, of other namespaces: `info,rtservice.net=debug,"
        "twisted=warn`.",
        takes="reload",
    )
    access_log: str = _setting(
        "",
        TEXT,
        "File for a line about each connection, at its end, instead of a record in the log; `-`: standard output. "
        "SIGUSR1 opens it anew.",
    )
    # Each rotation renames all of them, in one event: 30 took 1.5 ms of a busy machine, 100 took 3 ms.
    log_files: int = _setting(
        30,
        whole_number(0, 100),
        "Rotated files kept of twistd's `--logfile`, of 1 MB each; the oldest one is replaced. `0`: never rotate, "
        "SIGUSR1 only reopens the file, which is what logrotate needs.",
    )


def all_settings() -> Iterator[Setting]:
    """Every setting, in the order in which users meet them."""
    for field in dataclasses.fields(Settings):
        yield Setting(name=field.name.replace("_", "-"), default=field.default, **field.metadata)


# The order in which the reference presents the settings.
TOPICS = {
    "Listening": ("port", "interface", "listen", "backlog", "proxy-from"),
    "Protocol": ("protocol", "protocol-option"),
    "The echo protocol": ("greeting", "greet", "framing", "max-message"),
    "Limits and timeouts": (
        *("max-connections", "max-connections-per-peer", "peer-prefix-v6", "at-limit"),
        *("handshake-timeout", "idle-timeout", "drain-timeout"),
    ),
    "TLS": ("watch-certificates",),
    "Workers": ("workers", "hang-timeout", "max-worker-age", "max-worker-memory"),
    "Status server": ("status", "status-host"),
    "Logging": ("log-level", "access-log", "log-files"),
}


def changes(old: Settings, new: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the settings that differ: those that a reload applies, and those that take a restart."""
    changed = [setting for setting in all_settings() if getattr(old, setting.field) != getattr(new, setting.field)]
    live = tuple(setting.name for setting in changed if setting.takes == "reload")
    return live, tuple(setting.name for setting in changed if setting.takes == "restart")
