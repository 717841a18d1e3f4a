r"""The grammar of `--listen` and `--status`: texts in, types and arguments out. Nothing is looked up or opened here.

The syntax is that of Twisted's endpoints: `type:argument:key=value`, in which a backslash takes the next character as
it is. Whatever Twisted reads of it is read the same here. Beside that, where `tcp`, `tcp6` and `ssl` take an address:

- `HOST:PORT` may stand in the place of the port, as in the log: `tcp:127.0.0.1:8080`, `ssl:[::1]:8443`, `tcp::8080`.
  Only key=value fields may follow. A first part of digits alone is a port, never a host.
- An IPv6 address needs no backslashes as the value of `interface`. In brackets it ends with its bracket. Without them
  it extends to the next key=value field, or to the end: `tcp6:8080:interface=::1:backlog=5`.
- Before a port an IPv6 address is in brackets: `::1:8080` is an address as well, and refused.

A description may begin with the port or with HOST:PORT, and is `tcp:` then: `8080`, `:8080`, `*:8080`,
`localhost:8080`, `127.0.0.1:8080`, `status.example.com:8080`, `[::1]:8080`. A host name of one label other than
`localhost` takes `tcp:` before it: `web:8080` would be of the type `web`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rtservice.suggestions import did_you_mean, nearest

PROXY = ("proxy", "haproxy")

# By position or keyword, as Twisted has them.
ARGUMENTS = {
    "tcp": ("port", "interface", "backlog"),
    "tcp6": ("port", "interface", "backlog"),
    "ssl": ("port", "privateKey", "certKey", "sslmethod", "interface", "backlog", "extraCertChain", "dhParameters"),
    "unix": ("address", "mode", "backlog", "lockfile"),
    "systemd": ("domain", "index", "name"),
}

TYPES = frozenset((*ARGUMENTS, *PROXY))

# What is accepted, for error messages.
FORMS = "8080, HOST:PORT such as 127.0.0.1:8080 or [::1]:8080, tcp:, tcp6:, ssl:, unix:, systemd:"

# Words of other programs for types of ours.
_OTHER_WORDS = {"tls": "ssl", "https": "ssl", "http": "tcp", "tcp4": "tcp", "ipv4": "tcp", "ipv6": "tcp6"}


class ListenError(Exception):
    """A description cannot become listening sockets; the text says what was found and what to do."""


@dataclass(frozen=True)
class Description:
    """A description that was read. `prefixes` are those of `proxy`, `haproxy` and `ssl` that go before its type."""

    kind: str
    positional: tuple[str, ...] = ()
    keywords: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether this package listens on it, and not Twisted or one of its plugins."""
        return bool(self.prefixes) or self.kind in TYPES

    @property
    def proxied(self) -> bool:
        """Whether each connection is to begin with a PROXY header."""
        return self.prefixes[:1] in (("proxy",), ("haproxy",))

    @property
    def interface(self) -> str:
        """The interface, as it stands there; empty without one."""
        names = ARGUMENTS.get(self.kind, ())
        return {**dict(zip(names, self.positional, strict=False)), **self.keywords}.get("interface", "")


def whole_number(what: str, text: str, low: int, high: int) -> int:
    """Return a number that a description gives in decimal digits. Raises ListenError."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ListenError(f"{what} {text!r} is not a whole number from {low} to {high}")
    return int(text)


def parse(text: str) -> Description:
    """Read a description; raises ListenError."""
    parts = _split(text)
    prefixes: list[str] = []
    # Two at the most are accepted, and a third is enough to reject them.
    while parts and len(prefixes) < 3 and _is_prefix(parts):
        prefixes.append(_unescape(parts.pop(0)))
    parts = parts or [""]
    first = next((number for number, part in enumerate(parts) if _key(part) is None), None)
    if first is None:
        raise ListenError("it does not begin with a type such as tcp: or unix:")
    kind = _unescape(parts[first])
    if kind in PROXY:
        raise ListenError(f"{kind}: goes before everything else")
    if kind in _WITH_PORT:
        del parts[first]
    elif first == 0 and _is_address_and_port(parts):
        kind = "tcp"
    else:
        del parts[first]
        return Description(kind, *_twisteds(parts), tuple(prefixes))
    return Description(kind, *_with_addresses(kind, parts), tuple(prefixes))


def unknown_type(description: Description, others: Iterable[str] = (), *, proxy: bool = True) -> str:
    """What is wrong with a description of a type that is not known.

    `others` are known types that are not ours. Where there are no PROXY headers, `proxy` is false.
    """
    kind = description.kind
    others = sorted(set(others) - TYPES)
    meant = _OTHER_WORDS.get(kind.lower()) or nearest(kind, (*TYPES, *others))
    accepted = f"; accepted are {FORMS}{', proxy: before these' if proxy else ''}"
    if others:
        accepted += f", and of Twisted {', '.join(f'{other}:' for other in others)}"
    if re.fullmatch(r"[\w-]+", kind, re.ASCII) and _DIGITS.fullmatch("".join(description.positional[:1])):
        accepted += f"; a host of that name is tcp:{kind}:{description.positional[0]}"
    return f"unknown type {kind!r}{accepted}{did_you_mean(meant and f'{meant}:…')}"


def bare_host(host: str) -> str:
    """A host without the brackets of an IPv6 address."""
    inner = host[1:-1]
    return inner if host == f"[{inner}]" and _is_ipv6(inner) else host


def tcp_name(host: str, port: int, zone: str = "") -> str:
    """What logs call a listener on this address, which `parse` reads: `tcp:127.0.0.1:8080`, `tcp:[fe80::1%eth0]:8080`.

    `zone` is the network interface of a link-local address (RFC 4007, section 11).
    """
    return f"tcp:{address_name(host, port, zone)}"


def address_name(host: str, port: int, zone: str = "") -> str:
    """An address and a port as messages have them."""
    scoped = f"{host}%{zone}" if zone else host
    return f"[{scoped}]:{port}" if ":" in host else f"{host}:{port}"


def unix_name(path: str) -> str:
    """What logs call a listener on this path, which `parse` reads."""
    return "unix:" + re.sub(r"[\\:=]", r"\\\g<0>", path)


# Types in which an address and a port can be.
_WITH_PORT = ("tcp", "tcp6", "ssl")

_PART = re.compile(r"(?:\\.|[^:\\])*", re.DOTALL)
_KEYWORD = re.compile(r"((?:\\.|[^=\\])*)=(.*)", re.DOTALL)
_DIGITS = re.compile(r"[0-9]+")

# A name that cannot be taken for a type: `localhost`, or one of several labels; IPv4 addresses look the same.
_CLEARLY_HOST = re.compile(r"localhost\.?|[\w-]+(\.[\w-]+)+\.?", re.ASCII | re.IGNORECASE)


def _split(text: str) -> list[str]:
    """The parts between colons, with their backslashes."""
    parts = []
    at = 0
    while True:
        match = _PART.match(text, at)
        assert match is not None  # it matches nothing, too
        parts.append(match.group())
        at = match.end()
        if at == len(text):
            return parts
        if text[at] == "\\":
            raise ListenError("it ends with a backslash, which takes the next character as it is")
        at += 1


def _key(part: str) -> str | None:
    """The key of a key=value field, with its backslashes; None of another part."""
    match = _KEYWORD.fullmatch(part)
    return None if match is None else match[1]


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _add_keyword(keywords: dict[str, str], key: str, value: str) -> None:
    if key in keywords:
        raise ListenError(f"{key}= is given twice")
    keywords[key] = value


def _twisteds(parts: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Positional arguments and keywords as Twisted reads them."""
    positional = []
    keywords: dict[str, str] = {}
    for part in parts:
        key = _key(part)
        if key is None:
            positional.append(_unescape(part))
        else:
            _add_keyword(keywords, _unescape(key), _unescape(part[len(key) + 1 :]))
    return tuple(positional), keywords


def _is_prefix(parts: list[str]) -> bool:
    kind = _unescape(parts[0])
    return kind in PROXY or (kind == "ssl" and len(parts) > 1 and _unescape(parts[1]) in TYPES)


def _is_address_and_port(parts: list[str]) -> bool:
    """Whether a description without a type begins with a port, or with what can only be an address."""
    head, rest = parts[0], parts[1:]
    if _ipv6_run(parts) or (rest and head == "" and _key(rest[0]) is None):
        return True
    if _DIGITS.fullmatch(head):
        if rest and _key(rest[0]) is None:
            other = f" or tcp:{rest[0]}:interface={head}" if _DIGITS.fullmatch(rest[0]) else ""
            raise ListenError(
                f"{f'{head}:{rest[0]}'!r} begins with a port; write tcp:{head}:interface={rest[0]}{other}"
            )
        return True
    return head == "*" or head.startswith("[") or _CLEARLY_HOST.fullmatch(head) is not None


def _with_addresses(kind: str, parts: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Positional arguments and keywords of a type that has a port, wherever its address stands."""
    positional: list[str] = []
    keywords: dict[str, str] = {}
    host: str | None = None  # of HOST:PORT
    at = 0
    while at < len(parts):
        part = parts[at]
        key = _key(part)
        length = 1
        if key is not None:
            value = _unescape(part[len(key) + 1 :])
            if _unescape(key) == "interface":
                value, length = _interface([part[len(key) + 1 :], *parts[at + 1 :]])
            _add_keyword(keywords, _unescape(key), value)
        elif host is not None and positional:
            raise ListenError(f"too many parts: {_unescape(part)!r}; only key=value fields follow HOST:PORT")
        elif host is None and not positional and not _DIGITS.fullmatch(_unescape(part)):
            rest = parts[at:]
            if run := _ipv6_run(rest):
                raise ListenError(_ambiguous(run))
            if bracketed := _bracketed(rest):
                host, length = bracketed
            elif rest[1:] and _DIGITS.fullmatch(rest[1]):
                host = _unescape(part)
            elif rest[1:] and rest[1] and _key(rest[1]) is None and _CLEARLY_HOST.fullmatch(part):
                raise ListenError(f"port {_unescape(rest[1])!r} is not a whole number from 0 to 65535")
            else:
                positional.append(_unescape(part))
        elif len(positional) == 1 and ARGUMENTS[kind][1] == "interface":
            value, length = _interface(parts[at:])
            positional.append(value)
        else:
            positional.append(_unescape(part))
        at += length
    if host:
        _add_keyword(keywords, "interface", host)
    return tuple(positional), keywords


def _interface(parts: list[str]) -> tuple[str, int]:
    """The address at the beginning of these parts, and how many of them it is."""
    if bracketed := _bracketed(parts):
        return bracketed
    if run := _ipv6_run(parts):
        return run, run.count(":") + 1
    bare = _bare_run(parts)
    if "::" in bare and "\\" not in bare:
        raise ListenError(f"interface {bare!r} is not an IPv6 address")
    return _unescape(parts[0]), 1


def _bracketed(parts: list[str]) -> tuple[str, int] | None:
    """An IPv6 address in brackets and the number of its parts; None where there is no bracket."""
    if not parts[0].startswith("["):
        return None
    end = next((number for number, part in enumerate(parts, 1) if part.endswith("]")), len(parts))
    text = _unescape(":".join(parts[:end]))
    host = bare_host(text)
    if host == text:
        raise ListenError(f"{text!r} is not an IPv6 address in brackets, such as [::1]")
    return host, end


def _bare_run(parts: list[str]) -> str:
    """What stands up to the next key=value field."""
    end = next((number for number, part in enumerate(parts) if number and _key(part) is not None), len(parts))
    return ":".join(parts[:end])


def _ipv6_run(parts: list[str]) -> str | None:
    """What stands up to the next key=value field, if that is an IPv6 address."""
    run = _bare_run(parts)
    return run if _is_ipv6(run) else None


def _is_ipv6(text: str) -> bool:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    # A name of a network interface has neither of these (dev_valid_name of Linux), and `ipaddress` takes any text.
    return not re.search(r"[:/\s]", address.scope_id or "")


def _ambiguous(run: str) -> str:
    address, _, port = run.rpartition(":")
    if _DIGITS.fullmatch(port) and _is_ipv6(address):
        return f"{run!r} may be an IPv6 address or one with a port; write [{address}]:{port}, or [{run}]:PORT"
    return f"{run!r} is an IPv6 address without a port; write [{run}]:PORT"
