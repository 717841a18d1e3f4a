"""Adopt sockets that a service manager passed (sd_listen_fds(3))."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Mapping

from rtservice.counted import counted
from rtservice.net.description import ListenError, whole_number
from rtservice.net.listen_conflicts import FilePlace, PassedPlace, Place, TCPPlace
from rtservice.net.listener import Listener
from rtservice.net.sockets import close_all, reason_of, socket_name
from rtservice.net.tcp import tcp_place
from rtservice.net.unix import unix_places

# sd_listen_fds(3): the first descriptor that the service manager passes.
_LISTEN_FDS_START = 3


def adopt_passed(given: Mapping[str, str]) -> list[Listener]:
    """Return listeners on the passed sockets that `index` or `name` selects, or on all of them. Raises ListenError.

    `given` holds the keywords of the listen description, as in `systemd:domain=INET6:index=0` or `systemd:name=web`.
    `domain` is Twisted's keyword. It is optional, since the socket has a family. Several sockets may have one name.
    """
    passed = _systemd_sockets()
    if not passed:
        raise ListenError("no sockets were passed (LISTEN_FDS, LISTEN_PID); start it from a systemd socket unit")
    return [_adopt(sock) for sock in _chosen(given, passed)]


def check_passed(given: Mapping[str, str]) -> None:
    """Check that the selected sockets can be served, if any were passed. Raises ListenError."""
    if passed := _systemd_sockets():
        close_all(_chosen(given, passed))


def passed_places(given: Mapping[str, str], look_up: bool = True) -> list[Place]:
    """Return the places where the selected sockets listen; empty if none were passed. Raises ListenError."""
    places: list[Place] = []
    passed = _systemd_sockets()
    for sock in _chosen(given, passed) if passed else ():
        with sock:
            name = _adopted_name(sock)
            where: TCPPlace | FilePlace | None = None
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                host, port, *rest = sock.getsockname()
                where = tcp_place(sock.family, host, port, rest[1] if rest else 0)
            elif name.startswith("unix:/"):
                (where,) = unix_places(os.fsdecode(sock.getsockname()))  # type: ignore[assignment]  # a file's
            places.append(PassedPlace(os.fstat(sock.fileno()).st_ino, where, name.removeprefix("tcp:")))
    return places


def check_choice(given: Mapping[str, str]) -> None:
    """Check the keywords that select sockets. Raises ListenError."""
    if "index" in given:
        if "name" in given:
            raise ListenError("index= and name= are both given; use one of them, or neither for all passed sockets")
        whole_number("index", given["index"], 0, 65535)


def _chosen(given: Mapping[str, str], passed: list[tuple[int, str]]) -> list[socket.socket]:
    """Return duplicates of the selected sockets. The passed descriptors stay open and can be selected again."""
    if "index" in given:
        index = int(given["index"])
        if index >= len(passed):
            count = f"{counted(len(passed), 'socket')} {'was' if len(passed) == 1 else 'were'}"
            raise ListenError(f"index {index} is too high: {count} passed; indexes begin with 0")
        numbers = [passed[index][0]]
    elif "name" in given:
        numbers = [fd for fd, name in passed if name == given["name"]]
        if not numbers:
            names = ", ".join(sorted({name for _, name in passed}))
            raise ListenError(f"no socket named {given['name']!r} was passed; accepted are {names}")
    else:
        numbers = [fd for fd, _ in passed]
    sockets: list[socket.socket] = []
    try:
        for fd in numbers:
            # Above all passed descriptors: one of those may be closed, and the duplicate would get its number.
            sockets.append(_duplicate(fd, passed[-1][0] + 1, given.get("domain")))
    except ListenError:
        close_all(sockets)
        raise
    return sockets


def _systemd_sockets() -> list[tuple[int, str]]:
    """Return descriptors and names as sd_listen_fds_with_names(3) does. Raises ListenError."""
    environment = _initial_environment()
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(environment.get("LISTEN_FDS", ""))
    except ValueError:
        return []
    if count > os.sysconf("SC_OPEN_MAX") >= 0:
        raise ListenError(f"LISTEN_FDS is {count}, which is more than the descriptor limit of a process")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    names += ["unknown"] * (count - len(names))
    return [(_LISTEN_FDS_START + i, names[i] or "unknown") for i in range(count)]


def _initial_environment() -> Mapping[str, str]:
    """Return the environment with which this process was started.

    `os.environ` may differ: Twisted's endpoints delete LISTEN_PID and LISTEN_FDS when they are imported. Whether that
    happens before this module is imported depends on a cache.
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

# ARG_MAX is a quarter of the stack limit, and at most 6 MiB (execve(2)).
_LONGEST_ARGUMENTS = 6 * 1024 * 1024


def _initial_environment_in_memory() -> list[bytes] | None:
    """Return the content of /proc/self/environ, read from this process's memory; None if it cannot be found.

    execve(2) places the strings of the arguments, those of the environment and the program's name one after the other.
    Deleting a variable later changes only the list of pointers; its string stays in memory.
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
    """Return a socket on a duplicate of `fd` whose number is at least `least`. Raises ListenError."""
    try:
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
        sock = socket.socket(fileno=fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, least)) if is_socket else None
    except OSError as error:
        raise ListenError(f"descriptor {fd} cannot be used: {reason_of(error)}") from error
    if sock is None:
        raise ListenError(f"descriptor {fd} is not a socket")
    problem = _unfit(sock, domain)
    if problem:
        sock.close()
        raise ListenError(f"descriptor {fd} {problem}")
    return sock


# The families that are served. Peers of others have no address that limits, PROXY rules, log records and Twisted's
# protocols accept.
_FAMILIES = {socket.AF_INET: "INET", socket.AF_INET6: "INET6", socket.AF_UNIX: "UNIX"}

# For IPv4 and IPv6: TCP and MPTCP, which Python 3.11 does not name. SCTP has no half-close (RFC 6458, section 4.1.7).
_PROTOCOLS = (socket.IPPROTO_TCP, 262)


def _unfit(sock: socket.socket, domain: str | None) -> str:
    """Return why a passed socket cannot be served, or "" if it can."""
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "is not a listening stream socket"
    if sock.family not in _FAMILIES:
        family = sock.family.name if isinstance(sock.family, socket.AddressFamily) else f"address family {sock.family}"
        return f"is a socket of {family}; accepted are AF_INET, AF_INET6 and AF_UNIX"
    if sock.family != socket.AF_UNIX and sock.proto not in _PROTOCOLS:
        return f"is a socket of protocol {sock.proto}; accepted are TCP and MPTCP"
    if domain and domain != _FAMILIES[sock.family]:
        return f"is of domain {_FAMILIES[sock.family]}, not {domain!r}"
    return ""


def _adopt(sock: socket.socket) -> Listener:
    # The passed socket may be blocking, and accept() on it would block the reactor.
    sock.setblocking(False)
    return Listener(sock, _adopted_name(sock), shared=True)


def _adopted_name(sock: socket.socket) -> str:
    if sock.family == socket.AF_UNIX:
        # An abstract address begins with NUL and may contain any byte. NUL is shown as `@`, as in ss(8).
        address = os.fsencode(sock.getsockname()).decode(errors="backslashreplace")
        return f"unix:{address}".replace("\0", "@")
    return socket_name(sock)
