"""From listen descriptions to listeners: TCP, PROXY, and checks of every type."""

import errno
import os
import re
import socket
from functools import partial
from typing import Any

import pytest
from twisted.logger import Logger, formatEvent

from rtservice.net import sockets, tcp
from rtservice.net.description import ListenError, parse
from rtservice.net.listen_types import check_description, check_port, open_description, open_port
from tests.support.ipv6 import needs_ipv6
from tests.support.listeners import FILES, described, refusal, unix_socket


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("tcp:", "the port is missing"),
        ("tcp:x", "port 'x' is not a whole number"),
        ("127.0.0.1:http", "port 'http' is not a whole number from 0 to 65535"),
        ("tcp:localhost:http", "port 'http' is not a whole number"),
        ("tcp:70000", "port '70000' is not a whole number from 0 to 65535"),
        ("tcp:1:2.3.4.5:6:7", "too many parts: '7'"),
        ("tcp:1:bogus=2", "unknown keyword 'bogus'"),
        ("tcp:1:port=2", "port is given twice"),
        ("tcp:1:backlog=0", "backlog '0'"),
        ("tcp:0:interface=203.0.113.1", "cannot listen on 203.0.113.1:0"),
        ("tcp:0:interface=no.such.host.invalid", "cannot resolve the interface 'no.such.host.invalid'"),
        ("unix:", "path of the socket is missing"),
        ("unix:/tmp/x:mode=9", "mode '9' is not an octal"),
        ("unix:/no/such/place/x", "cannot open the directory '/no/such/place'"),
        ("systemd:", "no sockets were passed"),
        ("systemd:index=0:name=web", "index= and name= are both given"),
        ("systemd:index=x", "index 'x' is not a whole number"),
        ("systemd:bogus=1", "unknown keyword 'bogus'; accepted are domain, index, name"),
        ("proxy:", "proxy: is before ''; accepted after it are tcp:, tcp6:, ssl:, unix: and systemd:"),
        ("proxy:exotic:1", "proxy: is before 'exotic'; accepted after it are tcp:, tcp6:, ssl:, unix: and systemd:"),
        (
            "haproxy:proxy:tcp:1",
            "haproxy: is before 'proxy'; accepted after it are tcp:, tcp6:, ssl:, unix: and systemd:",
        ),
        ("proxy:tcp:x", "port 'x' is not a whole number"),
        ("proxy:unix:", "path of the socket is missing"),
        (
            "ssl:proxy:tcp:1",
            "ssl: is before 'proxy'; accepted after it are tcp:, tcp6:, unix: and systemd:, and proxy: before it",
        ),
        ("ssl:ssl:1", "ssl: is before 'ssl'; accepted after it are tcp:, tcp6:, unix: and systemd:"),
        ("ssl:exotic:x", "port 'exotic' is not a whole number"),
        (
            "ssl:unix:/tmp/x:bogus=1",
            "unknown keyword 'bogus'; accepted are address, mode, backlog, lockfile, privateKey",
        ),
        ("unix:/tmp/x:privateKey=a", "unknown keyword 'privateKey'"),
        (f"unix:/tmp/{'x' * 103}", "the path is longer than 107 bytes"),
        (f"unix:{__file__}", "exists and is not a socket"),
        ("systemd:index=0", "no sockets were passed"),
    ],
)
def test_an_invalid_description_is_rejected_with_the_problem(description, problem) -> None:
    assert problem in refusal(description)


def test_a_port_in_use_is_named(opened) -> None:
    (first,) = opened("tcp:0:interface=127.0.0.1")
    port = first.socket.getsockname()[1]
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
        open_description(f"tcp:{port}:interface=127.0.0.1", backlog=10)


@needs_ipv6
@pytest.mark.parametrize("interface", ["", "localhost"])
def test_port_zero_selects_the_same_port_for_both_families(interface) -> None:
    listeners = open_port(0, interface=interface, backlog=10)
    try:
        numbers = {listener.socket.getsockname()[1] for listener in listeners}
        families = [listener.socket.family for listener in listeners]
        assert len(numbers) == 1
        assert families[0] == socket.AF_INET
        if not interface:
            assert families == [socket.AF_INET, socket.AF_INET6]
    finally:
        for listener in listeners:
            listener.close()


@pytest.fixture
def both_example(monkeypatch) -> str:
    """A host name that resolves to 127.0.0.1, ::1, and a documentation address (RFC 3849)."""
    addresses = {
        socket.AF_INET: [("127.0.0.1", 0)],
        socket.AF_INET6: [("::1", 0, 0, 0), ("2001:db8::10", 0, 0, 0)],
    }

    def resolve(host: str, port: int, family: int, *how: object, **more: object) -> list:
        kinds = [family] if family else list(addresses)
        return [(kind, socket.SOCK_STREAM, 6, "", address) for kind in kinds for address in addresses[kind]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "both.example"


@needs_ipv6
@pytest.mark.parametrize(
    ("start", "check"),
    [
        (partial(open_port, 0, interface="both.example", backlog=10), partial(check_port, 0, interface="both.example")),
        (
            partial(open_description, "tcp6:0:interface=both.example", backlog=10),
            partial(check_description, "tcp6:0:both.example"),
        ),
    ],
    ids=["port", "tcp6"],
)
@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.usefixtures("both_example")
def test_a_host_name_with_a_non_local_address_is_rejected(start, check, slots) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ListenError) as caught:
        start(slots=slots)
    assert re.fullmatch(
        r"cannot listen on \[2001:db8::10\]:\d+: cannot assign requested address; "
        "'both.example' resolves to it, and each address of a host name must be local",
        str(caught.value),
    )
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(
        ListenError, match=r"cannot listen on \[2001:db8::10\]:0: cannot assign requested address; 'both"
    ):
        check()


@needs_ipv6
def test_tcp_uses_the_ipv4_addresses_of_a_host_name(both_example, opened) -> None:
    (listener,) = opened(f"tcp:0:interface={both_example}")
    assert listener.name.startswith("tcp:127.0.0.1:")
    check_description(f"tcp:0:interface={both_example}")


@pytest.mark.parametrize("slots", [0, 2])
def test_a_host_name_on_a_host_without_ipv6_is_served_on_ipv4_with_a_warning(both_example, monkeypatch, slots) -> None:
    events: list = []
    monkeypatch.setattr(tcp, "_log", Logger(observer=events.append))
    refuse_ipv6(monkeypatch, errno.EADDRNOTAVAIL)
    (listener,) = open_port(0, interface=both_example, backlog=10, slots=slots)
    listener.close()
    assert listener.name.startswith("tcp:127.0.0.1:")
    assert [(event["log_level"].name, formatEvent(event)) for event in events] == [
        ("warn", f"address {address} of both.example skipped: this host has no IPv6")
        for address in ("::1", "2001:db8::10")
    ]
    check_port(0, interface=both_example)
    with pytest.raises(ListenError, match=r"cannot listen on \[::1\]:0"):  # no other address remains
        open_description(f"tcp6:0:interface={both_example}", backlog=10, slots=slots)


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_the_wildcard_is_ipv4_only_without_a_warning_on_a_host_without_ipv6(monkeypatch, number) -> None:
    events: list = []
    monkeypatch.setattr(tcp, "_log", Logger(observer=events.append))
    refuse_ipv6(monkeypatch, number)
    (listener,) = open_port(0, interface="", backlog=10)
    listener.close()
    assert events == []


def refuse_ipv6(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the creation of IPv6 sockets fail with this errno."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *how: Any, **more: Any) -> None:
            if family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().__init__(family, *how, **more)

    monkeypatch.setattr(socket, "socket", Socket)


@needs_ipv6
def test_tcp_and_tcp6_share_a_port(opened) -> None:
    (four,) = opened("tcp:0")
    port = four.socket.getsockname()[1]
    (six,) = opened(f"tcp6:{port}")
    assert (four.name, six.name) == (f"tcp:0.0.0.0:{port}", f"tcp:[::]:{port}")


def test_a_link_local_address_is_named_with_its_zone() -> None:
    """Without the zone, the address is ambiguous: it may be on any network interface."""
    number, zone = socket.if_nameindex()[0]

    class Bound:
        def getsockname(self):
            return ("fe80::1", 8080, 0, number)

    assert sockets.socket_name(Bound()) == f"tcp:[fe80::1%{zone}]:8080"


def test_listening_sockets_are_non_blocking(opened) -> None:
    (listener,) = opened("tcp:0:interface=127.0.0.1")
    assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert not listener.socket.getblocking()
    assert not os.get_inheritable(listener.socket.fileno())


# --- proxy: ---


@pytest.mark.parametrize("prefix", ["proxy", "haproxy", r"pro\xy"])
@pytest.mark.parametrize(
    ("description", "name"),
    [
        ("0", "tcp:0.0.0.0:"),
        ("tcp:0:interface=127.0.0.1", "tcp:127.0.0.1:"),
        pytest.param(r"tcp6:0:interface=\:\:1", "tcp:[::1]:", marks=needs_ipv6),
        (f"ssl:0:{FILES}:interface=127.0.0.1", "ssl:127.0.0.1:"),
        ("unix:{directory}/s:mode=600", "unix:{directory}/s"),
        (r"unix:address={directory}/a\:b\=c", r"unix:{directory}/a\:b\=c"),
        (f"ssl:unix:{{directory}}/s:{FILES}", "ssl:unix:{directory}/s"),
    ],
)
def test_the_proxy_prefix_applies_to_every_type(opened, certificates, tmp_path, prefix, description, name) -> None:
    text = described(certificates, description).replace("{directory}", str(tmp_path))
    assert parse(f"{prefix}:{text}").ours
    (listener,) = opened(f"{prefix}:{text}")
    assert listener.name.startswith(f"proxy:{name.replace('{directory}', str(tmp_path))}")
    assert listener.proxied
    assert (listener.tls is not None) == ("ssl:" in description)
    check_description(f"{prefix}:{text}")


def test_a_listener_without_the_prefix_is_neither_proxied_nor_shared(opened) -> None:
    (listener,) = opened("tcp:0:interface=127.0.0.1")
    assert not listener.proxied
    assert not listener.shared
    assert listener.renew() is None
    assert listener.tls_files() == ()


# --- checks ---


def test_a_check_binds_no_port_and_creates_no_file(tmp_path, certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, unix_socket(f"{tmp_path}/live"):
        port = taken.getsockname()[1]
        check_port(port, interface="127.0.0.1")
        check_description(f"tcp:{port}:interface=127.0.0.1")
        check_description(described(certificates, f"ssl:{port}:{FILES}:interface=127.0.0.1"))
        # A check usually runs beside a running service.
        check_description(f"unix:{tmp_path}/live")
        check_description(f"unix:{tmp_path}/new")
    assert sorted(os.listdir(tmp_path)) == ["live"]


@pytest.mark.parametrize(
    "interface",
    ["", "127.0.0.1", pytest.param("::1", marks=needs_ipv6), pytest.param("[::1]", marks=needs_ipv6), "*", "localhost"],
)
def test_a_local_address_passes_its_check(interface) -> None:
    check_port(0, interface=interface)
    for listener in open_port(0, interface=interface, backlog=1):
        listener.close()


@pytest.mark.parametrize(
    ("interface", "problem"),
    [
        ("203.0.113.1", "cannot listen on 203.0.113.1:7: cannot assign requested address"),
        ("no.such.host.invalid", "cannot resolve the interface 'no.such.host.invalid': "),
    ],
)
def test_a_non_local_address_fails_its_check(interface, problem) -> None:
    with pytest.raises(ListenError) as caught:
        check_port(7, interface=interface)
    assert str(caught.value).startswith(problem)


def test_an_unwritable_socket_directory_fails_the_check(tmp_path) -> None:
    tmp_path.chmod(0o755)
    root = os.geteuid() == 0
    if root:  # root may write anywhere
        os.seteuid(65534)
    else:
        tmp_path.chmod(0o555)
    try:
        with pytest.raises(ListenError) as caught:
            check_description("unix:s", resolve_path=lambda path: f"/usr/{path}" if root else f"{tmp_path}/{path}")
    finally:
        if root:
            os.seteuid(0)
        tmp_path.chmod(0o755)
    assert str(caught.value).endswith("s': its directory is not writable")


@needs_ipv6
@pytest.mark.parametrize("host", ["::ffff:127.0.0.1", "::ffff:0.0.0.0", "::ffff:7f00:1"])
def test_a_check_rejects_ipv4_mapped_addresses_as_binding_does(host: str) -> None:
    """Peers would appear with IPv4-mapped addresses, which limits and PROXY rules do not match."""
    for find in (check_description, partial(open_description, backlog=1)):
        with pytest.raises(ListenError, match=r"cannot listen on \[::ffff:.*\]:0: invalid argument"):
            find(f"tcp6:[{host}]:0")
