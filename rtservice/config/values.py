"""Value types: how the text of a setting becomes a value, and a value a text."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from rtservice.hidden import HIDDEN, hide_in_description
from rtservice.references import is_reference

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


def parse_networks(value: str) -> tuple[Network, ...]:
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


def parse_levels(value: str) -> tuple[LevelRule, ...]:
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


OPTION_NAME = re.compile(r"[A-Za-z_][\w-]*")


def _parse_protocol_option(value: str) -> str:
    # Nothing of it is in these errors: it may be the second half of a value with a blank.
    if not OPTION_NAME.fullmatch(value.partition("=")[0]) or "=" not in value:
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
LEVELS = Kind("a string of levels, such as info,twisted=warn", parse_levels)
HOSTS = Kind("a string of host names, such as status.example.com,web-1, or *", _parse_hosts)
PROTOCOL_OPTION = Kind("a string such as max-message=5", _parse_protocol_option, show=_show_protocol_option)
DESCRIPTION = Kind("a string", _parse_description, show=hide_in_description)
NETWORKS = Kind("a string of networks, such as 10.0.0.0/8,2001:db8::/32", parse_networks)


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
