"""Value types: parse the text of a setting to a value, and format a value as text."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, get_args

from rtservice.hidden import HIDDEN, hide_in_description
from rtservice.hub.redis_url import BadHubURL, parse_hub_url
from rtservice.references import is_reference

LogLevelName = Literal["debug", "info", "warn", "error", "critical"]
AtLimit = Literal["pause", "reject"]
AppliedBy = Literal["restart", "reload"]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class SettingError(ValueError):
    """The value of a setting is not accepted. The text names the value, if it is no secret, and what is accepted."""


class BadValueError(SettingError):
    """A text is not a value of its kind. `problem` is the reason without the text, which may be a secret."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(f"{text!r} {problem}")
        self.problem = problem


@dataclass(frozen=True)
class Kind:
    """A type of values.

    `accepts` describes the accepted texts, for errors and the reference. `parse` returns the value of a text and raises
    SettingError. `toml` are the types that a TOML file may use instead of a string. `show` is given if a text can hold
    a secret, and returns the text without it. `metavar` stands for the value in `--help`.
    """

    accepts: str
    parse: Callable[[str], Any]
    toml: tuple[type, ...] = ()
    show: Callable[[str], str] | None = None
    metavar: str = "TEXT"


def whole_number(low: int, high: int) -> Kind:
    """Return the kind of whole numbers from `low` to `high`, both included."""
    accepts = f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        # int() also accepts "1_000", " 8 " and digits of other scripts.
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise BadValueError(text, f"is not {accepts}")
        return int(text)

    return Kind(accepts, parse, (int,), metavar="N")


def seconds(low: float, high: float) -> Kind:
    """Return the kind of times from `low` to `high` seconds, with or without decimals."""
    accepts = f"a number of seconds from {as_text(low)} to {as_text(high)}"

    def parse(text: str) -> float:
        # No more decimals than the text of a float has.
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,30})?", text) or not low <= float(text) <= high:
            raise BadValueError(text, f"is not {accepts}")
        return float(text)

    return Kind(accepts, parse, (int, float), metavar="SECONDS")


def either(word: str, value: Any, kind: Kind) -> Kind:
    """Return `kind` with one more text, `word`, which means `value`."""
    accepts = f"{word} or {kind.accepts}"

    def parse(text: str) -> Any:
        if text == word:
            return value
        try:
            return kind.parse(text)
        except SettingError:
            raise BadValueError(text, f"is not {accepts}") from None

    return Kind(accepts, parse, kind.toml, metavar=kind.metavar)


def one_of(literal: Any) -> Kind:
    """Return the kind of the values of a Literal type, each written as `as_text` does."""
    return word_for({as_text(value): value for value in get_args(literal)})


def word_for(values: Mapping[str, Any]) -> Kind:
    """Return the kind of these words, each of which stands for a value."""
    accepts = f"one of {', '.join(values)}"

    def parse(text: str) -> Any:
        if text not in values:
            raise BadValueError(text, f"is not {accepts}")
        return values[text]

    return Kind(accepts, parse, metavar="|".join(values))


def _parse_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise BadValueError(text, "is not true or false")
    return text == "true"


def parse_networks(value: str) -> tuple[Network, ...]:
    """Parse addresses and networks separated by commas; an IPv6 address may be in brackets. Raises SettingError."""
    networks = []
    for part in value.split(","):
        part = part.strip()
        bracketed = re.fullmatch(r"\[([0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*)\](/[0-9]+)?", part)
        if bracketed:
            part = bracketed[1] + (bracketed[2] or "")
        try:
            network = ipaddress.ip_network(part, strict=False)
            # ip_network accepts a scope, as in `fe80::1%eth0`, which no network of peers has.
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
    """The lowest level that is logged for a namespace and the namespaces below it."""

    namespace: str
    level: LogLevelName

    def __str__(self) -> str:
        return self.level if self.namespace == _OURS else f"{self.namespace}={self.level}"


_OURS = "rtservice"


def parse_levels(value: str) -> tuple[LevelRule, ...]:
    """Parse levels separated by commas, each with or without `NAMESPACE=`. Raises SettingError."""
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
        raise BadValueError(value, "contains a NUL byte")
    return value


def _parse_non_empty(value: str) -> str:
    if not value:
        raise SettingError("the value is empty")
    return _parse_text(value)


_ESCAPE = re.compile(rb"\\(x[0-9A-Fa-f]{2}|.|$)", re.DOTALL)
_ESCAPED = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"e": b"\x1b", b"\\": b"\\"}


def _parse_escaped(value: str) -> bytes:
    r"""Return the bytes of a text in UTF-8, with the escapes `\r \n \t \0 \e \\ \xHH`. Raises BadValueError."""

    def unescape(match: re.Match[bytes]) -> bytes:
        code = match[1]
        if code[:1] == b"x" and len(code) == 3:
            return bytes.fromhex(code[1:].decode())
        if code not in _ESCAPED:
            raise BadValueError(value, r"has an unknown escape; accepted are \r \n \t \0 \e \\ \xHH")
        return _ESCAPED[code]

    # Python decodes bytes of the command line that are not UTF-8 to surrogates.
    return _ESCAPE.sub(unescape, value.encode("utf-8", "surrogateescape"))


OPTION_NAME = re.compile(r"[A-Za-z_][\w-]*")


def _parse_protocol_option(value: str) -> str:
    # The error does not show the text: it may be the second half of a secret with a blank.
    if not OPTION_NAME.fullmatch(value.partition("=")[0]) or "=" not in value:
        raise SettingError("not of the form key=value; the text is not shown")
    name, _, text = value.partition("=")
    if text == HIDDEN:
        raise SettingError(f"{name}={HIDDEN}: {_WAS_HIDDEN}, or {name}=@/path/to/file or {name}=$VARIABLE for a secret")
    if "\0" in text:
        raise SettingError(f"the value of {name} contains a NUL byte")
    return value


def _show_protocol_option(option: str) -> str:
    name, _, text = option.partition("=")
    return option if is_reference(text) else f"{name}={HIDDEN}"


def _parse_description(value: str) -> str:
    if f"={HIDDEN}" in value:
        raise SettingError(f"{value!r}: {_WAS_HIDDEN}")
    return _parse_non_empty(value)


def _parse_hub_url(value: str) -> str:
    # No error shows the text.
    if HIDDEN in value:
        raise SettingError(_WAS_HIDDEN)
    if value:
        try:
            parse_hub_url(value)
        except BadHubURL as error:
            raise SettingError(str(error)) from None
    return value


def _show_hub_url(value: str) -> str:
    # Some options of the URL are passwords.
    return parse_hub_url(value).shown + (f"?{HIDDEN}" if "?" in value else "") if value else ""


_WAS_HIDDEN = f"{HIDDEN} is the placeholder of --print-config; give the value itself"
# RFC 1123, section 2.1. Docker also uses the underscore.
_HOST_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
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


FLAG = Kind("true or false", _parse_flag, (bool,), metavar="")
TEXT = Kind("a string", _parse_text)
NON_EMPTY = Kind("a string", _parse_non_empty)
ESCAPED = Kind("a string", _parse_escaped)
LEVELS = Kind("a string of levels, such as info,twisted=warn", parse_levels, metavar="LEVELS")
HOSTS = Kind("a string of host names, such as status.example.com,web-1, or *", _parse_hosts, metavar="HOSTS")
PROTOCOL_OPTION = Kind(
    "a string such as max-message=5", _parse_protocol_option, show=_show_protocol_option, metavar="KEY=VALUE"
)
DESCRIPTION = Kind("a string", _parse_description, show=hide_in_description, metavar="LISTENER")
HUB_URL = Kind("a URL such as redis://localhost:6379/0", _parse_hub_url, show=_show_hub_url, metavar="URL")
NETWORKS = Kind("a string of networks, such as 10.0.0.0/8,2001:db8::/32", parse_networks, metavar="NETWORKS")


def as_text(value: Any) -> str:
    """Return a parsed value as a user writes it: the inverse of each kind's `parse`."""
    match value:
        case None:
            return "auto"
        case bool():
            return str(value).lower()
        case float():
            # Without an exponent, which `seconds` does not accept.
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
