"""Every setting once: its name, type, range, default, help, and when a change of it takes effect.

The command line, the environment's variables, the TOML file and the reference are made from this schema. Nothing
here is read at run time but by `tap`, `worker` and `hosting`, which pass plain values on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from rtservice.hidden import HIDDEN, hide_in_description
from rtservice.protocols.echo import Framing, Greet
from rtservice.references import is_reference
from rtservice.suggestions import did_you_mean, nearest
from rtservice.utf8 import NotUTF8Error, decode_utf8

LogLevelName = Literal["debug", "info", "warn", "error", "critical"]
AtLimit = Literal["pause", "reject"]
Takes = Literal["restart", "reload"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class SettingError(ValueError):
    """A setting's value is not acceptable; the text names the value and what is accepted.

    A value that may be a secret is not in it.
    """


class BadValueError(SettingError):
    """A text is not a value of its kind. `problem` is the reason without the text, for one that may be a secret."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(f"{text!r} {problem}")
        self.problem = problem


@dataclass(frozen=True)
class Kind:
    """What a setting's value can be, in words, and how its text becomes a value; `parse` raises SettingError.

    `toml` has the types that a TOML file may give it beside a string. `show` gives a text as it may be shown, for one
    that can hold a secret.
    """

    accepts: str
    parse: Callable[[str], Any]
    toml: tuple[type, ...] = ()
    show: Callable[[str], str] | None = None


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


# --- kinds ---


def whole_number(low: int, high: int) -> Kind:
    """Whole numbers from `low` to `high`, both included."""
    accepts = f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        # int() would also take "1_000", " 8 " and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise BadValueError(text, f"is not {accepts}")
        return int(text)

    return Kind(accepts, parse, (int,))


def seconds(low: float, high: float) -> Kind:
    """A time in seconds from `low` to `high`, with or without decimals."""
    accepts = f"a number of seconds from {as_text(low)} to {as_text(high)}"

    def parse(text: str) -> float:
        # As many decimals as a float of TOML has.
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,30})?", text) or not low <= float(text) <= high:
            raise BadValueError(text, f"is not {accepts}")
        return float(text)

    return Kind(accepts, parse, (int, float))


def either(word: str, value: Any, kind: Kind) -> Kind:
    """The values of `kind`, and a word that stands for one more."""
    accepts = f"{word} or {kind.accepts}"

    def parse(text: str) -> Any:
        if text == word:
            return value
        try:
            return kind.parse(text)
        except SettingError:
            raise BadValueError(text, f"is not {accepts}") from None

    return Kind(accepts, parse, kind.toml)


def one_of(literal: Any) -> Kind:
    """The words of a Literal type."""
    words = get_args(literal)
    accepts = f"one of {', '.join(words)}"

    def parse(text: str) -> str:
        if text not in words:
            raise BadValueError(text, f"is not {accepts}")
        return text

    return Kind(accepts, parse)


def _parse_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise BadValueError(text, "is not true or false")
    return text == "true"


def _parse_networks(value: str) -> tuple[Network, ...]:
    networks = []
    for part in value.split(","):
        part = part.strip()
        bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\](/[0-9]+)?", part)
        if bracketed:
            part = bracketed[1] + (bracketed[2] or "")
        try:
            network = ipaddress.ip_network(part, strict=False)
            # An address may carry a scope, a network of peers may not: `fe80::1%eth0`.
            if "%" in part:
                raise ValueError
        except ValueError:
            raise SettingError(f"{part!r} is not a network such as 10.0.0.0/8 or 2001:db8::/32") from None
        if network.network_address != ipaddress.ip_address(part.partition("/")[0]):
            raise SettingError(f"{part!r} has bits beyond its prefix: the network is {network}")
        networks.append(network)
    return tuple(networks)


@dataclass(frozen=True)
class LevelRule:
    """The least level of the records of a namespace and what is below it."""

    namespace: str
    level: LogLevelName

    def __str__(self) -> str:
        return self.level if self.namespace == _OURS else f"{self.namespace}={self.level}"


_OURS = "rtservice"


def _parse_levels(value: str) -> tuple[LevelRule, ...]:
    levels: dict[str, LevelRule] = {_OURS: LevelRule(_OURS, "info")}
    given = set()
    for part in value.split(","):
        name, equals, word = part.strip().rpartition("=")
        namespace = name if equals else _OURS
        if word not in get_args(LogLevelName):
            raise SettingError(f"{word!r} is not one of {', '.join(get_args(LogLevelName))}")
        if not re.fullmatch(r"\w+(\.\w+)*", namespace):
            raise SettingError(f"{namespace!r} is not a namespace such as twisted.web")
        if namespace in given:
            raise SettingError(f"{value!r} has two levels for {namespace}")
        given.add(namespace)
        levels[namespace] = LevelRule(namespace, word)  # type: ignore[arg-type]  # one of the words
    return tuple(levels.values())


def _parse_text(value: str) -> str:
    if "\0" in value:
        raise BadValueError(value, "holds a NUL byte")
    return value


def _parse_non_empty(value: str) -> str:
    if not value:
        raise SettingError("the value is empty")
    return _parse_text(value)


_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.|$)", re.DOTALL)
_ESCAPED = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"e": b"\x1b", b"\\": b"\\"}


def _parse_escaped(value: str) -> bytes:
    r"""UTF-8, with the escapes ``\r \n \t \0 \e \\ \xHH``."""

    def unescape(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if code[:1] == b"x" and len(code) == 3:
            return bytes.fromhex(code[1:].decode())
        if code not in _ESCAPED:
            raise BadValueError(value, r"has an unknown escape; known are \r \n \t \0 \e \\ \xHH")
        return _ESCAPED[code]

    # What was typed and is not UTF-8 came as surrogates, and goes back to the very bytes.
    return _ESCAPE.sub(unescape, value.encode("utf-8", "surrogateescape"))


_OPTION_NAME = re.compile(r"[A-Za-z_][\w-]*")


def _parse_protocol_option(value: str) -> str:
    # Nothing of it is in these errors: it may be the second half of a value with a blank.
    if not _OPTION_NAME.fullmatch(value.partition("=")[0]) or "=" not in value:
        raise SettingError("not an option's name, = and its value; the text is not shown")
    name, _, text = value.partition("=")
    if text == HIDDEN:
        raise SettingError(
            f"{name}={HIDDEN}: {_WAS_HIDDEN}, as {name}=@/path/to/file or {name}=$VARIABLE if it is secret"
        )
    if "\0" in text:
        raise SettingError(f"the value of {name} holds a NUL byte")
    return value


def _show_protocol_option(option: str) -> str:
    name, _, text = option.partition("=")
    return option if is_reference(text) else f"{name}={HIDDEN}"


def _parse_description(value: str) -> str:
    if f"={HIDDEN}" in value:
        raise SettingError(f"{value!r}: {_WAS_HIDDEN}")
    return _parse_non_empty(value)


_WAS_HIDDEN = f"{HIDDEN} is what --print-config shows in the place of a value; give the value"


_HOST_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # RFC 1123, section 2.1, and the underscore of Docker
_HOST = re.compile(rf"(?=.{{1,253}}\Z){_HOST_LABEL}(\.{_HOST_LABEL})*")


def _parse_hosts(value: str) -> tuple[str, ...]:
    hosts = []
    for part in value.split(",") if value else ():
        name = part.strip().removesuffix(".").lower()
        bare = name[1:-1] if name.startswith("[") and name.endswith("]") else name
        if _is_ipv6(bare):
            name = bare
        elif name != "*" and not _HOST.fullmatch(name):
            raise SettingError(f"{part.strip()!r} is not a host name such as status.example.com, or *")
        hosts.append(name)
    return tuple(hosts)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


FLAG = Kind("true or false", _parse_flag, (bool,))
TEXT = Kind("a string", _parse_text)
NON_EMPTY = Kind("a string", _parse_non_empty)
ESCAPED = Kind("a string", _parse_escaped)
LEVELS = Kind("a string of levels, such as info,twisted=warn", _parse_levels)
PROTOCOL_OPTION = Kind("a string such as max-message=5", _parse_protocol_option)
HOSTS = Kind("a string of host names, such as status.example.com,web-1, or *", _parse_hosts)
PROTOCOL_OPTION = Kind("a string such as max-message=5", _parse_protocol_option, show=_show_protocol_option)
DESCRIPTION = Kind("a string", _parse_description, show=hide_in_description)
NETWORKS = Kind("a string of networks, such as 10.0.0.0/8,2001:db8::/32", _parse_networks)


def as_text(value: Any) -> str:
    """A parsed value as a user would write it; the inverse of each kind's `parse`."""
    match value:
        case None:
            return "auto"
        case bool():
            return str(value).lower()
        case float():
            # Without an exponent, which the command line does not take.
            return format(Decimal(repr(value)), "f").removesuffix(".0")
        case bytes():
            return "".join(map(_escape, value.decode("utf-8", "surrogateescape")))
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


def _escape(character: str) -> str:
    if character.isprintable() and character != "\\":
        return character
    encoded = character.encode("utf-8", "surrogateescape")
    return "".join(_SHORT.get(byte, f"\\x{byte:02x}") for byte in encoded)


_SHORT = {code[0]: f"\\{letter.decode()}" for letter, code in _ESCAPED.items()}


# --- the schema ---

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
        _parse_networks("127.0.0.0/8,::1/128"),
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
        _parse_levels("info"),
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


def schema() -> Iterator[Setting]:
    """Every setting, in the order in which users meet them."""
    for field in dataclasses.fields(Settings):
        yield Setting(name=field.name.replace("_", "-"), default=field.default, **field.metadata)


def shown(setting: Setting, in_force: Settings) -> str:
    """The value of a setting as everybody may see it who can see the service: of options that may be secret, the names.

    It is for people, and not to be read back.
    """
    value = getattr(in_force, setting.field)
    if setting.kind is PROTOCOL_OPTION and in_force.protocol not in SHIPPED:
        return printable(", ".join(dict.fromkeys(option.partition("=")[0] for option in value)))
    if setting.kind.show is not None and setting.kind is not PROTOCOL_OPTION:
        value = tuple(map(setting.kind.show, value))
    return printable(as_text(value))


# --- from the command line, the environment and a file ---


@dataclass(frozen=True)
class LoadedSettings:
    """The settings in force, and by name where each came from.

    That is `command line`, `environment`, the file's name, or `default`.
    """

    settings: Settings
    sources: Mapping[str, str]

    def where(self, name: str) -> str:
        """What a user would change a setting at, as errors begin: `--port`, `RTSERVICE_PORT`, `/etc/rt.toml: port`."""
        source = self.sources[name]
        if source in ("command line", "default"):
            return _option(name)
        return variable(name) if source == "environment" else f"{source}: {name}"


_PREFIX = "RTSERVICE_"

# What Kubernetes puts into every container for a Service called rtservice, or rtservice-something, and Docker for a
# link: addresses, one as RTSERVICE_PORT=tcp://10.0.0.1:8080. Nobody has set that, and no setting looks like it.
_INJECTED = re.compile(
    r"(\w+_)?(SERVICE_(HOST|PORT(_\w+)?)=.*|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?=.*|PORT=(tcp|udp|sctp)://.*)",
    re.ASCII | re.DOTALL,
)


def variable(name: str) -> str:
    """The environment's variable of a setting."""
    return _PREFIX + name.upper().replace("-", "_")


CONFIG_VARIABLE = variable("config")


def _option(name: str) -> str:
    return f"--{name}"


def load(command_line: Mapping[str, Any], environment: Mapping[str, str], config: str | None) -> LoadedSettings:
    """The settings: the command line's over the environment's over those of the TOML file `config` over the defaults.

    The command line maps settings' names to texts, and of repeatable settings to sequences of them. Of the environment
    the `RTSERVICE_` variables count, but for what Kubernetes makes of a Service of that name; a repeatable setting's
    holds texts with white space between them, or a JSON array of strings. The file's keys are the settings' names.

    `listen` and `port` with `interface` both say where to listen: one layer gives one of them, and the highest layer
    that gives any is followed. The options of a protocol are those of all layers, each the highest one's. A table
    `[protocol]` in the file has them, and the protocol's `name`.

    Raises SettingError, whose text begins with where the mistake is.
    """
    repeatable = {variable(setting.name) for setting in schema() if setting.repeatable}
    variables = {
        name: _texts(name, value) if name in repeatable else value
        for name, value in environment.items()
        if name.startswith(_PREFIX)
        and name != CONFIG_VARIABLE
        and not _INJECTED.fullmatch(f"{name.removeprefix(_PREFIX)}={value}")
    }
    options = {_option(name): text for name, text in command_line.items()}
    layers = [
        ("environment", _parsed(variables, variable)),
        ("command line", _parsed(options, _option)),
    ]
    if config is not None:
        file = printable(config)
        layers.insert(0, (file, _parsed(_without_table(_read(config), file), str, prefix=f"{file}: ")))
    values: dict[str, Any] = {}
    sources = {setting.name: "default" for setting in schema()}
    for source, given in layers:
        if given.get("listen"):
            beaten = ["port", "interface"]
        elif "port" in given or "interface" in given:
            beaten = ["listen"]
        else:
            beaten = []
        for name in beaten:
            values.pop(name, None)
            sources[name] = "default"
        if "protocol-option" in given:
            given["protocol-option"] = _joined(values.get("protocol-option", ()), given["protocol-option"])
        values |= given
        sources |= dict.fromkeys(given, source)
    return LoadedSettings(Settings(**{name.replace("-", "_"): value for name, value in values.items()}), sources)


# What a JSON array of strings cannot begin with.
_BRACKETED_ADDRESS = re.compile(r"\s*\[[0-9A-Fa-f]*\\?:")


def _texts(name: str, value: str) -> list[str]:
    """The texts of a variable that holds several: a JSON array of strings, or texts with white space between them.

    JSON, and not the quotes of a shell: these are in use, and so are backslashes, and nothing that begins with [ was
    right before, but for an IPv6 address in brackets.
    """
    if not value.lstrip().startswith("[") or _BRACKETED_ADDRESS.match(value):
        return value.split()
    try:
        texts = json.loads(value)
    except (ValueError, RecursionError):  # whose text may have some of the value
        texts = None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SettingError(f"{name}: begins with [ and is not a JSON array of strings; the text is not shown")
    return texts


def _joined(lower: tuple[str, ...], higher: tuple[str, ...]) -> tuple[str, ...]:
    """Options of a protocol from two layers."""
    names = {_option_name(option) for option in higher}
    return *(option for option in lower if _option_name(option) not in names), *higher


def _option_name(option: str) -> str:
    return option.partition("=")[0].replace("_", "-")


def _without_table(given: dict[str, Any], file: str) -> dict[str, Any]:
    """A file's settings with what a table `[protocol]` says as `protocol` and `protocol-option`."""
    table = given.get("protocol")
    if not isinstance(table, dict):
        return given
    if "protocol-option" in given:
        raise SettingError(f"{file}: protocol-option: [protocol] has the options already; give one of them")
    settings = {key: value for key, value in given.items() if key != "protocol"}
    if "name" in table:
        settings["protocol"] = table["name"]
    options = []
    for key, value in table.items():
        if not _OPTION_NAME.fullmatch(key):
            raise SettingError(f"{file}: protocol: {key!r} is not an option's name")
        for one in value if isinstance(value, list) else [value]:
            if type(one) not in (str, bool, int, float):
                raise SettingError(f"{file}: protocol: {printable(key)}: {_type(one)} is not a string or a number")
            options += [f"{key}={as_text(one)}"] if key != "name" else []
        if value == []:  # which the command line could not say either
            raise SettingError(f"{file}: protocol: {printable(key)}: an array without anything in it")
    return {**settings, "protocol-option": options} if options else settings


def _read(config: str) -> dict[str, Any]:
    import tomllib  # no worker reads a file

    try:
        # A pipe would give nothing to a reload, and so the defaults to everything, or keep the whole service waiting.
        with open(config, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return tomllib.loads(decode_utf8(file.read()))
            problem = "is not a regular file, which a reload could read again"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except NotUTF8Error as error:
        problem = str(error)
    # tomllib's own error is a ValueError; int() has another for thousands of digits, and arrays may nest too deeply.
    except (ValueError, RecursionError) as error:
        problem = f"is not TOML: {error}"
    raise SettingError(f"{printable(config)}: {problem}")


def _parsed(given: Mapping[str, Any], key_of: Callable[[str], str], *, prefix: str = "") -> dict[str, Any]:
    """The values of one layer by settings' names; errors begin with `prefix` and the key."""
    settings = {key_of(setting.name): setting for setting in schema()}
    values = {}
    for key, value in given.items():
        where = prefix + printable(key)
        if key not in settings:
            # Without what all keys of a layer share, which would make them all alike.
            meant = nearest(key.removeprefix(_PREFIX), [setting.name for setting in schema()])
            raise SettingError(f"{where}: no such setting{did_you_mean(meant and key_of(meant))}")
        try:
            values[settings[key].name] = _value(settings[key], value)
        except ValueError as error:  # also Python's own, of an integer that is too long to be shown
            raise SettingError(f"{where}: {error}") from None
    if values.get("listen"):
        for name in ("port", "interface"):
            if name in values:
                raise SettingError(
                    f"{prefix}{key_of(name)}: {key_of('listen')} says already where to listen; give one of them"
                )
    return values


def _value(setting: Setting, given: Any) -> Any:
    if not setting.repeatable:
        return _one_value(setting.kind, given)
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list | tuple):
        raise SettingError(f"{_shown(setting.kind, given)} is not {setting.kind.accepts} or an array of such")
    values = []
    for number, one in enumerate(given, 1):
        try:
            values.append(_one_value(setting.kind, one))
        except SettingError as error:
            if setting.kind.show is None or len(given) == 1:
                raise
            raise SettingError(f"number {number} of {len(given)}: {error}") from None
    return tuple(values)


def _one_value(kind: Kind, given: Any) -> Any:
    if isinstance(given, str):
        return kind.parse(given)
    if type(given) not in kind.toml:
        raise SettingError(f"{_shown(kind, given)} is not {kind.accepts}")
    return kind.parse(as_text(given))


def _shown(kind: Kind, given: Any) -> str:
    """A value of another type as TOML has it, near enough; only its type where that may be a secret."""
    if kind.show is not None or isinstance(given, list | dict):
        return _type(given)
    return str(given).lower() if isinstance(given, bool) else str(given)


def _type(given: Any) -> str:
    match given:
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:
            return "a date or time"


def printable(text: str) -> str:
    """The text, quoted if it would not be one line or cannot be shown."""
    return text if text.isprintable() else repr(text)


# --- to a file, the reference, and what a reload has to do ---


def as_toml(loaded: LoadedSettings) -> str:
    """A TOML file of these settings, each with where it came from; `load` reads the same settings from it.

    Values that may be secret are marked, and `load` does not take the mark: what is printed on a terminal ends in logs,
    tickets and mail. Raises SettingError when a text is not UTF-8, which TOML is.
    """
    lines = []
    open_options = loaded.settings.protocol in SHIPPED
    for setting in schema():
        # One file cannot have both.
        if setting.name in ("port", "interface") and loaded.settings.listen:
            continue
        value = getattr(loaded.settings, setting.field)
        comment = loaded.sources[setting.name]
        show = setting.kind.show
        if show is not None and not (setting.kind is PROTOCOL_OPTION and open_options):
            given, value = value, tuple(map(show, value))
            if value != given:
                comment += f"; {HIDDEN}: may be a secret"
        if setting.repeatable:
            written = f"[{', '.join(map(_toml_string, value))}]"
        elif type(value) in setting.kind.toml:
            written = as_text(value)
        else:
            written = _toml_string(as_text(value))
        lines.append(f"{setting.name} = {written}  # {comment}\n")
    return "".join(lines)


def _toml_string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SettingError(f"{text!r} cannot be printed as TOML: it is not UTF-8") from None
    if "\\" in text and "'" not in text and text.isprintable():
        return f"'{text}'"
    characters = (
        f"\\{char}" if char in '"\\' else char if char.isprintable() else f"\\U{ord(char):08x}" for char in text
    )
    return f'"{"".join(characters)}"'


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


def reference() -> str:
    """Return the reference of all settings as MyST Markdown: a section for each topic, a directive for each setting.

    Raises KeyError when a setting is in no topic, or a topic has a name that is no setting.
    """
    settings = {setting.name: setting for setting in schema()}
    lines = []
    for topic, names in TOPICS.items():
        lines.append(f"## {topic}\n")
        lines += [_described(settings.pop(name)) for name in names]
    if settings:
        raise KeyError(f"in no topic: {', '.join(settings)}")
    return "\n".join(lines)


def _described(setting: Setting) -> str:
    option = f"`--{setting.name}`" + (f", `-{setting.short}`" if setting.short else "")
    default = as_text(setting.default)
    accepts = f"{setting.kind.accepts}; may be given several times" if setting.repeatable else setting.kind.accepts
    return "\n".join(
        (
            f"```{{confval}} {setting.name}",
            f":type: {accepts}",
            *([f":default: `{default}`"] if default else []),
            "",
            setting.help,
            "",
            f"Command line {option}; environment `{variable(setting.name)}`; file `{setting.name}`. "
            f"A change takes effect after a {setting.takes}.",
            "```",
            "",
        )
    )


def changes(old: Settings, new: Settings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the settings that differ: those that a reload applies, and those that take a restart."""
    changed = [setting for setting in schema() if getattr(old, setting.field) != getattr(new, setting.field)]
    live = tuple(setting.name for setting in changed if setting.takes == "reload")
    return live, tuple(setting.name for setting in changed if setting.takes == "restart")
