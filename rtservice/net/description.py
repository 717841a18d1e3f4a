r"""The grammar of listen descriptions (`--listen`, `--status`): text to type and arguments, without look-ups or I/O.

The syntax is that of Twisted's endpoints: `type:argument:key=value`, where a backslash escapes the next character.
Every description that Twisted accepts has the same meaning here. In addition, for the address of `tcp`, `tcp6` and
`ssl`:

- `HOST:PORT` may replace the port, as in the log: `tcp:127.0.0.1:8080`, `ssl:[::1]:8443`, `tcp::8080`. Only key=value
  fields may follow. A first part that consists of digits is a port, never a host.
- An IPv6 address needs no backslashes as the value of `interface`. In brackets it ends with its bracket. Without
  brackets it extends to the next key=value field, or to the end: `tcp6:8080:interface=::1:backlog=5`.
- An IPv6 address before a port needs brackets: `::1:8080` is a valid address too, and is rejected.

A description that begins with a port or HOST:PORT has the type `tcp`: `8080`, `:8080`, `*:8080`, `localhost:8080`,
`127.0.0.1:8080`, `status.example.com:8080`, `[::1]:8080`. A host name of one label other than `localhost` needs the
prefix `tcp:`, since `web:8080` would have the type `web`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rtservice.suggestions import did_you_mean, nearest

PROXY = ("proxy", "haproxy")

# Arguments by position or keyword, as in Twisted.
ARGUMENTS = {
    "tcp": ("port", "interface", "backlog"),
    "tcp6": ("port", "interface", "backlog"),
    "ssl": ("port", "privateKey", "certKey", "sslmethod", "interface", "backlog", "extraCertChain", "dhParameters"),
    "unix": ("address", "mode", "backlog", "lockfile"),
    "systemd": ("domain", "index", "name"),
}

TYPES = frozenset((*ARGUMENTS, *PROXY))

# The accepted forms, for error messages.
FORMS = "8080, HOST:PORT such as 127.0.0.1:8080 or [::1]:8080, tcp:, tcp6:, ssl:, unix:, systemd:"

# Other programs' names of these types.
_OTHER_WORDS = {"tls": "ssl", "https": "ssl", "http": "tcp", "tcp4": "tcp", "ipv4": "tcp", "ipv6": "tcp6"}


class ListenError(Exception):
    """A listen description is invalid, or its sockets cannot be opened. The text names the error and the remedy."""


@dataclass(frozen=True)
class Description:
    """A parsed listen description. `prefixes` are the `proxy`, `haproxy` and `ssl` before its type."""

    kind: str
    positional: tuple[str, ...] = ()
    keywords: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        """Whether rtservice opens it, and not Twisted or one of its plugins."""
        return bool(self.prefixes) or self.kind in TYPES

    @property
    def proxied(self) -> bool:
        """Whether each connection must begin with a PROXY header."""
        return self.prefixes[:1] in (("proxy",), ("haproxy",))

    @property
    def interface(self) -> str:
        """The value of `interface`, unchanged; empty if it is not given."""
        names = ARGUMENTS.get(self.kind, ())
        return {**dict(zip(names, self.positional, strict=False)), **self.keywords}.get("interface", "")


def whole_number(what: str, text: str, low: int, high: int) -> int:
    """Return the number in `text`, from `low` to `high` and in decimal digits. Raises ListenError."""
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ListenError(f"{what} {text!r} is not a whole number from {low} to {high}")
    return int(text)


def parse(text: str) -> Description:
    """Parse a listen description. Raises ListenError."""
    parts = _split(text)
    prefixes: list[str] = []
    # At most two are accepted; the third is enough to reject them.
    while parts and len(prefixes) < 3 and _is_prefix(parts):
        prefixes.append(_unescape(parts.pop(0)))
    parts = parts or [""]
    first = next((number for number, part in enumerate(parts) if _key(part) is None), None)
    if first is None:
        raise ListenError("the type is missing; begin with a type such as tcp: or unix:")
    kind = _unescape(parts[first])
    if kind in PROXY:
        raise ListenError(f"{kind}: is not at the beginning; write it before ssl: and the type")
    if kind in _WITH_PORT:
        del parts[first]
    elif first == 0 and _is_address_and_port(parts):
        kind = "tcp"
    else:
        del parts[first]
        return Description(kind, *_twisteds(parts), tuple(prefixes))
    return Description(kind, *_with_addresses(kind, parts), tuple(prefixes))


def unknown_type(description: Description, others: Iterable[str] = (), *, proxy: bool = True) -> str:
    """Return the error text for a description of an unknown type.

    `others` are types of Twisted and its plugins. `proxy` tells whether the setting accepts `proxy:`.
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
    """Return a host without the brackets of an IPv6 address."""
    inner = host[1:-1]
    return inner if host == f"[{inner}]" and _is_ipv6(inner) else host


def tcp_name(host: str, port: int, zone: str = "") -> str:
    """Return the name of a TCP listener for logs: `tcp:127.0.0.1:8080`, `tcp:[fe80::1%eth0]:8080`.

    `zone` is the network interface of a link-local address (RFC 4007, section 11). `parse` accepts the name.
    """
    return f"tcp:{address_name(host, port, zone)}"


def address_name(host: str, port: int, zone: str = "") -> str:
    """Return an address and a port as `127.0.0.1:8080` or `[::1]:8080`."""
    scoped = f"{host}%{zone}" if zone else host
    return f"[{scoped}]:{port}" if ":" in host else f"{host}:{port}"


def unix_name(path: str) -> str:
    """Return the name of a listener on this path for logs. `parse` accepts it."""
    return "unix:" + re.sub(r"[\\:=]", r"\\\g<0>", path)


# Types that take an address and a port.
_WITH_PORT = ("tcp", "tcp6", "ssl")

_PART = re.compile(r"(?:\\.|[^:\\])*", re.DOTALL)
_KEYWORD = re.compile(r"((?:\\.|[^=\\])*)=(.*)", re.DOTALL)
_DIGITS = re.compile(r"[0-9]+")

# A host that cannot be a type: `localhost`, or a name of several labels; an IPv4 address matches too.
_CLEARLY_HOST = re.compile(r"localhost\.?|[\w-]+(\.[\w-]+)+\.?", re.ASCII | re.IGNORECASE)


def _split(text: str) -> list[str]:
    """Split at colons that are not escaped. Backslashes stay. Raises ListenError."""
    parts = []
    at = 0
    while True:
        match = _PART.match(text, at)
        assert match is not None  # it also matches an empty text
        parts.append(match.group())
        at = match.end()
        if at == len(text):
            return parts
        if text[at] == "\\":
            raise ListenError("it ends with a backslash, which escapes the next character; write \\\\ for a backslash")
        at += 1


def _key(part: str) -> str | None:
    """Return the key of a key=value field, with its backslashes; None if the part is no such field."""
    match = _KEYWORD.fullmatch(part)
    return None if match is None else match[1]


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)


def _add_keyword(keywords: dict[str, str], key: str, value: str) -> None:
    if key in keywords:
        raise ListenError(f"{key}= is given twice; give it once")
    keywords[key] = value


def _twisteds(parts: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return positional arguments and keywords by Twisted's rules."""
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
    """Return whether a description without a type begins with a port or an unambiguous address."""
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
    """Return positional arguments and keywords of a type with a port. The address becomes `interface`."""
    positional: list[str] = []
    keywords: dict[str, str] = {}
    host: str | None = None  # the host of HOST:PORT
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
    """Return the address at the beginning of these parts, and its number of parts."""
    if bracketed := _bracketed(parts):
        return bracketed
    if run := _ipv6_run(parts):
        return run, run.count(":") + 1
    bare = _bare_run(parts)
    if "::" in bare and "\\" not in bare:
        raise ListenError(f"interface {bare!r} is not an IPv6 address")
    return _unescape(parts[0]), 1


def _bracketed(parts: list[str]) -> tuple[str, int] | None:
    """Return an IPv6 address in brackets and its number of parts; None without a bracket."""
    if not parts[0].startswith("["):
        return None
    end = next((number for number, part in enumerate(parts, 1) if part.endswith("]")), len(parts))
    text = _unescape(":".join(parts[:end]))
    host = bare_host(text)
    if host == text:
        raise ListenError(f"{text!r} is not an IPv6 address in brackets, such as [::1]")
    return host, end


def _bare_run(parts: list[str]) -> str:
    """Return the text up to the next key=value field."""
    end = next((number for number, part in enumerate(parts) if number and _key(part) is not None), len(parts))
    return ":".join(parts[:end])


def _ipv6_run(parts: list[str]) -> str | None:
    """Return the text up to the next key=value field if it is an IPv6 address, else None."""
    run = _bare_run(parts)
    return run if _is_ipv6(run) else None


def _is_ipv6(text: str) -> bool:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    # `ipaddress` accepts any text as scope. Linux allows none of these characters in an interface's name
    # (dev_valid_name).
    return not re.search(r"[:/\s]", address.scope_id or "")


def _ambiguous(run: str) -> str:
    address, _, port = run.rpartition(":")
    if _DIGITS.fullmatch(port) and _is_ipv6(address):
        return f"{run!r} may be an IPv6 address or one with a port; write [{address}]:{port}, or [{run}]:PORT"
    return f"{run!r} is an IPv6 address without a port; write [{run}]:PORT"
