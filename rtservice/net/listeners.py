"""Listen descriptions to listeners: each type is checked, looked up and opened here. Nothing is accepted here.

Sockets are made in one place and adopted in another: the process that holds a socket keeps its queue of connections.
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
from rtservice.net.listener import Listener
from rtservice.net.places import Place, TCPPlace
from rtservice.net.tcp import Address, check_tcp, is_local, open_tcp, resolve, tcp_place
from rtservice.net.tls import DirectoryTLS, Library, LoadedTLS, Minimum, ServerTLS, TLSError, fingerprint
from rtservice.net.unix import check_unix, open_unix, unix_places
from rtservice.suggestions import did_you_mean, nearest


def _arguments(
    positional: Sequence[str], keywords: Mapping[str, str], names: tuple[str, ...], also: tuple[str, ...] = ()
) -> dict[str, str]:
    """Bind arguments as Twisted's parsers do: `names` by position or keyword, `also` by keyword alone."""
    if len(positional) > len(names):
        raise ListenError(f"too many parts: {positional[len(names)]!r}")
    bound = dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key not in names + also:
            meant = did_you_mean(nearest(key, names + also))
            raise ListenError(f"unknown keyword {key!r}; known are {', '.join(names + also)}{meant}")
        if key in bound:
            raise ListenError(f"{key} is given twice")
        bound[key] = value
    return bound


@dataclass(frozen=True)
class Wanted:
    """What is to be listened on, understood and not yet looked up, read or opened. Its methods raise ListenError.

    A check finds what `open` would, and listens on nothing. Whether a port is free and permitted, or a socket file in
    use, it does not find out: only binding it would tell. Of `systemd:` only the words are looked at when there are no
    sockets that were passed.
    """

    _open: Callable[[], list[Listener]]
    _check: Callable[[], None]
    _places: Callable[[bool], list[Place]]
    _tls: ServerTLS | DirectoryTLS | None = None
    _proxied: bool = False

    def open(self) -> list[Listener]:
        """The listening sockets."""
        # Before anything is bound: a file that is wrong is found without a client that waits in a queue.
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
        """Find what `open` would."""
        _load(self._tls)
        self._check()

    def places(self, *, look_up: bool = True) -> list[Place]:
        """Where it listens. Without `look_up` no name server is asked: a host name stands for itself."""
        return self._places(look_up)


def open_description(description: str, **how: Any) -> list[Listener]:
    """The listening sockets of one description; the arguments are those of `read_description`. Raises ListenError."""
    return read_description(description, **how).open()


def check_description(description: str, **how: Any) -> None:
    """Find what `open_description` would, and listen on nothing; raises ListenError."""
    read_description(description, **{"backlog": 1, **how}).check()


def read_description(
    description: str,
    *,
    backlog: int,
    resolve_path: Callable[[str], str] = os.path.abspath,
    slots: int = 0,
    loopback: bool = False,
) -> Wanted:
    r"""Understand one description whose type is in `TYPES`; no name is looked up, no file or socket touched.

    TLS is `ssl:8443:privateKey=…:certKey=…`, or `ssl:` before a description of another type, which then takes the same
    keywords: `ssl:systemd:name=web:privateKey=…`. `certificates=` is a directory in the place of both (DirectoryTLS),
    `library=pyopenssl` has Twisted's own TLS do it.
    `proxy:`, or `haproxy:` as Twisted has it, goes before all that: `proxy:ssl:8443:…`, since a PROXY header comes
    before TLS.

    `backlog` holds where the description does not say its own. `resolve_path` makes the paths of sockets and
    certificates absolute. With `slots`, a TCP listener has a socket for each of them. With `loopback`, TCP is on the
    loopback address where the description has no interface. Raises ListenError.
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
        return Wanted(
            partial(adopt_passed, given),
            partial(check_passed, given),
            partial(passed_places, given),
            tls,
            proxied,
        )
    if kind == "unix":
        if not given.get("address"):
            raise ListenError("the path of the socket is missing: unix:/run/rt.sock")
        # Twisted's default; a narrower one is the administrator's to choose.
        mode = given.get("mode", "666")
        if not re.fullmatch(r"[0-7]{3,4}", mode):
            raise ListenError(f"mode {mode!r} is not an octal file mode such as 660")
        # Twisted's `lockfile=` is taken and means nothing: the directory is locked while a stale file is replaced.
        path = resolve_path(given["address"])
        return Wanted(
            partial(open_unix, path, int(mode, 8), backlog),
            partial(check_unix, path),
            partial(unix_places, path),
            tls,
            proxied,
        )
    if not given.get("port"):
        raise ListenError(f"the port is missing: {kind}:8080")
    port = whole_number("port", given["port"], 0, 65535)
    interface = given.get("interface", ("::1" if kind == "tcp6" else "127.0.0.1") if loopback else "")
    family = socket.AF_INET6 if kind == "tcp6" or ":" in interface else socket.AF_INET
    return _wanted_tcp(interface, port, (family,), backlog, slots, tls, proxied)


def _prefixes(read: Description) -> tuple[bool, bool]:
    """Whether there are PROXY headers, and TLS. Raises ListenError."""
    prefixes = list(read.prefixes)
    if read.proxied:
        prefix = prefixes.pop(0)
        if (prefixes or [read.kind])[0] not in ARGUMENTS:
            kind = (prefixes or [read.kind])[0]
            meant = did_you_mean(nearest(kind, ARGUMENTS))
            raise ListenError(f"{prefix}: goes before {_these(ARGUMENTS)}, not before {kind!r}{meant}")
    if prefixes and (others := [*prefixes, read.kind][1]) in ("ssl", *PROXY):
        these = _these(other for other in ARGUMENTS if other != "ssl")
        raise ListenError(f"ssl: goes before {these}, not before {others!r}; proxy:ssl: is the order of the two")
    return read.proxied, bool(prefixes) or read.kind == "ssl"


# By keyword, wherever there is TLS; the last six are ours.
_TLS_KEYWORDS = (
    *("privateKey", "certKey", "sslmethod", "extraCertChain", "dhParameters"),
    *("certificates", "clientCA", "clientCRL", "minimum", "alpn", "library"),
)


def _these(kinds: Iterable[str]) -> str:
    *most, last = (f"{kind}:" for kind in kinds)
    return f"{', '.join(most)} and {last}"


def _tls(given: Mapping[str, str], resolve_path: Callable[[str], str]) -> ServerTLS | DirectoryTLS:
    """What a description with TLS says about it; raises ListenError."""
    for keyword, why in (
        ("sslmethod", "minimum=1.2 or minimum=1.3 says which versions of TLS are taken"),
        ("dhParameters", "keys are exchanged on elliptic curves, which need none"),
    ):
        if keyword in given:
            raise ListenError(f"{keyword}= is not known here: {why}")
    minimum: Any = given.get("minimum", "1.2")
    if minimum not in get_args(Minimum):
        raise ListenError(f"minimum {minimum!r} is not one of {', '.join(get_args(Minimum))}")
    library: Any = given.get("library", "ssl")
    if library not in get_args(Library):
        raise ListenError(f"library {library!r} is not one of {', '.join(get_args(Library))}")
    alpn = tuple(given["alpn"].split(",")) if "alpn" in given else ()
    if not all(re.fullmatch(r"[!-~]{1,255}", name) for name in alpn):
        raise ListenError(f"alpn {given['alpn']!r} is not a list of protocol names such as h2,http/1.1")

    def path(keyword: str, default: str | None = None) -> str | None:
        name = given.get(keyword, default)
        if name == "":
            raise ListenError(f"the name of a file is empty: {keyword}=")
        return resolve_path(name) if name is not None else None

    policy: dict[str, Any] = {"client_ca": path("clientCA"), "client_crl": path("clientCRL")}
    if policy["client_crl"] is not None and policy["client_ca"] is None:
        raise ListenError("clientCRL= is given without clientCA=: only certificates of its authorities can be revoked")
    policy.update(minimum=minimum, alpn=alpn, library=library)
    directory = path("certificates")
    if directory is not None:
        for keyword in ("privateKey", "certKey", "extraCertChain"):
            if keyword in given:
                raise ListenError(f"{keyword}= and certificates= are both given: the directory holds what is needed")
        return DirectoryTLS(directory, **policy)
    # Twisted's defaults: one file for both, called server.pem.
    key = given.get("privateKey", "server.pem")
    files: dict[str, Any] = {"private_key": path("privateKey", key), "certificate": path("certKey", key)}
    return ServerTLS(**files, chain=path("extraCertChain"), **policy)


def _load(files: ServerTLS | DirectoryTLS | None) -> LoadedTLS | None:
    try:
        return files.load() if files is not None else None
    except TLSError as error:
        raise ListenError(str(error)) from error


def open_port(port: int, **how: Any) -> list[Listener]:
    """Listen on `port`; the arguments are those of `read_port`. Raises ListenError."""
    return read_port(port, **how).open()


def check_port(port: int, *, interface: str) -> None:
    """Find what `open_port` would, short of whether the port is free; raises ListenError."""
    read_port(port, interface=interface, backlog=1).check()


def read_port(port: int, *, interface: str, backlog: int, slots: int = 0) -> Wanted:
    """`port` of IPv4 and, where the host has it, IPv6; two sockets with one number, also when that is 0.

    Two, since peers of one dual-stack socket would show as `::ffff:192.0.2.1`. `interface` limits this to one
    address, with or without brackets, or to those of one host name. `slots` are as in read_description.
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
) -> Wanted:
    def addresses() -> list[Address]:
        if interface:
            return resolve(interface, port, families[0] if len(families) == 1 else socket.AF_UNSPEC)
        return [(family, "::" if family == socket.AF_INET6 else "0.0.0.0", 0) for family in families]

    def places(look_up: bool) -> list[Place]:
        if interface and not look_up and not is_local(interface):
            six = (family == socket.AF_INET6 for family in families)
            shown = address_name(interface, port)
            unsure = len(families) > 1
            return [TCPPlace(each, interface.lower(), port, shown=shown, unsure=unsure) for each in six]
        return [tcp_place(family, host, port, scope) for family, host, scope in addresses()]

    return Wanted(
        lambda: open_tcp(addresses(), port, backlog, slots, interface),
        lambda: check_tcp(addresses(), port, interface),
        places,
        tls,
        proxied,
    )
