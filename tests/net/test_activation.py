"""Listening sockets passed by a service manager."""

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rtservice.net import activation
from rtservice.net.listen_types import check_description
from tests.support.ipv6 import needs_ipv6
from tests.support.listeners import FILES, PLAIN, described, handshake, refusal, unix_socket
from tests.support.programs import program


@pytest.fixture
def pass_sockets(monkeypatch):
    """Pass listening sockets as a service manager does, with or without LISTEN_FDNAMES."""
    with contextlib.ExitStack() as stack:

        def pass_all(*sockets: socket.socket, names: str | None = None) -> None:
            start = 300
            for number, sock in enumerate(sockets, start):
                stack.enter_context(sock)
                assert fcntl.fcntl(sock, fcntl.F_DUPFD, number) == number
                stack.callback(os.close, number)
            environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets))}
            if names is not None:
                environment["LISTEN_FDNAMES"] = names
            monkeypatch.setattr(activation, "_LISTEN_FDS_START", start)
            monkeypatch.setattr(activation, "_initial_environment", lambda: environment)

        yield pass_all


def tcp_socket() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def six_socket() -> socket.socket:
    return socket.create_server(("::1", 0), family=socket.AF_INET6)


@needs_ipv6
@pytest.mark.parametrize("names", [None, "", "a:b:c", "a"])
@pytest.mark.parametrize("description", ["systemd:", "systemd"])
def test_all_passed_sockets_are_adopted_with_and_without_names(
    opened, pass_sockets, tmp_path, names, description
) -> None:
    passed = [tcp_socket(), six_socket(), unix_socket(f"{tmp_path}/s")]
    pass_sockets(*passed, names=names)
    found = opened(description)
    assert [listener.name for listener in found] == [
        f"tcp:127.0.0.1:{passed[0].getsockname()[1]}",
        f"tcp:[::1]:{passed[1].getsockname()[1]}",
        f"unix:{tmp_path}/s",
    ]
    assert all(listener.shared and not listener.socket.getblocking() for listener in found)
    for listener in found:
        listener.close()
    assert (tmp_path / "s").exists()
    assert all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in passed)


def test_passed_sockets_are_selected_by_name_or_index(opened, pass_sockets) -> None:
    passed = [tcp_socket(), tcp_socket(), tcp_socket()]
    names = [f"tcp:127.0.0.1:{sock.getsockname()[1]}" for sock in passed]
    pass_sockets(*passed, names="web:other:web")
    for description, chosen in (
        ("systemd:name=web", [names[0], names[2]]),
        ("systemd:INET:index=1", [names[1]]),
        ("systemd:index=1", [names[1]]),
        ("systemd:domain=INET", names),
    ):
        assert [listener.name for listener in opened(description)] == chosen
        check_description(description)


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("systemd:index=1", "index 1 is too high: 1 socket was passed; indexes begin with 0"),
        ("systemd:name=web", "no socket named 'web' was passed; accepted are rt"),
        ("systemd:domain=INET6", "descriptor 300 is of domain INET, not 'INET6'"),
    ],
)
def test_a_missing_passed_socket_is_an_error_that_lists_the_passed_ones(pass_sockets, description, problem) -> None:
    pass_sockets(tcp_socket(), names="rt")
    assert refusal(description) == problem


def test_a_passed_socket_that_does_not_listen_is_rejected_and_the_others_are_closed(pass_sockets) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pass_sockets(tcp_socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    passed = len(os.listdir("/proc/self/fd"))
    assert refusal("systemd:") == "descriptor 301 is not a listening stream socket"
    assert len(os.listdir("/proc/self/fd")) == passed == before + 4


def passed_descriptors() -> dict[str, Callable[[pathlib.Path], Any]]:
    """Factories of descriptors that cannot be served, by kind; each takes a directory."""

    def sequenced(directory: pathlib.Path) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.bind(f"{directory}/q")
        sock.listen()
        return sock

    def bound(directory: pathlib.Path) -> socket.socket:
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        return sock

    def netlink(directory: pathlib.Path) -> socket.socket:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)

    def pipe(directory: pathlib.Path) -> Any:
        os.mkfifo(directory / "p")
        return open(directory / "p", "r+b", buffering=0)

    return {
        "SOCK_SEQPACKET": sequenced,
        "does not listen": bound,
        "connected": lambda directory: socket.socketpair()[0],
        "netlink": netlink,
        "datagrams": lambda directory: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        "pipe": pipe,
        "file": lambda directory: open(directory / "f", "w"),
        "directory": lambda directory: Directory(directory),
    }


class Directory:
    """An open directory."""

    def __init__(self, path: pathlib.Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


@pytest.mark.parametrize("kind", passed_descriptors())
def test_an_unusable_passed_descriptor_is_rejected_with_its_number(pass_sockets, tmp_path, kind) -> None:
    pass_sockets(tcp_socket(), passed_descriptors()[kind](tmp_path))
    expected = "is not a socket" if kind in ("pipe", "file", "directory") else "is not a listening stream socket"
    assert refusal("systemd:") == f"descriptor 301 {expected}"


def test_a_closed_descriptor_is_rejected(pass_sockets) -> None:
    pass_sockets(tcp_socket())
    activation._initial_environment()["LISTEN_FDS"] = "2"  # type: ignore[index]  # replaced by the fixture
    assert refusal("systemd:") == "descriptor 301 cannot be used: bad file descriptor"


def test_an_impossible_number_of_descriptors_is_rejected_cheaply(pass_sockets) -> None:
    pass_sockets(tcp_socket())
    activation._initial_environment()["LISTEN_FDS"] = "9" * 18  # type: ignore[index]  # replaced by the fixture
    assert refusal("systemd:") == f"LISTEN_FDS is {'9' * 18}, which is more than the descriptor limit of a process"


@pytest.mark.parametrize(
    ("family", "proto", "problem"),
    [
        (
            socket.AddressFamily.AF_VSOCK,
            0,
            "a socket of AF_VSOCK; accepted are AF_INET, AF_INET6 and AF_UNIX",
        ),
        (socket.AddressFamily.AF_TIPC, 0, "a socket of AF_TIPC; accepted are AF_INET, AF_INET6 and AF_UNIX"),
        # AF_SMC, which has no name in Python.
        (43, 0, "a socket of address family 43; accepted are AF_INET, AF_INET6 and AF_UNIX"),
        (socket.AF_INET, 132, "a socket of protocol 132; accepted are TCP and MPTCP"),  # IPPROTO_SCTP
        (socket.AF_INET6, 256, "a socket of protocol 256; accepted are TCP and MPTCP"),  # IPPROTO_SMC
    ],
)
def test_a_listening_socket_of_an_unsupported_family_or_protocol_is_rejected(family, proto, problem) -> None:
    sock: Any = SimpleNamespace(family=family, type=socket.SOCK_STREAM, proto=proto, getsockopt=lambda level, option: 1)
    for domain in (None, "VSOCK"):
        assert activation._unfit(sock, domain) == f"is {problem}"


def test_a_multipath_tcp_socket_is_served(opened, pass_sockets) -> None:
    try:
        multipath = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP, which Python 3.11 lacks
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    multipath.bind(("127.0.0.1", 0))
    multipath.listen()
    pass_sockets(multipath)
    assert [listener.name for listener in opened("systemd:domain=INET")] == [
        f"tcp:127.0.0.1:{multipath.getsockname()[1]}"
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract UNIX addresses are Linux's")
def test_an_abstract_unix_socket_has_a_printable_name(opened, pass_sockets) -> None:
    abstract = f"rtservice-{os.getpid()}"
    pass_sockets(unix_socket(f"\0{abstract}"), unix_socket(f"\0{abstract}\0\xff".encode("latin-1")))
    assert [listener.name for listener in opened("systemd:")] == [f"unix:@{abstract}", f"unix:@{abstract}@\\xff"]


def test_ssl_and_proxy_prefixes_apply_to_passed_sockets(opened, pass_sockets, certificates) -> None:
    passed = [tcp_socket(), tcp_socket()]
    ports = [sock.getsockname()[1] for sock in passed]
    pass_sockets(*passed, names="plain:web")
    (secure,) = opened(described(certificates, f"ssl:systemd:name=web:{FILES}:alpn=echo"))
    assert (secure.name, secure.shared, secure.proxied) == (f"ssl:127.0.0.1:{ports[1]}", True, False)
    assert handshake(secure, certificates) == {**PLAIN, "alpn": "echo"}
    (plain,) = opened("proxy:systemd:name=plain")
    assert (plain.name, plain.shared, plain.proxied) == (f"proxy:tcp:127.0.0.1:{ports[0]}", True, True)
    both = opened(described(certificates, f"proxy:ssl:systemd:{FILES}"))
    assert [listener.name for listener in both] == [f"proxy:ssl:127.0.0.1:{port}" for port in ports]


def test_a_service_serves_tls_on_passed_sockets(service, certificates) -> None:
    description = described(certificates, f"--listen=ssl:systemd:{FILES}")
    running = service(description, launcher=program("pass_sockets", "", "tcp,tcp"))
    client = ssl.create_default_context(cafile=certificates["ca.pem"])
    for count in (1, 2):
        port = int(
            running.wait_event("listener.listening", count, listener=re.compile("^ssl:127.0.0.1:"))[
                "listener"
            ].rpartition(":")[2]
        )
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
            client.wrap_socket(sock, server_hostname="localhost") as secure,
        ):
            assert secure.recv(100) == b"Hello from the server!"


@pytest.mark.parametrize("arguments", [(), ("",), ("a=b", "", "LISTEN_PID=7")])
@pytest.mark.parametrize("variables", [{"LISTEN_PID": "1", "X": "=", "E": "", "Ä": "\udcff" * 5}, {"LISTEN_PID": "1"}])
def test_the_initial_environment_is_read_without_proc(arguments, variables) -> None:
    subprocess.run(program("initial_environment", *arguments), env=variables, check=True)


def test_the_current_environment_is_used_if_the_c_library_has_no_initial_one(monkeypatch) -> None:
    def missing(name, *how):
        raise OSError(name)

    monkeypatch.setattr(activation, "open", missing, raising=False)
    monkeypatch.setattr(activation.ctypes, "CDLL", missing)
    assert activation._initial_environment() is os.environ
