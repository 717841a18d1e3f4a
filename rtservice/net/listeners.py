"""From a description to bound, listening sockets; nothing is accepted here.

Sockets are made in one place and adopted in another: whoever holds the socket keeps the queue of connections.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

from twisted.logger import Logger

from rtservice.counted import counted
from rtservice.net.crl import RevocationLists
from rtservice.net.description import (
    ARGUMENTS,
    PROXY,
    Description,
    address_name,
    bare_host,
    parse,
    tcp_name,
    unix_name,
)
from rtservice.net.description import TYPES as TYPES
from rtservice.net.description import ListenError as ListenError  # what the rest of the package imports from here
from rtservice.net.places import FilePlace, PassedPlace, Place, TCPPlace
from rtservice.net.tls import (
    Certificate,
    Context,
    DirectoryTLS,
    Files,
    Library,
    Loaded,
    Minimum,
    Reusable,
    ServerTLS,
    Steps,
    TLSError,
    fingerprint,
    finish,
)
from rtservice.suggestions import did_you_mean, nearest

_log = Logger()

# sd_listen_fds(3): the first descriptor that the service manager passes.
_LISTEN_FDS_START = 3

# Why a socket cannot be had on a host without IPv6: no such family, or the family with every address disabled.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

# How often the system is asked for one port number that is free on IPv4 and IPv6.
_SAME_PORT_TRIES = 32


Socket = socket.socket  # where a field of this name hides the module


@dataclass(frozen=True)
class _SocketFile:
    """The file of a UNIX socket that this process made, and has to remove."""

    # Held, and not the path, since the process may change its root, its directory or its user after binding.
    directory: int
    name: str
    inode: int
    path: str

    def remove(self) -> None:
        """Remove the file, unless a successor has put its own in its place; raises OSError."""
        try:
            if os.stat(self.name, dir_fd=self.directory).st_ino == self.inode:
                os.unlink(self.name, dir_fd=self.directory)
        except FileNotFoundError:
            pass
        finally:
            os.close(self.directory)


@dataclass
class Listener:
    """A bound, listening, non-blocking socket, and what logs call it (`tcp:[::1]:8080`, `unix:/run/rt.sock`).

    With `tls`, its connections are to be secured with this, and shown one of `certificates`; `revocation` and
    `warnings` are those of a `tls.Loaded`, and `read` is the `tls.fingerprint` of the files that these were first read
    from. With `proxied`, each of them begins with a PROXY header. One that is `shared` is held
    by the process that passed it, too, which keeps its queue.

    For several processes a TCP listener has a socket for each slot, `copies`, among which the kernel spreads new
    connections (SO_REUSEPORT of socket(7)); `socket` is the first of them. `spares` are bound, and listen when a slot
    is added: to bind takes the user that bound the others, and may take privileges; both can be gone by then.
    """

    socket: socket.socket
    name: str
    tls: Context | None = None
    certificates: tuple[Certificate, ...] = ()
    revocation: RevocationLists | None = None
    warnings: tuple[str, ...] = ()
    read: tuple[object, ...] = ()
    proxied: bool = False
    shared: bool = False
    source: ServerTLS | DirectoryTLS | None = field(default=None, repr=False)
    reusable: Reusable = field(default_factory=Reusable, repr=False)
    copies: list[Socket] = field(default_factory=list, repr=False)
    spares: list[Socket] = field(default_factory=list, repr=False)
    _backlog: int = 0
    _file: _SocketFile | None = field(default=None, repr=False)

    def renew(self) -> Loaded | None:
        """Read the files of its certificates again, and give what to `adopt` then; None without TLS.

        Raises ListenError. Nothing is changed, so that of several listeners all can be read before any adopts.
        """
        return finish(self.renewing())

    def renewing(self, files: Files | None = None) -> Steps[Loaded | None]:
        """The same in steps. What is in force for the same bytes is not made again."""
        if self.source is None:
            return None
        try:
            return (yield from self.source.loading(files, self.reusable))
        except TLSError as error:
            raise ListenError(str(error)) from error

    def adopt(self, loaded: Loaded) -> None:
        """Put a context and its certificates in force."""
        loaded.take_effect()
        self.reusable = loaded.reusable
        self.tls = loaded.context
        self.certificates = loaded.certificates
        self.revocation = loaded.revocation
        self.warnings = loaded.warnings

    def tls_files(self) -> tuple[str, ...]:
        """The files that `renew` reads, for `tls.fingerprint`; a directory stands for the certificates in it."""
        return self.source.files() if self.source is not None else ()

    def of_slot(self, slot: int) -> Socket:
        """The socket on which the process of this slot accepts."""
        return self.copies[slot] if self.copies else self.socket

    def add_copy(self) -> None:
        """Take one of the spares, or make a socket, for one more slot. Raises ListenError."""
        if not self.copies:
            return
        if self.spares:
            sock = self.spares.pop()
        else:
            host, port, *rest = self.socket.getsockname()
            scope = rest[1] if rest else 0
            try:
                sock = _bind_tcp(self.socket.family, host, scope, port, reuse_port=True)
            except OSError as error:
                # Sockets of one port are one user's (SO_REUSEPORT of socket(7)), and a low port takes privileges.
                if os.fstat(self.socket.fileno()).st_uid != os.geteuid():
                    raise ListenError(
                        f"{self.name} has no reserve socket left: {_SPARES} more than at the start were bound before "
                        "privileges were dropped; start with more --workers"
                    ) from error
                raise _cannot_listen(self.socket.family, host, port, error) from error
        try:
            _listen(sock, self._backlog)
        except ListenError:
            sock.close()
            raise
        self.copies.append(sock)

    def spread(self, slots: Sequence[int]) -> None:
        """Have new connections go to the sockets of these slots alone, at random; what is queued stays where it is."""
        if self.copies:
            _spread_among(self.socket, slots)

    def drop_last(self) -> None:
        """Have the socket of the last slot listen no more; it is a spare then. Who is in its queue is reset."""
        if self.copies:
            sock = self.copies.pop()
            try:
                sock.shutdown(socket.SHUT_RDWR)  # on Linux it stays bound: privileges to bind another may be gone
            except OSError:
                sock.close()
            else:
                self.spares.append(sock)

    @property
    def file(self) -> tuple[str, int] | None:
        """Path and inode of the file that `remove_file` would remove."""
        return None if self._file is None else (self._file.path, self._file.inode)

    def remove_file(self) -> None:
        """Remove the file of a UNIX socket, if it has one of ours, so that nobody new finds it; raises OSError."""
        file, self._file = self._file, None
        if file is not None:
            file.remove()

    def close(self) -> None:
        """Close the socket and remove its file; raises OSError when the file cannot be removed."""
        _close_all([self.socket, *self.copies, *self.spares])
        self.remove_file()


# --- descriptions ---


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


def _number(what: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ListenError(f"{what} {text!r} is not a whole number from {low} to {high}")
    return int(text)


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
                listener.read = read
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
        backlog = _number("backlog", given.get("backlog", str(backlog)), 1, 65535)
    tls = _tls(given, resolve_path) if secure else None
    if kind == "systemd":
        _check_choice(given)
        return Wanted(
            partial(_adopt_systemd, given),
            partial(_check_systemd, given),
            partial(_systemd_places, given),
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
            partial(_open_unix, path, int(mode, 8), backlog),
            partial(_check_unix, path),
            partial(_unix_places, path),
            tls,
            proxied,
        )
    if not given.get("port"):
        raise ListenError(f"the port is missing: {kind}:8080")
    port = _number("port", given["port"], 0, 65535)
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


def _load(files: ServerTLS | DirectoryTLS | None) -> Loaded | None:
    try:
        return files.load() if files is not None else None
    except TLSError as error:
        raise ListenError(str(error)) from error


# --- TCP ---

_Address = tuple[socket.AddressFamily, str, int]  # family, host, IPv6 scope


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
    def addresses() -> list[_Address]:
        if interface:
            return _resolve(interface, port, families[0] if len(families) == 1 else socket.AF_UNSPEC)
        return [(family, "::" if family == socket.AF_INET6 else "0.0.0.0", 0) for family in families]

    def places(look_up: bool) -> list[Place]:
        if interface and not look_up and not _is_local(interface):
            six = (family == socket.AF_INET6 for family in families)
            shown = address_name(interface, port)
            return [TCPPlace(each, interface.lower(), port, shown=shown) for each in six]
        return [_tcp_place(family, host, port, scope) for family, host, scope in addresses()]

    return Wanted(
        lambda: _open_tcp(addresses(), port, backlog, slots, interface),
        lambda: _check_tcp(addresses(), port, interface),
        places,
        tls,
        proxied,
    )


def _is_local(interface: str) -> bool:
    """Whether no name server is asked for this host: an address, or `localhost` (RFC 6761, section 6.3)."""
    if interface.lower().removesuffix(".") in ("localhost", "*"):
        return True
    try:
        socket.getaddrinfo(interface, 0, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def _tcp_place(family: int, host: str, port: int, scope: int) -> TCPPlace:
    six = family == socket.AF_INET6
    return TCPPlace(six, host, port, scope, address_name(host, port, _zone(scope)))


def _zone(scope: int) -> str:
    """The name of a network interface, or its number if it has none any more; empty for 0."""
    try:
        return socket.if_indextoname(scope) if scope else ""
    except OSError:
        return str(scope)


def _resolve(interface: str, port: int, family: int) -> list[_Address]:
    try:
        found = socket.getaddrinfo(interface, port, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ListenError(f"cannot resolve the interface {interface!r}: {_lower(reason)}") from error
    addresses: list[_Address] = []
    for kind, _, _, _, address in found:
        entry = (kind, str(address[0]), int(address[3]) if len(address) == 4 else 0)
        if entry not in addresses:
            addresses.append(entry)
    # IPv4 first, so that a port of 0 is picked where most hosts have the more sockets.
    return sorted(addresses, key=lambda entry: entry[0] == socket.AF_INET6)


def _open_tcp(addresses: list[_Address], port: int, backlog: int, slots: int, interface: str) -> list[Listener]:
    """One socket for each address, all on one port; IPv6 may be missing as `_may_be_missing` says."""
    for attempt in range(_SAME_PORT_TRIES):
        sockets: list[socket.socket] = []
        number = port
        try:
            for family, host, scope in addresses:
                try:
                    sockets.append(_bind_tcp(family, host, scope, number))
                except OSError as error:
                    if sockets and _may_be_missing(error, family, host, interface):
                        continue
                    taken_by_other_family = error.errno == errno.EADDRINUSE and port == 0 and sockets
                    if taken_by_other_family and attempt < _SAME_PORT_TRIES - 1:
                        break
                    raise _cannot_listen(family, host, number, error, interface) from error
                number = sockets[0].getsockname()[1]
            else:
                if slots:
                    return [_with_copies(sock, backlog, slots) for sock in sockets]
                for sock in sockets:
                    _listen(sock, backlog)
                return [Listener(sock, _tcp_name(sock)) for sock in sockets]
        except BaseException:
            _close_all(sockets)
            raise
        _close_all(sockets)
    raise AssertionError("the last attempt returns or raises")


def _check_tcp(addresses: list[_Address], port: int, interface: str) -> None:
    """Ask whether the addresses are this host's, of UDP, so that no TCP port is taken or found to be."""
    found = False
    for family, host, scope in addresses:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind((host, 0, 0, scope) if family == socket.AF_INET6 else (host, 0))
        except OSError as error:
            if found and _may_be_missing(error, family, host, interface):
                continue
            raise _cannot_listen(family, host, port, error, interface) from error
        found = True


def _may_be_missing(error: OSError, family: socket.AddressFamily, host: str, interface: str) -> bool:
    """Whether the address of IPv6 is left out, where another address of the same listener was bound.

    Without an interface it is, on a host without IPv6. An address of a host name is what clients are told to connect
    to: one that this host does not have, or not yet, is an error, after which a service manager tries again. Where the
    host has no IPv6 at all, nobody can: `localhost` is `::1` too in the hosts file of most containers. That is logged.
    """
    if family != socket.AF_INET6 or error.errno not in _NO_IPV6:
        return False
    if not interface:
        return True
    if _has_ipv6():
        return False
    _log.warn("{interface}: its address {host} is not served: this host has no IPv6", interface=interface, host=host)
    return True


def _has_ipv6() -> bool:
    """Whether this host has IPv6: its loopback address, without which there is no other (RFC 4291, section 2.8)."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _cannot_listen(
    family: socket.AddressFamily, host: str, port: int, error: OSError, interface: str = ""
) -> ListenError:
    of = ""
    if error.errno == errno.EADDRNOTAVAIL and interface not in ("", host):
        of = f"; {interface!r} stands for it, and every address of a host name is served, or none"
    return ListenError(f"cannot listen on {address_name(host, port)}: {_reason(error)}{of}")


def _with_copies(found: socket.socket, backlog: int, slots: int) -> Listener:
    """A listener with a socket for each slot, and spares, on the address of a socket that was bound to it alone.

    That one is closed: what may be shared would also have been had where another service listens that shares.
    """
    host, port, *rest = found.getsockname()
    scope = rest[1] if rest else 0
    found.close()
    sockets: list[socket.socket] = []
    try:
        for _ in range(slots + _SPARES):
            sockets.append(_bind_tcp(found.family, host, scope, port, reuse_port=True))
        for sock in sockets[:slots]:
            _listen(sock, backlog)
    except BaseException as error:
        _close_all(sockets)
        if isinstance(error, OSError):
            raise _cannot_listen(found.family, host, port, error) from error
        raise
    return Listener(sockets[0], _tcp_name(sockets[0]), copies=sockets[:slots], spares=sockets[slots:], _backlog=backlog)


def _spread_among(sock: socket.socket, places: Sequence[int]) -> None:
    """Have the kernel choose among these sockets of a port, at random, for each new connection.

    They are numbered in the order in which they began to listen (SO_ATTACH_REUSEPORT_CBPF of socket(7)).
    """
    program = [_LOAD_RANDOM, (_MODULO, 0, 0, len(places))]
    for number, place in enumerate(places):
        program += [(_SKIP_UNLESS, 0, 1, number), (_RETURN, 0, 0, place)]
    program += [(_RETURN, 0, 0, places[0])]  # never reached, but the kernel wants an end
    code = array("B", b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    address, _ = code.buffer_info()
    with suppress(OSError):  # not Linux
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("HP", len(program), address))


_SO_ATTACH_REUSEPORT_CBPF = 51  # asm-generic/socket.h

# linux/filter.h: ld random (SKF_AD_OFF + SKF_AD_RANDOM); mod; jeq #number, go on, else skip one; ret #number.
_LOAD_RANDOM, _MODULO, _SKIP_UNLESS, _RETURN = (0x20, 0, 0, 0xFFFFF000 + 56), 0x94, 0x15, 0x06

# Slots that can be added after privileges were dropped, on any port. Each is a descriptor for each listener.
_SPARES = 8


def _bind_tcp(
    family: socket.AddressFamily, host: str, scope: int, port: int, *, reuse_port: bool = False
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of a predecessor may be in TIME_WAIT; without this they would keep its port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port, 0, scope))
        else:
            sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


def _listen(sock: socket.socket, backlog: int) -> None:
    try:
        sock.listen(backlog)
    except OSError as error:  # two processes can both bind a port with SO_REUSEADDR; only one of them may listen
        raise ListenError(f"cannot listen on {_tcp_name(sock)}: {_reason(error)}") from error


def _tcp_name(sock: socket.socket) -> str:
    host, port, *rest = sock.getsockname()
    return tcp_name(host, port, _zone(rest[1] if rest else 0))


# --- UNIX ---

# unix(7): sun_path is 108 bytes, of which the last is a NUL.
_LONGEST_PATH = 107


def _open_unix(path: str, mode: int, backlog: int) -> list[Listener]:
    folder = _open_folder(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Two services that start at once may both find a stale file: one after the other.
        with _locked(folder, path):
            _remove_stale(path)
            # The file has its mode from its first moment; a chmod would come after a client could have connected.
            umask = os.umask(0o7777 & ~mode)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
            file = _SocketFile(folder, os.path.basename(path), os.stat(path).st_ino, path)
            sock.listen(backlog)
    except BaseException as error:
        sock.close()
        os.close(folder)
        if isinstance(error, OSError):
            raise ListenError(f"cannot listen on {path!r}: {_reason(error)}") from error
        raise
    return [Listener(sock, unix_name(path), _file=file)]


def _unix_places(path: str, look_up: bool = True) -> list[Place]:
    directory, name = os.path.split(path)
    try:
        found = os.stat(directory)
    except OSError:  # opening it says why
        return [FilePlace(os.path.normpath(directory), name, unix_name(path))]
    return [FilePlace((found.st_dev, found.st_ino), name, unix_name(path))]


def _check_unix(path: str) -> None:
    """Whether a socket could be made, as far as its directory and what is there already say."""
    os.close(_open_folder(path))
    if not os.access(os.path.dirname(path), os.W_OK | os.X_OK, effective_ids=True):
        raise ListenError(f"cannot listen on {path!r}: its directory is not writable")
    _is_there(path)


def _open_folder(path: str) -> int:
    """A descriptor of the directory of a path that can be a socket's."""
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ListenError(f"cannot listen on {path!r}: the path is longer than {_LONGEST_PATH} bytes")
    directory = os.path.dirname(path)
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListenError(f"cannot open the directory {directory!r}: {_reason(error)}") from error


def _is_there(path: str) -> bool:
    """Whether there is a socket file; raises ListenError when there is another kind of one."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"{path!r} exists and is not a socket")
    except FileNotFoundError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove a socket file on which nobody listens; raises ListenError when somebody does, or it is no socket."""
    if not _is_there(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:  # its queue is full: somebody is very much there
            pass
    raise ListenError(f"{path!r} is in use: another process answers on it")


# A start holds the lock for less than a millisecond. Any user who may open the directory can hold it for ever
# (flock(2) asks for no write permission), so the wait is bounded: seconds in all, and between two attempts.
_LOCK_WAIT, _LOCK_RETRY = 5.0, 0.02


@contextmanager
def _locked(folder: int, path: str) -> Iterator[None]:
    """Hold the lock of the directory of the socket `path`; raises ListenError when another process keeps it."""
    deadline = time.monotonic() + _LOCK_WAIT
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ListenError(
                    f"cannot listen on {path!r}: another process has locked its directory for {_LOCK_WAIT:g} s; "
                    "lslocks(8) shows which, and a directory that only this user can open prevents it"
                ) from None
            time.sleep(_LOCK_RETRY)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


# --- systemd ---


def _adopt_systemd(given: Mapping[str, str]) -> list[Listener]:
    """The sockets that the service manager passed: `systemd:domain=INET6:index=0`, `systemd:name=web`, or all of them.

    The domain is Twisted's and may be left out, since the socket knows it; a name may stand for several sockets.
    """
    passed = _systemd_sockets()
    if not passed:
        raise ListenError("no sockets were passed by a service manager (LISTEN_FDS, LISTEN_PID)")
    return [_adopt(sock) for sock in _chosen(given, passed)]


def _check_systemd(given: Mapping[str, str]) -> None:
    if passed := _systemd_sockets():
        _close_all(_chosen(given, passed))


def _systemd_places(given: Mapping[str, str], look_up: bool = True) -> list[Place]:
    """Those of the sockets that were passed; none where there are none."""
    places: list[Place] = []
    passed = _systemd_sockets()
    for sock in _chosen(given, passed) if passed else ():
        with sock:
            name = _adopted_name(sock)
            where: TCPPlace | FilePlace | None = None
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                host, port, *rest = sock.getsockname()
                where = _tcp_place(sock.family, host, port, rest[1] if rest else 0)
            elif name.startswith("unix:/"):
                (where,) = _unix_places(os.fsdecode(sock.getsockname()))  # type: ignore[assignment]  # a file's
            places.append(PassedPlace(os.fstat(sock.fileno()).st_ino, where, name.removeprefix("tcp:")))
    return places


def _check_choice(given: Mapping[str, str]) -> None:
    if "index" in given:
        if "name" in given:
            raise ListenError("only one of index= and name= can be given; without both it is every socket")
        _number("index", given["index"], 0, 65535)


def _chosen(given: Mapping[str, str], passed: list[tuple[int, str]]) -> list[socket.socket]:
    """Duplicates: the descriptors stay whose they are, and may be taken again."""
    if "index" in given:
        index = int(given["index"])
        if index >= len(passed):
            count = f"{counted(len(passed), 'socket')} {'was' if len(passed) == 1 else 'were'}"
            raise ListenError(f"index {index} is not there: {count} passed")
        numbers = [passed[index][0]]
    elif "name" in given:
        numbers = [fd for fd, name in passed if name == given["name"]]
        if not numbers:
            names = ", ".join(sorted({name for _, name in passed}))
            raise ListenError(f"no socket named {given['name']!r} was passed; there are: {names}")
    else:
        numbers = [fd for fd, _ in passed]
    sockets: list[socket.socket] = []
    try:
        for fd in numbers:
            # Above all that were passed: one of those may be closed, and would be this then.
            sockets.append(_duplicate(fd, passed[-1][0] + 1, given.get("domain")))
    except ListenError:
        _close_all(sockets)
        raise
    return sockets


def _systemd_sockets() -> list[tuple[int, str]]:
    """Descriptors and names, as sd_listen_fds_with_names(3) gives them; raises ListenError."""
    environment = _initial_environment()
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", ""))
    except ValueError:
        return []
    if count > os.sysconf("SC_OPEN_MAX") >= 0:
        raise ListenError(f"LISTEN_FDS is {count}, which is more than a process can have")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += ["unknown"] * (count - len(names))
    return [(_LISTEN_FDS_START + i, names[i] or "unknown") for i in range(count)]


def _initial_environment() -> Mapping[str, str]:
    """The environment that this process was started with.

    `os.environ` is not it: when Twisted's endpoints are imported, which happens before us or not depending on a
    cache, they delete LISTEN_PID and LISTEN_FDS.
    """
    entries: list[bytes] | None
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:  # no /proc
        entries = _initial_environment_in_memory()
    if entries is None:
        return os.environ
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in (entry.partition(b"=") for entry in entries)}


_AT_EXECFN = 31  # linux/auxvec.h

# ARG_MAX is a quarter of the stack's limit, and 6 MiB at the most (execve(2)).
_LONGEST_ARGUMENTS = 6 * 1024 * 1024


def _initial_environment_in_memory() -> list[bytes] | None:
    """What /proc/self/environ shows, from where the kernel has put it; None where it is not to be found.

    execve(2) lays out the strings of the arguments, those of the environment, and the program's name, one after the
    other. What is deleted from an environment later stays there; only the list of pointers changes.
    """
    try:
        process = ctypes.CDLL(None)
        begin = ctypes.c_void_p.in_dll(process, "program_invocation_name").value or 0  # the first argument
        process.getauxval.restype, process.getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        end = process.getauxval(_AT_EXECFN)
    except (OSError, ValueError, AttributeError):  # a C library without these
        return None
    if not 0 < end - begin <= _LONGEST_ARGUMENTS:
        return None
    return ctypes.string_at(begin, end - begin).split(b"\0")[len(sys.orig_argv) :]


def _duplicate(fd: int, least: int, domain: str | None) -> socket.socket:
    """A duplicate with a number of `least` or more; raises ListenError."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        sock = socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)) if is_socket else None
    except OSError as error:
        raise ListenError(f"descriptor {fd} cannot be used: {_reason(error)}") from error
    if sock is None:
        raise ListenError(f"descriptor {fd} is not a socket")
    problem = _unfit(sock, domain)
    if problem:
        sock.close()
        raise ListenError(f"descriptor {fd} {problem}")
    return sock


# What is served; else, a peer would have no address that limits, PROXY rules, records and Twisted's protocols take.
_FAMILIES = {socket.AF_INET: "INET", socket.AF_INET6: "INET6", socket.AF_UNIX: "UNIX"}

# Of IPv4 and IPv6. SCTP, for one, has no half-close (RFC 6458, section 4.1.7). Python 3.11 does not name MPTCP.
_PROTOCOLS = (socket.IPPROTO_TCP, 262)


def _unfit(sock: socket.socket, domain: str | None) -> str:
    """Why a socket that was passed cannot be served; empty if it can."""
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is not a listening stream socket"
    if sock.family not in _FAMILIES:
        family = sock.family.name if isinstance(sock.family, socket.AddressFamily) else f"address family {sock.family}"
        return f"is a socket of {family}; what can be served is of AF_INET, AF_INET6 or AF_UNIX"
    if sock.family != socket.AF_UNIX and sock.proto not in _PROTOCOLS:
        return f"is a socket of protocol {sock.proto}, and neither TCP nor MPTCP"
    if domain and domain != _FAMILIES[sock.family]:
        return f"is of domain {_FAMILIES[sock.family]}, not {domain!r}"
    return ""


def _adopt(sock: socket.socket) -> Listener:
    # A manager's socket may be blocking: accept() on it would hang the reactor.
    sock.setblocking(False)
    return Listener(sock, _adopted_name(sock), shared=True)


def _adopted_name(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        # An abstract address begins with a NUL, and may hold any byte; NULs are shown as ss(8) does.
        address = os.fsencode(sock.getsockname()).decode(errors="backslashreplace")
        return f"unix:{address}".replace("\0", "@")
    return _tcp_name(sock)


# --- small things ---


def _close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _lower(text: str | None) -> str:
    return text[:1].lower() + text[1:] if text else "unknown error"


def _reason(error: OSError) -> str:
    return _lower(error.strerror or str(error))  # some of Python's own have no errno
