"""Every setting once: its name, type, range, default, help, and when a change of it takes effect.

The command line is made from this schema, and so is whatever else reads or prints settings. Nothing here is read at
run time but by `tap`, which passes plain values on.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rtservice.protocols.echo import Framing, Greet

LogLevelName = Literal["debug", "info", "warn", "error", "critical"]
Takes = Literal["restart", "reload"]


class SettingError(ValueError):
    """A setting's value is not acceptable; the text names the value and what is accepted."""


@dataclass(frozen=True)
class Setting:
    """One setting: what it is called, and how its text becomes a value.

    `parse` takes the text and raises SettingError. `repeatable` settings are tuples of parsed values. `default_text`
    is the default as a user would write it. `takes` says what it takes for a change of it to have an effect.
    """

    name: str
    parse: Callable[[str], Any]
    default: Any
    default_text: str
    help: str
    short: str = ""
    repeatable: bool = False
    takes: Takes = "restart"


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`, both included."""

    def parse(text: str) -> int:
        # int() would also take "1_000", " 8 " and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise SettingError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def seconds(low: float, high: float) -> Callable[[str], float]:
    """A parser of a time in seconds from `low` to `high`, with or without decimals."""

    def parse(text: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not low <= float(text) <= high:
            raise SettingError(f"{text!r} is not a number of seconds from {low:g} to {high:g}")
        return float(text)

    return parse


def one_of(literal: Any) -> Callable[[str], str]:
    """A parser that takes the words of a Literal type."""
    words = get_args(literal)

    def parse(text: str) -> str:
        if text not in words:
            raise SettingError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return parse


def text(value: str) -> str:
    if "\0" in value:
        raise SettingError(f"{value!r} holds a NUL byte")
    return value


def non_empty(value: str) -> str:
    if not value:
        raise SettingError("the value is empty")
    return text(value)


_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.|$)", re.DOTALL)
_ESCAPED = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"e": b"\x1b", b"\\": b"\\"}


def escaped_bytes(value: str) -> bytes:
    r"""UTF-8, with the escapes ``\r \n \t \0 \e \\ \xHH``."""

    def unescape(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if code[:1] == b"x" and len(code) == 3:
            return bytes.fromhex(code[1:].decode())
        if code not in _ESCAPED:
            raise SettingError(rf"{value!r} has an unknown escape; known are \r \n \t \0 \e \\ \xHH")
        return _ESCAPED[code]

    # fsencode gives back the very bytes that were typed, also when they are not UTF-8.
    return _ESCAPE.sub(unescape, os.fsencode(value))


def _setting(
    default: Any,
    parse: Callable[[str], Any],
    help: str,
    *,
    default_text: str | None = None,
    short: str = "",
    repeatable: bool = False,
    takes: Takes = "restart",
) -> Any:
    shown = str(default) if default_text is None else default_text
    metadata = {
        "parse": parse,
        "default_text": shown,
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
        8080, whole_number(0, 65535), "TCP port to listen on, IPv4 and IPv6; 0 lets the system pick one.", short="p"
    )
    interface: str = _setting(
        "",
        text,
        "Address or host name to listen on; an IPv6 address needs no brackets.",
        default_text="all",
        short="i",
    )
    listen: tuple[str, ...] = _setting(
        (),
        non_empty,
        "Listen on this endpoint description instead of --port; repeatable. tcp:8080, tcp6:8080:interface=::1, "
        "ssl:8443:privateKey=key.pem:certKey=cert.pem, unix:/run/rt.sock:mode=660, systemd:name=web, or any other "
        "that Twisted knows.",
        default_text="",
        short="l",
        repeatable=True,
    )
    # Twisted's 50 makes a burst's losers wait a second for their SYN to be sent again; 1024 is beyond what connects
    # while one batch of events is handled. Linux caps it at 4096 unless told otherwise (net.core.somaxconn).
    backlog: int = _setting(
        1024,
        whole_number(1, 65535),
        "Connections that the kernel queues for each listener until they are accepted; the kernel caps it at "
        "net.core.somaxconn.",
    )
    greeting: bytes = _setting(
        b"Hello from the server!",
        escaped_bytes,
        r"What each client is sent first; empty for nothing. Escapes: \r \n \t \0 \e \\ \xHH.",
        default_text="Hello from the server!",
    )
    greet: Greet = _setting(
        "connect", one_of(Greet), "When to greet: on connect, or on first-data (receive, then greet)."
    )
    framing: Framing = _setting(
        "raw", one_of(Framing), "What a message is: raw (bytes, no messages), line, netstring or int32."
    )
    max_message: int = _setting(
        64 * 1024,
        whole_number(1, 2**30),
        "Longest message of a framing other than raw, in bytes; a longer one closes its connection.",
    )
    # Ten times what a client needs on a line that is slow and loses packets.
    handshake_timeout: float = _setting(
        10.0,
        seconds(0.1, 3600),
        "Seconds that a client may take for its TLS handshake; then it is closed.",
        default_text="10",
        takes="reload",
    )
    log_level: LogLevelName = _setting(
        "info",
        one_of(LogLevelName),
        "Least level of rtservice's own log records: debug, info, warn, error or critical. One record for each "
        "connection, at its end, is an info.",
        takes="reload",
    )


def schema() -> Iterator[Setting]:
    """Every setting, in the order in which users meet them."""
    for field in dataclasses.fields(Settings):
        yield Setting(name=field.name.replace("_", "-"), default=field.default, **field.metadata)


def from_values(values: dict[str, Any]) -> Settings:
    """The settings with these parsed values, by name as users write it; what is missing has its default."""
    return Settings(**{name.replace("-", "_"): value for name, value in values.items()})
