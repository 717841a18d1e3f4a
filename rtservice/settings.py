"""Every setting once: its name, type, range, default, help, and when a change of it takes effect.

The command line is made from this schema, and so is whatever else reads or prints settings. Nothing here is read at
run time but by `tap`, which passes plain values on.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from rtservice.protocols.echo import Framing, Greet

LogLevelName = Literal["debug", "info", "warn", "error", "critical"]
AtLimit = Literal["pause", "reject"]
Takes = Literal["restart", "reload"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class SettingError(ValueError):
    """A setting's value is not acceptable; the text names the value and what is accepted."""


@dataclass(frozen=True)
class Kind:
    """What a setting's value can be, in words, and how its text becomes a value; `parse` raises SettingError.

    `toml` has the types that a TOML file may give it beside a string.
    """

    accepts: str
    parse: Callable[[str], Any]
    toml: tuple[type, ...] = ()


@dataclass(frozen=True)
class Setting:
    """One setting: what it is called, and how its text becomes a value.

    `repeatable` settings are tuples of parsed values. `default_text` is the default as a user would write it. `help`
    has what a user may type in backticks. `takes` says what it takes for a change of it to have an effect.
    """

    name: str
    kind: Kind
    default: Any
    default_text: str
    help: str
    short: str = ""
    repeatable: bool = False
    takes: Takes = "restart"


# --- kinds ---


def whole_number(low: int, high: int) -> Kind:
    """Whole numbers from `low` to `high`, both included."""
    accepts = f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        # int() would also take "1_000", " 8 " and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise SettingError(f"{text!r} is not {accepts}")
        return int(text)

    return Kind(accepts, parse, (int,))


def seconds(low: float, high: float) -> Kind:
    """A time in seconds from `low` to `high`, with or without decimals."""
    accepts = f"a number of seconds from {as_text(low)} to {as_text(high)}"

    def parse(text: str) -> float:
        # As many decimals as a float of TOML has.
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,30})?", text) or not low <= float(text) <= high:
            raise SettingError(f"{text!r} is not {accepts}")
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
            raise SettingError(f"{text!r} is not {accepts}") from None

    return Kind(accepts, parse, kind.toml)


def one_of(literal: Any) -> Kind:
    """The words of a Literal type."""
    words = get_args(literal)
    accepts = f"one of {', '.join(words)}"

    def parse(text: str) -> str:
        if text not in words:
            raise SettingError(f"{text!r} is not {accepts}")
        return text

    return Kind(accepts, parse)


def _parse_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise SettingError(f"{text!r} is not true or false")
    return text == "true"


def _parse_networks(value: str) -> tuple[Network, ...]:
    networks = []
    for part in value.split(","):
        part = part.strip()
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


def _parse_text(value: str) -> str:
    if "\0" in value:
        raise SettingError(f"{value!r} holds a NUL byte")
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
            raise SettingError(rf"{value!r} has an unknown escape; known are \r \n \t \0 \e \\ \xHH")
        return _ESCAPED[code]

    # What was typed and is not UTF-8 came as surrogates, and goes back to the very bytes.
    return _ESCAPE.sub(unescape, value.encode("utf-8", "surrogateescape"))


FLAG = Kind("true or false", _parse_flag, (bool,))
TEXT = Kind("a string", _parse_text)
NON_EMPTY = Kind("a string", _parse_non_empty)
ESCAPED = Kind("a string", _parse_escaped)
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


def _setting(
    default: Any,
    kind: Kind,
    help: str,
    *,
    default_text: str | None = None,
    short: str = "",
    repeatable: bool = False,
    takes: Takes = "restart",
) -> Any:
    metadata = {
        "kind": kind,
        "default_text": as_text(default) if default_text is None else default_text,
        "help": help,
        "short": short,
        "repeatable": repeatable,
        "takes": takes,
    }
    return dataclasses.field(default=default, metadata=metadata)


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
        "Address or host name that `--port` listens on; an IPv6 address needs no brackets.",
        default_text="all",
        short="i",
    )
    listen: tuple[str, ...] = _setting(
        (),
        NON_EMPTY,
        "A description in Twisted's endpoint syntax, instead of `--port`; repeatable: `tcp:8080`, "
        "`tcp6:8080:interface=::1`, `ssl:8443:privateKey=key.pem:certKey=cert.pem`, `ssl:8443:certificates=/dir`, "
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
        "Open connections of the whole service at once. `auto`: what the descriptor limit, raised to its hard limit "
        "at the start, allows less a reserve.",
        takes="reload",
    )
    max_connections_per_peer: int = _setting(
        0,
        whole_number(0, 1_000_000),
        "Open connections of one address at once; `0`: no limit. An IPv4-mapped IPv6 address counts as the IPv4 one.",
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
    greeting: bytes = _setting(
        b"Hello from the server!",
        ESCAPED,
        r"What each client is sent first; empty for nothing; `\r \n \t \0 \e \\ \xHH` are understood.",
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
    log_level: LogLevelName = _setting(
        "info",
        one_of(LogLevelName),
        "Least level of rtservice's own records: `debug`, `info`, `warn`, `error` or `critical`; one record for each "
        "connection, at its end, is an `info`.",
        takes="reload",
    )


def schema() -> Iterator[Setting]:
    """Every setting, in the order in which users meet them."""
    for field in dataclasses.fields(Settings):
        yield Setting(name=field.name.replace("_", "-"), default=field.default, **field.metadata)


def from_values(values: dict[str, Any]) -> Settings:
    """The settings with these parsed values, by name as users write it; what is missing has its default."""
    return Settings(**{name.replace("-", "_"): value for name, value in values.items()})
