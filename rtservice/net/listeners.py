"""From a description to bound, listening sockets; nothing is accepted here.

Sockets are made in one place and adopted in another: whoever holds the socket keeps the queue of connections.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import ssl
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

from rtservice.net.tls import Minimum, ServerTLS, TLSError

# sd_listen_fds(3): the first descriptor that the service manager passes.
_LISTEN_FDS_START = 3

# Why a socket cannot be had on a host without IPv6: no such family, or the family with every address disabled.
_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)

# How often the system is asked for one port number that is free on IPv4 and IPv6.
_SAME_PORT_TRIES = 32


class ListenError(Exception):
    """A description cannot become listening sockets; the text says what was found and what to do."""


@dataclass(frozen=True)
class _SocketFile:
    """The file of a UNIX socket that this process made, and has to remove."""

    # Held, and not the path, since the process may change its root, its directory or its user after binding.
    directory: int
    name: str
    inode: int

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

    With `tls`, its connections are to be secured with this.
    """

    socket: socket.socket
    name: str
    tls: ssl.SSLContext | None = None
    _file: _SocketFile | None = field(default=None, repr=False)

    def close(self) -> None:
        """Close the socket and remove its file; raises OSError when the file cannot be removed."""
        self.socket.close()
        if self._file is not None:
            file, self._file = self._file, None
            file.remove()


# --- descriptions: Twisted's endpoint syntax ---


def split_description(description: str) -> tuple[str, list[str], dict[str, str]]:
    r"""The type, the positional arguments and the keywords of a description in Twisted's endpoint syntax.

    Colons separate, the first `=` of a part makes a keyword, and a backslash takes the next character as it is. A bare
    number is a TCP port. Raises ListenError.
    """
    if re.fullmatch(r"[0-9]+", description):
        return "tcp", [description], {}
    positional: list[str] = []
    keywords: dict[str, str] = {}
    for part in re.findall(r"(?:^|:)((?:\\.|[^:\\])*)", description, re.DOTALL):
        match = re.fullmatch(r"((?:\\.|[^=\\])*)(=?)(.*)", part, re.DOTALL)
        assert match is not None  # every part of the shape above has this one
        key, equals, value = match.groups()
        key, value = (re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL) for text in (key, value))
        if equals:
            if key in keywords:
                raise ListenError(f"{key}= is given twice")
            keywords[key] = value
        else:
            positional.append(key)
    if not positional:
        raise ListenError("it does not begin with a type such as tcp: or unix:")
    return positional[0], positional[1:], keywords


def _arguments(
    positional: list[str], keywords: Mapping[str, str], names: tuple[str, ...], also: tuple[str, ...] = ()
) -> dict[str, str]:
    """Bind arguments as Twisted's parsers do: `names` by position or keyword, `also` by keyword alone."""
    if len(positional) > len(names):
        raise ListenError(f"too many parts: {positional[len(names)]!r}")
    bound = dict(zip(names, positional, strict=False))
    for key, value in keywords.items():
        if key not in names + also:
            raise ListenError(f"unknown keyword {key!r}; known are {', '.join(names + also)}")
        if key in bound:
            raise ListenError(f"{key} is given twice")
        bound[key] = value
    return bound


def _number(what: str, text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise ListenError(f"{what} {text!r} is not a whole number from {low} to {high}")
    return int(text)


def open_description(
    description: str, *, backlog: int, resolve_path: Callable[[str], str] = os.path.abspath
) -> list[Listener]:
    """The listening sockets of one description whose type is in `TYPES`.

    `backlog` holds where the description does not say its own. `resolve_path` makes the paths of sockets and
    certificates absolute. Raises ListenError.
    """
    kind, positional, keywords = split_description(description)
    if kind == "systemd":
        return _adopt_systemd(positional, keywords)
    if kind == "unix":
        given = _arguments(positional, keywords, ("address", "mode", "backlog", "lockfile"))
        if not given.get("address"):
            raise ListenError("the path of the socket is missing: unix:/run/rt.sock")
        # Twisted's default; a narrower one is the administrator's to choose.
        mode = given.get("mode", "666")
        if not re.fullmatch(r"[0-7]{3,4}", mode):
            raise ListenError(f"mode {mode!r} is not an octal file mode such as 660")
        backlog = _number("backlog", given.get("backlog", str(backlog)), 1, 65535)
        # Twisted's `lockfile=` is taken and means nothing: the directory is locked while a stale file is replaced.
        return [_open_unix(resolve_path(given["address"]), int(mode, 8), backlog)]
    secure = kind == "ssl"
    given = _arguments(positional, keywords, *(_SSL_ARGUMENTS if secure else _TCP_ARGUMENTS))
    if not given.get("port"):
        raise ListenError(f"the port is missing: {kind}:8080")
    port = _number("port", given["port"], 0, 65535)
    backlog = _number("backlog", given.get("backlog", str(backlog)), 1, 65535)
    interface = given.get("interface", "")
    six = kind == "tcp6" or ":" in interface
    family = socket.AF_INET6 if six else socket.AF_INET
    addresses = _resolve(interface, port, family) if interface else [(family, "::" if six else "0.0.0.0", 0)]
    if not secure:
        return _open_tcp(addresses, port, backlog)
    # Before anything is bound: a file that is wrong is found without a client that waits in a queue.
    context = _tls(given, resolve_path)
    opened = _open_tcp(addresses, port, backlog)
    for listener in opened:
        listener.tls = context
        listener.name = listener.name.replace("tcp:", "ssl:", 1)
    return opened


TYPES = frozenset({"tcp", "tcp6", "ssl", "unix", "systemd"})

# By position or keyword, as Twisted has them; and ours, by keyword alone.
_TCP_ARGUMENTS = (("port", "interface", "backlog"), ())
_SSL_ARGUMENTS = (
    ("port", "privateKey", "certKey", "sslmethod", "interface", "backlog", "extraCertChain", "dhParameters"),
    ("clientCA", "minimum", "alpn"),
)


def _tls(given: Mapping[str, str], resolve_path: Callable[[str], str]) -> ssl.SSLContext:
    """The context of an `ssl:` description; raises ListenError."""
    for keyword, why in (
        ("sslmethod", "minimum=1.2 or minimum=1.3 says which versions of TLS are taken"),
        ("dhParameters", "keys are exchanged on elliptic curves, which need none"),
    ):
        if keyword in given:
            raise ListenError(f"{keyword}= is not known here: {why}")
    minimum: Any = given.get("minimum", "1.2")
    if minimum not in get_args(Minimum):
        raise ListenError(f"minimum {minimum!r} is not one of {', '.join(get_args(Minimum))}")
    alpn = tuple(given["alpn"].split(",")) if "alpn" in given else ()
    if not all(re.fullmatch(r"[!-~]{1,255}", name) for name in alpn):
        raise ListenError(f"alpn {given['alpn']!r} is not a list of protocol names such as h2,http/1.1")
    # Twisted's defaults: one file for both, called server.pem.
    key = given.get("privateKey", "server.pem")
    files = {"private_key": key, "certificate": given.get("certKey", key)}
    files |= {name: given[keyword] for name, keyword in _OTHER_FILES.items() if keyword in given}
    for path in files.values():
        if not path:
            raise ListenError("the name of a file is empty")
    try:
        return ServerTLS(**{n: resolve_path(path) for n, path in files.items()}, minimum=minimum, alpn=alpn).context()
    except TLSError as error:
        raise ListenError(str(error)) from error


_OTHER_FILES = {"chain": "extraCertChain", "client_ca": "clientCA"}

# --- TCP ---

_Address = tuple[socket.AddressFamily, str, int]  # family, host, IPv6 scope


def open_port(port: int, *, interface: str, backlog: int) -> list[Listener]:
    """Listen on `port` of IPv4 and, where the host has it, IPv6; two sockets with one number, also when that is 0.

    Two, since peers of one dual-stack socket would show as `::ffff:192.0.2.1`. `interface` limits this to one
    address, or to those of one host name. Raises ListenError.
    """
    if interface:
        return _open_tcp(_resolve(interface, port, socket.AF_UNSPEC), port, backlog)
    return _open_tcp([(socket.AF_INET, "0.0.0.0", 0), (socket.AF_INET6, "::", 0)], port, backlog)


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


def _open_tcp(addresses: list[_Address], port: int, backlog: int) -> list[Listener]:
    """One socket for each address, all on one port; IPv6 may be missing where there is IPv4."""
    for attempt in range(_SAME_PORT_TRIES):
        sockets: list[socket.socket] = []
        number = port
        try:
            for family, host, scope in addresses:
                try:
                    sockets.append(_bind_tcp(family, host, scope, number))
                except OSError as error:
                    if error.errno in _NO_IPV6 and family == socket.AF_INET6 and sockets:
                        continue
                    taken_by_other_family = error.errno == errno.EADDRINUSE and port == 0 and sockets
                    if taken_by_other_family and attempt < _SAME_PORT_TRIES - 1:
                        break
                    where = f"[{host}]:{number}" if family == socket.AF_INET6 else f"{host}:{number}"
                    raise ListenError(f"cannot listen on {where}: {_reason(error)}") from error
                number = sockets[0].getsockname()[1]
            else:
                for sock in sockets:
                    _listen(sock, backlog)
                return [Listener(sock, _tcp_name(sock)) for sock in sockets]
        except BaseException:
            _close_all(sockets)
            raise
        _close_all(sockets)
    raise AssertionError("the last attempt returns or raises")


def _bind_tcp(family: socket.AddressFamily, host: str, scope: int, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Connections of a predecessor may be in TIME_WAIT; without this they would keep its port for a minute.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    host, port = sock.getsockname()[:2]
    return f"tcp:[{host}]:{port}" if sock.family == socket.AF_INET6 else f"tcp:{host}:{port}"


# --- UNIX ---


def _open_unix(path: str, mode: int, backlog: int) -> Listener:
    directory, name = os.path.split(path)
    try:
        folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ListenError(f"cannot open the directory {directory!r}: {_reason(error)}") from error
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # Two services that start at once may both find a stale file: one after the other.
        with _locked(folder):
            _remove_stale(path)
            # The file has its mode from its first moment; a chmod would come after a client could have connected.
            umask = os.umask(0o7777 & ~mode)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
            file = _SocketFile(folder, name, os.stat(path).st_ino)
            sock.listen(backlog)
    except BaseException as error:
        sock.close()
        os.close(folder)
        if isinstance(error, OSError):
            # bind(2) of a long path has no errno: sun_path of unix(7) holds 107 bytes and a NUL.
            reason = _reason(error) if error.errno else "the path is longer than 107 bytes"
            raise ListenError(f"cannot listen on {path!r}: {reason}") from error
        raise
    return Listener(sock, f"unix:{path}", _file=file)


def _remove_stale(path: str) -> None:
    """Remove a socket file on which nobody listens; raises ListenError when somebody does, or it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(f"{path!r} exists and is not a socket")
    except FileNotFoundError:
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


@contextmanager
def _locked(folder: int) -> Iterator[None]:
    fcntl.flock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


# --- systemd ---


def _adopt_systemd(positional: list[str], keywords: Mapping[str, str]) -> list[Listener]:
    """The sockets that the service manager passed: `systemd:domain=INET6:index=0`, or `systemd:name=web`.

    The domain is Twisted's and may be left out, since the socket knows it; a name may stand for several sockets.
    """
    given = _arguments(positional, keywords, ("domain", "index", "name"))
    passed = _systemd_sockets()
    if ("index" in given) == ("name" in given):
        raise ListenError("exactly one of index= and name= is needed: systemd:index=0, systemd:name=web")
    if not passed:
        raise ListenError("no sockets were passed by a service manager (LISTEN_FDS, LISTEN_PID)")
    if "index" in given:
        index = _number("index", given["index"], 0, 65535)
        if index >= len(passed):
            raise ListenError(f"index {index} is not there: {len(passed)} socket(s) were passed")
        chosen = [passed[index][0]]
    else:
        chosen = [fd for fd, name in passed if name == given["name"]]
        if not chosen:
            names = ", ".join(sorted({name for _, name in passed}))
            raise ListenError(f"no socket named {given['name']!r} was passed; there are: {names}")
    return [_adopt(fd, given.get("domain")) for fd in chosen]


def _systemd_sockets() -> list[tuple[int, str]]:
    """Descriptors and names, as sd_listen_fds_with_names(3) gives them."""
    environment = _initial_environment()
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", ""))
    except ValueError:
        return []
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += ["unknown"] * (count - len(names))
    return [(_LISTEN_FDS_START + i, names[i] or "unknown") for i in range(count)]


def _initial_environment() -> Mapping[str, str]:
    """The environment that this process was started with.

    `os.environ` is not it: when Twisted's endpoints are imported, which happens before us or not depending on a
    cache, they delete the LISTEN_ variables.
    """
    try:
        with open("/proc/self/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:  # not Linux, or no /proc
        return os.environ
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in (entry.partition(b"=") for entry in entries)}


def _adopt(fd: int, domain: str | None) -> Listener:
    try:
        listening = stat.S_ISSOCK(os.fstat(fd).st_mode)
        # A duplicate: the descriptor stays whose it is, and may be adopted again.
        sock = socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LISTEN_FDS_START)) if listening else None
    except OSError as error:
        raise ListenError(f"descriptor {fd} cannot be used: {_reason(error)}") from error
    if sock is None:
        raise ListenError(f"descriptor {fd} is not a socket")
    try:
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ListenError(f"descriptor {fd} is not a listening stream socket")
        if domain is not None and sock.family != getattr(socket, f"AF_{domain}", None):
            raise ListenError(f"descriptor {fd} is of domain {sock.family.name[3:]}, not {domain!r}")
    except ListenError:
        sock.close()
        raise
    # A manager's socket may be blocking: accept() on it would hang the reactor.
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return Listener(sock, f"unix:{os.fsdecode(sock.getsockname())}")
    return Listener(sock, _tcp_name(sock))


# --- small things ---


def _close_all(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def _lower(text: str | None) -> str:
    return text[:1].lower() + text[1:] if text else "unknown error"


def _reason(error: OSError) -> str:
    return _lower(error.strerror)
