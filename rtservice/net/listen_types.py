"""Listen descriptions to listeners: check, resolve and open each type. Accepts no connections.

Sockets are created here and adopted by the process that accepts: a process that keeps a socket open keeps its backlog.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from rtservice.net.activation import adopt_passed, check_choice, check_passed, passed_places
from rtservice.net.description import (
    ARGUMENTS,
    PROXY,
    Description,
    ListenError,
    address_name,
    bare_host,
    parse,
    whole_number,
)
from rtservice.net.listen_conflicts import Place, TCPPlace
from rtservice.net.listener import Listener
from rtservice.net.tcp import Address, check_tcp, is_local, open_tcp, resolve, tcp_place
from rtservice.net.tls import DirectoryTLS, Library, LoadedTLS, Minimum, ServerTLS, TLSError, fingerprint
from rtservice.net.unix import check_unix, open_unix, unix_places
from rtservice.suggestions import did_you_mean, nearest


def _arguments(
    positional: Sequence[str], keywords: Mapping[str, str], names: tuple[str, ...], also: tuple[str, ...] = ()
) -> dict[str, str]:
    """Bind arguments as Twisted's parsers do: `names` by position or keyword, `also` by keyword only.

    Raises ListenError.
    """
    if len(positional) > len(names):
        raise ListenError(f"too many parts: {positional[len(names)]!r}")
    bound = dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key not in names + also:
            meant = did_you_mean(nearest(key, names + also))
            raise ListenError(f"unknown keyword {key!r}; accepted are {', '.join(names + also)}{meant}")
        if key in bound:
            raise ListenError(f"{key} is given twice, by position and by keyword; give it once")
        bound[key] = value
    return bound


@dataclass(frozen=True)
class ListenerSpec:
    """A parsed listener: no name is resolved, no file read and no socket opened yet. Its methods raise ListenError.

    `check` finds the errors that `open` would, without listening. It cannot find out whether a port is free and
    permitted, or whether a socket file is in use: only binding shows that. If no sockets were passed, `check` verifies
    only the keywords of `systemd:`.
    """

    _open: Callable[[], list[Listener]]
    _check: Callable[[], None]
    _places: Callable[[bool], list[Place]]
    _tls: ServerTLS | DirectoryTLS | None = None
    _proxied: bool = False

    def open(self) -> list[Listener]:
        """Return the listeners, bound and listening."""
        # Before anything is bound: an error in a file is found before clients wait in the backlog.
        read = fingerprint(self._tls.files()) if self._tls is not None else ()
        loaded = _load(self._tls)
        opened = self._open()
        for listener in opened:
            if loaded is not None:
                listener.adopt(loaded)
                listener.initial_fingerprint = read
                listener.source = self._tls
                listener.name = f"ssl:{listener.name.removeprefix('tcp:')}"
            if self._proxied:
                listener.proxied = True
                listener.name = f"proxy:{listener.name}"
        return opened

    def check(self) -> None:
        """Find the errors that `open` would, without listening."""
        _load(self._tls)
        self._check()

    def places(self, *, look_up: bool = True) -> list[Place]:
        """Return the places where it listens. Without `look_up`, host names are not resolved and stay as they are."""
        return self._places(look_up)


def open_description(description: str, **how: Any) -> list[Listener]:
    """Open the listeners of one description. The arguments are those of `read_description`. Raises ListenError."""
    return read_description(description, **how).open()


def check_description(description: str, **how: Any) -> None:
    """Find the errors that `open_description` would, without listening. Raises ListenError."""
    read_description(description, **{"backlog": 1, **how}).check()


def read_description(
    description: str,
    *,
    backlog: int,
    resolve_path: Callable[[str], str] = os.path.abspath,
    slots: int = 0,
    loopback: bool = False,
) -> ListenerSpec:
    r"""Parse one description whose type is in `TYPES`. Resolves no name, and opens no file or socket.

    TLS is `ssl:8443:privateKey=…:certKey=…`, or `ssl:` before a description of another type, which then takes the same
    keywords: `ssl:systemd:name=web:privateKey=…`. `certificates=`, a directory, replaces both (DirectoryTLS).
    `library=pyopenssl` selects Twisted's TLS. `proxy:`, or `haproxy:` as in Twisted, is the first prefix, since the
    PROXY header comes before TLS: `proxy:ssl:8443:…`.

    `backlog` is the default of `backlog=`, from 1 to 65535 connections. `resolve_path` makes the paths of sockets and
    certificates absolute. `slots` is the number of sockets of a TCP listener; 0 means one without slots. With
    `loopback`, TCP listens on the loopback address by default instead of all addresses. Raises ListenError.
    """
    read = parse(description)
    kind = read.kind
    proxied, secure = _prefixes(read)
    names = ARGUMENTS[kind]
    also = tuple(name for name in _TLS_KEYWORDS if name not in names) if secure else ()
    given = _arguments(read.positional, read.keywords, names, also)
    if "backlog" in names:
        backlog = whole_number("backlog", given.get("backlog", str(backlog)), 1, 65535)
    tls = _tls(given, resolve_path) if secure else None
    if kind == "systemd":
        check_choice(given)
        return ListenerSpec(
            partial(adopt_passed, given),
            partial(check_passed, given),
            partial(passed_places, given),
            tls,
            proxied,
        )
    if kind == "unix":
        if not given.get("address"):
            raise ListenError("the path of the socket is missing; write unix:PATH, such as unix:/run/rt.sock")
        # Twisted's default.
        mode = given.get("mode", "666")
        if not re.fullmatch(r"[0-7]{3,4}", mode):
            raise ListenError(f"mode {mode!r} is not an octal file mode; accepted are 3 or 4 digits such as 660")
        # Twisted's `lockfile=` is accepted without effect: the directory is locked while a stale file is replaced.
        path = resolve_path(given["address"])
        return ListenerSpec(
            partial(open_unix, path, int(mode, 8), backlog),
            partial(check_unix, path),
            partial(unix_places, path),
            tls,
            proxied,
        )
    if not given.get("port"):
        raise ListenError(f"the port is missing; write {kind}:PORT, such as {kind}:8080")
    port = whole_number("port", given["port"], 0, 65535)
    interface = given.get("interface", ("::1" if kind == "tcp6" else "127.0.0.1") if loopback else "")
    family = socket.AF_INET6 if kind == "tcp6" or ":" in interface else socket.AF_INET
    return _wanted_tcp(interface, port, (family,), backlog, slots, tls, proxied)


def _prefixes(read: Description) -> tuple[bool, bool]:
    """Return whether connections begin with a PROXY header, and whether they use TLS. Raises ListenError."""
    prefixes = list(read.prefixes)
    if read.proxied:
        prefix = prefixes.pop(0)
        if (prefixes or [read.kind])[0] not in ARGUMENTS:
            kind = (prefixes or [read.kind])[0]
            meant = did_you_mean(nearest(kind, ARGUMENTS))
            raise ListenError(f"{prefix}: is before {kind!r}; accepted after it are {_these(ARGUMENTS)}{meant}")
    if prefixes and (others := [*prefixes, read.kind][1]) in ("ssl", *PROXY):
        these = _these(other for other in ARGUMENTS if other != "ssl")
        raise ListenError(f"ssl: is before {others!r}; accepted after it are {these}, and proxy: before it")
    return read.proxied, bool(prefixes) or read.kind == "ssl"


# Keywords of every description with TLS: the first five are Twisted's, the last six are rtservice's.
_TLS_KEYWORDS = (
    *("privateKey", "certKey", "sslmethod", "extraCertChain", "dhParameters"),
    *("certificates", "clientCA", "clientCRL", "minimum", "alpn", "library"),
)


def _these(kinds: Iterable[str]) -> str:
    *most, last = (f"{kind}:" for kind in kinds)
    return f"{', '.join(most)} and {last}"


def _tls(given: Mapping[str, str], resolve_path: Callable[[str], str]) -> ServerTLS | DirectoryTLS:
    """Return the TLS source that these keywords describe. Raises ListenError."""
    for keyword, remedy in (
        ("sslmethod", "choose the lowest TLS version with minimum=1.2 or minimum=1.3"),
        ("dhParameters", "remove it: keys are exchanged on elliptic curves, which need no parameters"),
    ):
        if keyword in given:
            raise ListenError(f"{keyword}= is not supported; {remedy}")
    minimum: Any = given.get("minimum", "1.2")
    if minimum not in get_args(Minimum):
        raise ListenError(f"minimum {minimum!r} is unknown; accepted are {', '.join(get_args(Minimum))}")
    library: Any = given.get("library", "ssl")
    if library not in get_args(Library):
        raise ListenError(f"library {library!r} is unknown; accepted are {', '.join(get_args(Library))}")
    alpn = tuple(given["alpn"].split(",")) if "alpn" in given else ()
    if not all(re.fullmatch(r"[!-~]{1,255}", name) for name in alpn):
        raise ListenError(f"alpn {given['alpn']!r} is not a list of protocol names such as h2,http/1.1")

    def path(keyword: str, default: str | None = None) -> str | None:
        name = given.get(keyword, default)
        if name == "":
            raise ListenError(f"{keyword}= is empty; give the path of a file")
        return resolve_path(name) if name is not None else None

    policy: dict[str, Any] = {"client_ca": path("clientCA"), "client_crl": path("clientCRL")}
    if policy["client_crl"] is not None and policy["client_ca"] is None:
        raise ListenError("clientCRL= is given without clientCA=; give the authorities whose certificates it revokes")
    policy.update(minimum=minimum, alpn=alpn, library=library)
    directory = path("certificates")
    if directory is not None:
        for keyword in ("privateKey", "certKey", "extraCertChain"):
            if keyword in given:
                raise ListenError(
                    f"{keyword}= and certificates= are both given; remove one: the directory has all files"
                )
        return DirectoryTLS(directory, **policy)
    # Twisted's default: server.pem for both.
    key = given.get("privateKey", "server.pem")
    files: dict[str, Any] = {"private_key": path("privateKey", key), "certificate": path("certKey", key)}
    return ServerTLS(**files, chain=path("extraCertChain"), **policy)


def _load(files: ServerTLS | DirectoryTLS | None) -> LoadedTLS | None:
    try:
        return files.load() if files is not None else None
    except TLSError as error:
        raise ListenError(str(error)) from error


def open_port(port: int, **how: Any) -> list[Listener]:
    """Open the listeners of `--port`. The arguments are those of `read_port`. Raises ListenError."""
    return read_port(port, **how).open()


def check_port(port: int, *, interface: str) -> None:
    """Find the errors that `open_port` would, except a port in use. Raises ListenError."""
    read_port(port, interface=interface, backlog=1).check()


def read_port(port: int, *, interface: str, backlog: int, slots: int = 0) -> ListenerSpec:
    """Parse `--port`: listeners on IPv4, and on IPv6 if the host has it, with one port number, also for port 0.

    There are two sockets, since a dual-stack socket shows IPv4 peers as `::ffff:192.0.2.1`. `interface` limits this to
    one address, with or without brackets, or to the addresses of a host name; "" means all addresses. `port` is from 0
    to 65535. `backlog` and `slots` are as in `read_description`.
    """
    return _wanted_tcp(bare_host(interface), port, (socket.AF_INET, socket.AF_INET6), backlog, slots)


def _wanted_tcp(
    interface: str,
    port: int,
    families: tuple[socket.AddressFamily, ...],
    backlog: int,
    slots: int,
    tls: ServerTLS | DirectoryTLS | None = None,
    proxied: bool = False,
) -> ListenerSpec:
    def addresses() -> list[Address]:
        if interface:
            return resolve(interface, port, families[0] if len(families) == 1 else socket.AF_UNSPEC)
        return [(family, "::" if family == socket.AF_INET6 else "0.0.0.0", 0) for family in families]

    def places(look_up: bool) -> list[Place]:
        if interface and not look_up and not is_local(interface):
            six = (family == socket.AF_INET6 for family in families)
            shown = address_name(interface, port)
            may_be_absent = len(families) > 1
            return [
                TCPPlace(is_ipv6, interface.lower(), port, shown=shown, may_be_absent=may_be_absent) for is_ipv6 in six
            ]
        return [tcp_place(family, host, port, scope) for family, host, scope in addresses()]

    return ListenerSpec(
        lambda: open_tcp(addresses(), port, backlog, slots, interface),
        lambda: check_tcp(addresses(), port, interface),
        places,
        tls,
        proxied,
    )
