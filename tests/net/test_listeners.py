"""From a description to sockets."""

import contextlib
import errno
import fcntl
import os
import pathlib
import re
import shutil
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from twisted.logger import Logger, formatEvent

from rtservice.net import activation, sockets, tcp, unix
from rtservice.net.description import ListenError, parse
from rtservice.net.listener import Listener
from rtservice.net.listeners import check_description, check_port, open_description, open_port
from tests.support.ipv6 import needs_ipv6


@pytest.fixture
def opened():
    """Opens descriptions, and closes what it opened."""
    listeners: list[Listener] = []

    def open_all(description: str) -> list[Listener]:
        found = open_description(description, backlog=10)
        listeners.extend(found)
        return found

    yield open_all
    for listener in listeners:
        listener.close()


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
        ("systemd:index=0:name=web", "only one of index= and name="),
        ("systemd:index=x", "index 'x' is not a whole number"),
        ("systemd:bogus=1", "unknown keyword 'bogus'; known are domain, index, name"),
        ("proxy:", "proxy: goes before tcp:, tcp6:, ssl:, unix: and systemd:, not before ''"),
        ("proxy:exotic:1", "proxy: goes before tcp:, tcp6:, ssl:, unix: and systemd:, not before 'exotic'"),
        ("haproxy:proxy:tcp:1", "haproxy: goes before tcp:, tcp6:, ssl:, unix: and systemd:, not before 'proxy'"),
        ("proxy:tcp:x", "port 'x' is not a whole number"),
        ("proxy:unix:", "path of the socket is missing"),
        ("ssl:proxy:tcp:1", "ssl: goes before tcp:, tcp6:, unix: and systemd:, not before 'proxy'; proxy:ssl: is"),
        ("ssl:ssl:1", "ssl: goes before tcp:, tcp6:, unix: and systemd:, not before 'ssl'"),
        ("ssl:exotic:x", "port 'exotic' is not a whole number"),
        ("ssl:unix:/tmp/x:bogus=1", "unknown keyword 'bogus'; known are address, mode, backlog, lockfile, privateKey"),
        ("unix:/tmp/x:privateKey=a", "unknown keyword 'privateKey'"),
        (f"unix:/tmp/{'x' * 103}", "the path is longer than 107 bytes"),
        (f"unix:{__file__}", "exists and is not a socket"),
        ("systemd:index=0", "no sockets were passed"),
    ],
)
def test_a_bad_description_is_refused_with_what_was_found(description, problem) -> None:
    assert problem in refusal(description)


def refusal(description: str) -> str:
    """The one line with which a description is refused; by a check as well, but for what only listening finds."""
    with pytest.raises(ListenError) as caught:
        open_description(description, backlog=10)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    if "no sockets were passed" in line:
        check_description(description)
    else:
        with pytest.raises(ListenError) as checked:
            check_description(description)
        assert str(checked.value) == line
    return line


def test_a_port_that_is_taken_is_named(opened) -> None:
    (first,) = opened("tcp:0:interface=127.0.0.1")
    port = first.socket.getsockname()[1]
    with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
        open_description(f"tcp:{port}:interface=127.0.0.1", backlog=10)


@needs_ipv6
@pytest.mark.parametrize("interface", ["", "localhost"])
def test_port_zero_is_one_number_on_both_families(interface) -> None:
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
    """A host name of 127.0.0.1, ::1, and an address of IPv6 that no host has (RFC 3849)."""
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
def test_a_host_name_of_which_one_address_is_missing_is_refused(start, check, slots) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ListenError) as caught:
        start(slots=slots)
    assert re.fullmatch(
        r"cannot listen on \[2001:db8::10\]:\d+: cannot assign requested address; "
        "'both.example' stands for it, and every address of a host name is served, or none",
        str(caught.value),
    )
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(
        ListenError, match=r"cannot listen on \[2001:db8::10\]:0: cannot assign requested address; 'both"
    ):
        check()


@needs_ipv6
def test_tcp_takes_of_a_host_name_what_is_ipv4(both_example, opened) -> None:
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
        ("warn", f"both.example: its address {address} is not served: this host has no IPv6")
        for address in ("::1", "2001:db8::10")
    ]
    check_port(0, interface=both_example)
    with pytest.raises(ListenError, match=r"cannot listen on \[::1\]:0"):  # there is nothing else to serve on
        open_description(f"tcp6:0:interface={both_example}", backlog=10, slots=slots)


@pytest.mark.parametrize("number", [errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT])
def test_all_addresses_are_those_of_ipv4_on_a_host_without_ipv6_and_nothing_is_said(monkeypatch, number) -> None:
    events: list = []
    monkeypatch.setattr(tcp, "_log", Logger(observer=events.append))
    refuse_ipv6(monkeypatch, number)
    (listener,) = open_port(0, interface="", backlog=10)
    listener.close()
    assert events == []


def refuse_ipv6(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have each socket of IPv6 fail as it is made, with this errno."""

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
    """Without it, the name could not be listened on: the address may be on any network interface."""
    number, zone = socket.if_nameindex()[0]

    class Bound:
        def getsockname(self):
            return ("fe80::1", 8080, 0, number)

    assert sockets.socket_name(Bound()) == f"tcp:[fe80::1%{zone}]:8080"


def test_sockets_listen_without_blocking(opened) -> None:
    (listener,) = opened("tcp:0:interface=127.0.0.1")
    assert listener.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    assert not listener.socket.getblocking()
    assert not os.get_inheritable(listener.socket.fileno())


def test_a_unix_socket_has_its_mode_and_goes_with_its_listener(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (listener,) = opened(f"unix:{path}:mode=640")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    listener.close()
    assert not path.exists()


def test_a_stale_unix_socket_is_taken_over(opened, tmp_path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen()
    (listener,) = opened(f"unix:{path}")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert listener.name == f"unix:{path}"


def test_a_unix_socket_that_somebody_answers_on_is_refused(opened, tmp_path) -> None:
    path = tmp_path / "s"
    opened(f"unix:{path}")
    with pytest.raises(ListenError, match="another process answers on it"):
        opened(f"unix:{path}")
    assert path.exists()


def test_a_file_that_is_no_socket_is_refused_and_kept(opened, tmp_path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ListenError, match="not a socket"):
        opened(f"unix:{path}")
    assert path.read_text() == "precious"


def test_a_unix_path_that_is_too_long_is_refused(opened, tmp_path) -> None:
    with pytest.raises(ListenError, match="longer than 107 bytes"):
        opened(f"unix:{tmp_path}/{'x' * 108}")


def test_a_successors_socket_file_is_left_alone(opened, tmp_path) -> None:
    path = tmp_path / "s"
    (first,) = opened(f"unix:{path}")
    path.unlink()
    opened(f"unix:{path}")
    first.close()
    assert path.exists()


# --- ssl: ---


@pytest.fixture
def open_secure(certificates):
    """Opens an `ssl:` description in which {NAME} is a file of the certificates; gives its Listener."""
    listeners: list[Listener] = []

    def open_one(description: str) -> Listener:
        (listener,) = open_description(described(certificates, description), backlog=10)
        listeners.append(listener)
        return listener

    yield open_one
    for listener in listeners:
        listener.close()


def described(certificates, description: str) -> str:
    """The description with {NAME} replaced by the path of a file of the certificates."""
    for name in ("server.key", "server.pem", "leaf.key", "leaf.pem", "inner.pem", "ca.pem", "client.pem"):
        description = description.replace(f"{{{name}}}", certificates[name])
    return description


def handshake(listener: Listener, certificates, **attributes) -> dict[str, object]:
    """What a client that trusts the root finds out in a handshake with the listener's context."""
    assert listener.tls is not None
    client = ssl.create_default_context(cafile=certificates["ca.pem"])
    client.set_alpn_protocols(["http/1.1", "echo"])
    client.load_cert_chain(certificates["client.pem"], certificates["client.key"])
    for name, value in attributes.items():
        setattr(client, name, value)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname="localhost")
    far = listener.tls.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(3):
        for end in (near, far):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    return {"version": near.version(), "alpn": near.selected_alpn_protocol(), "client": bool(far.getpeercert())}


FILES = "privateKey={server.key}:certKey={server.pem}"
PLAIN = {"version": "TLSv1.3", "alpn": None, "client": False}


@pytest.mark.parametrize(
    ("description", "facts"),
    [
        (f"ssl:0:{FILES}", PLAIN),
        ("ssl:0:{server.key}:{server.pem}", PLAIN),
        (f"ssl:port=0:interface=127.0.0.1:backlog=5:{FILES}", PLAIN),
        ("ssl:0:privateKey={leaf.key}:certKey={leaf.pem}:extraCertChain={inner.pem}", PLAIN),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}", {**PLAIN, "client": True}),
        (f"ssl:0:{FILES}:minimum=1.2", PLAIN),
        (f"ssl:0:{FILES}:minimum=1.3", PLAIN),
        (f"ssl:0:{FILES}:alpn=echo", {**PLAIN, "alpn": "echo"}),
        (f"ssl:0:{FILES}:alpn=h2,echo,http/1.1", {**PLAIN, "alpn": "echo"}),
    ],
)
def test_an_ssl_description_becomes_a_context(open_secure, certificates, description, facts) -> None:
    listener = open_secure(description)
    assert listener.name.startswith("ssl:")
    assert listener.name.endswith(f":{listener.socket.getsockname()[1]}")
    assert handshake(listener, certificates) == facts


def test_minimum_1_3_refuses_1_2_and_the_default_does_not(open_secure, certificates) -> None:
    old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
    assert handshake(open_secure(f"ssl:0:{FILES}"), certificates, **old) == {**PLAIN, "version": "TLSv1.2"}
    with pytest.raises(ssl.SSLError):
        handshake(open_secure(f"ssl:0:{FILES}:minimum=1.3"), certificates, **old)


def test_ssl_files_have_twisteds_defaults(certificates, tmp_path, monkeypatch) -> None:
    """`ssl:PORT` alone reads server.pem for both, and the certificate is where the key is."""
    monkeypatch.chdir(tmp_path)
    both = certificates.join("both.pem", "server.key", "server.pem")
    for description, name in (("ssl:0", "server.pem"), ("ssl:0:privateKey=own.pem", "own.pem")):
        (tmp_path / name).write_bytes(pathlib.Path(both).read_bytes())
        (listener,) = open_description(description, backlog=10)
        try:
            assert handshake(listener, certificates) == PLAIN
        finally:
            listener.close()
            (tmp_path / name).unlink()


def test_ssl_paths_are_resolved_as_asked(certificates) -> None:
    (listener,) = open_description(
        "ssl:0:privateKey=server.key:certKey=server.pem:clientCA=ca.pem",
        backlog=10,
        resolve_path=certificates.__getitem__,
    )
    listener.close()
    assert listener.tls is not None
    assert [dict(pair[0] for pair in ca["subject"])["commonName"] for ca in listener.tls.get_ca_certs()] == ["ca"]


@needs_ipv6
def test_ssl_listens_on_ipv6_too(open_secure) -> None:
    listener = open_secure(rf"ssl:0:{FILES}:interface=\:\:1")
    assert listener.name == f"ssl:[::1]:{listener.socket.getsockname()[1]}"


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("ssl:", "the port is missing: ssl:8080"),
        ("ssl:x", "port 'x' is not a whole number"),
        (f"ssl:0:{FILES}:bogus=1", "unknown keyword 'bogus'; known are port, privateKey, certKey"),
        (f"ssl:0:{FILES}:minimum=1.1", "minimum '1.1' is not one of 1.2, 1.3"),
        (f"ssl:0:{FILES}:minimum=", "minimum '' is not one of 1.2, 1.3"),
        (f"ssl:0:{FILES}:library=openssl", "library 'openssl' is not one of ssl, pyopenssl"),
        (f"ssl:0:{FILES}:alpn=", "alpn '' is not a list"),
        (f"ssl:0:{FILES}:alpn=h2,,x", "alpn 'h2,,x' is not a list"),
        (f"ssl:0:{FILES}:alpn={'x' * 256}", "is not a list of protocol names"),
        (f"ssl:0:{FILES}:sslmethod=TLSv1_METHOD", "sslmethod= is not known here: minimum="),
        (f"ssl:0:{FILES}:dhParameters=dh.pem", "dhParameters= is not known here"),
        (f"ssl:0:{FILES}:clientCA=", "the name of a file is empty"),
        ("ssl:0:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
        ("ssl:0:privateKey={server.key}:certKey=/no/c.pem", "certificate '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:extraCertChain=/no/c.pem", "certificate chain '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:clientCA=/no/c.pem", "client CA '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:clientCRL={{ca.pem}}", "clientCRL= is given without clientCA="),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL=", "the name of a file is empty: clientCRL="),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL=/no/c.crl", "revocation list '/no/c.crl': no such file"),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL={{ca.pem}}", "no usable revocation list in PEM form in"),
        ("ssl:0:certificates=/d:clientCRL={ca.pem}", "clientCRL= is given without clientCA="),
        ("ssl:0:privateKey={server.key}:certKey={client.pem}", "does not belong to the certificate"),
        ("ssl:0:certificates=/no/d", "cannot read the directory '/no/d': no such file"),
        ("ssl:0:certificates=", "the name of a file is empty: certificates="),
        ("ssl:0:certificates=/d:privateKey={server.key}", "privateKey= and certificates= are both given"),
        ("ssl:0:certificates=/d:extraCertChain={inner.pem}", "extraCertChain= and certificates= are both given"),
        ("proxy:ssl:tcp6:0:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
        ("ssl:systemd:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
    ],
)
def test_a_bad_ssl_description_is_refused_with_what_was_found(certificates, description, problem) -> None:
    assert problem in refusal(described(certificates, description))


def test_nothing_is_bound_when_a_file_is_wrong(certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="no such file"):
        # A port in use would be the complaint, were it tried first.
        open_description(f"ssl:{taken.getsockname()[1]}:privateKey=/no/key:interface=127.0.0.1", backlog=10)


@pytest.mark.parametrize(
    ("description", "name"),
    [
        (f"ssl:tcp:0:127.0.0.1:{FILES}", "ssl:127.0.0.1:"),
        pytest.param(f"ssl:tcp6:0:{FILES}", "ssl:[::]:", marks=needs_ipv6),
        (f"ssl:{FILES}:port=0:interface=127.0.0.1", "ssl:127.0.0.1:"),
        (f"ssl:unix:{{directory}}/s:mode=600:{FILES}:alpn=echo", "ssl:unix:{directory}/s"),
    ],
)
def test_ssl_goes_before_descriptions_of_other_types(open_secure, certificates, tmp_path, description, name) -> None:
    listener = open_secure(description.replace("{directory}", str(tmp_path)))
    assert listener.name.startswith(name.replace("{directory}", str(tmp_path)))
    assert handshake(listener, certificates)["version"] == "TLSv1.3"
    assert not listener.proxied


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
def test_proxy_goes_before_any_description(opened, certificates, tmp_path, prefix, description, name) -> None:
    text = described(certificates, description).replace("{directory}", str(tmp_path))
    assert parse(f"{prefix}:{text}").ours
    (listener,) = opened(f"{prefix}:{text}")
    assert listener.name.startswith(f"proxy:{name.replace('{directory}', str(tmp_path))}")
    assert listener.proxied
    assert (listener.tls is not None) == ("ssl:" in description)
    check_description(f"{prefix}:{text}")


def test_without_proxy_a_listener_is_not_proxied_and_our_own_is_not_shared(opened) -> None:
    (listener,) = opened("tcp:0:interface=127.0.0.1")
    assert not listener.proxied
    assert not listener.shared
    assert listener.renew() is None
    assert listener.tls_files() == ()


# --- renewed certificates ---


@pytest.fixture
def renewable(open_secure, certificates, tmp_path):
    """A listener with a certificate in files of its own, as Path of the certificate, Path of the key, Listener."""
    paths = tmp_path / "x.pem", tmp_path / "x.key"
    put(certificates, "server", *paths)
    return *paths, open_secure(f"ssl:0:privateKey={paths[1]}:certKey={paths[0]}:interface=127.0.0.1")


def put(certificates, name: str, certificate: pathlib.Path, key: pathlib.Path) -> None:
    for suffix, path in (("pem", certificate), ("key", key)):
        shutil.copy(certificates[f"{name}.{suffix}"], path)


def facts(listener: Listener) -> tuple:
    return listener.tls, listener.certificates


def test_a_renewed_certificate_is_in_force_once_it_is_adopted(renewable, certificates) -> None:
    certificate, key, listener = renewable
    before = facts(listener)
    assert [one.path for one in listener.certificates] == [str(certificate)]
    assert sorted(listener.tls_files()) == sorted([str(certificate), str(key)])
    put(certificates, "rsa", certificate, key)
    loaded = listener.renew()
    assert loaded is not None
    assert facts(listener) == before
    listener.adopt(loaded)
    assert facts(listener) == (loaded.context, loaded.certificates)
    assert listener.tls is not before[0]
    old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
    assert handshake(listener, certificates, **old)["version"] == "TLSv1.2"


@pytest.mark.parametrize("wrong", ["gone", "junk", "of another"])
def test_a_renewed_certificate_that_is_wrong_is_named_and_changes_nothing(renewable, certificates, wrong) -> None:
    certificate, _, listener = renewable
    before = facts(listener)
    if wrong == "gone":
        certificate.unlink()
    elif wrong == "junk":
        certificate.write_text("junk")
    else:
        shutil.copy(certificates["rsa.pem"], certificate)
    with pytest.raises(ListenError) as caught:
        listener.renew()
    assert repr(str(certificate)) in str(caught.value)
    assert facts(listener) == before
    assert handshake(listener, certificates) == PLAIN


def test_names_that_come_and_go_are_noticed_at_renewal(open_secure, certificates, tmp_path) -> None:
    def names(listener: Listener) -> list[str]:
        return [name for one in listener.certificates for name in one.names]

    for name in ("one", "two", "three"):
        certificates.make(name, "server", "ca", alternative=f"DNS:{name}.example")
    for name in ("one", "two"):
        put(certificates, name, tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
    listener = open_secure(f"ssl:0:interface=127.0.0.1:certificates={tmp_path}")
    assert names(listener) == ["one.example", "two.example"]
    assert listener.tls_files() == (str(tmp_path),)
    put(certificates, "three", tmp_path / "three.pem", tmp_path / "three.key")
    (tmp_path / "one.pem").unlink()
    listener.adopt(listener.renew())
    assert names(listener) == ["three.example", "two.example"]


def test_paths_are_resolved_once(open_secure, certificates, tmp_path, monkeypatch) -> None:
    put(certificates, "server", tmp_path / "x.pem", tmp_path / "x.key")
    monkeypatch.chdir(tmp_path)
    listener = open_secure("ssl:0:privateKey=x.key:certKey=x.pem:interface=127.0.0.1")
    monkeypatch.chdir("/")
    assert listener.renew() is not None


# --- the lock of a socket's directory ---


@pytest.fixture
def locked_directory(tmp_path) -> Iterator[tuple[pathlib.Path, int]]:
    """A directory that somebody else has locked, and the descriptor whose closing unlocks it."""
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield tmp_path, descriptor
    with contextlib.suppress(OSError):
        os.close(descriptor)


def test_a_lock_that_is_released_in_time_is_waited_for(locked_directory, monkeypatch) -> None:
    directory, descriptor = locked_directory
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            os.close(descriptor)

    monkeypatch.setattr(unix.time, "sleep", sleep)
    [listener] = open_description(f"unix:{directory}/s", backlog=1)
    listener.close()
    assert len(waits) == 3


def test_a_lock_that_is_kept_is_an_error_in_bounded_time_and_leaves_no_socket(locked_directory, monkeypatch) -> None:
    directory, _ = locked_directory
    monkeypatch.setattr(unix, "_LOCK_WAIT", 0.1)
    for _ in range(2):  # and no descriptor
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ListenError, match=f"'{directory}/s': another process has locked its directory"):
            open_description(f"unix:{directory}/s", backlog=1)
        assert os.listdir("/proc/self/fd") == before
    assert not list(directory.iterdir())


# --- systemd: ---


@pytest.fixture
def pass_sockets(monkeypatch):
    """Passes listening sockets as a service manager would, with LISTEN_FDNAMES or without."""
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


def unix_socket(address: str | bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(address)
    sock.listen()
    return sock


def six_socket() -> socket.socket:
    return socket.create_server(("::1", 0), family=socket.AF_INET6)


@needs_ipv6
@pytest.mark.parametrize("names", [None, "", "a:b:c", "a"])
@pytest.mark.parametrize("description", ["systemd:", "systemd"])
def test_all_sockets_that_are_passed_are_adopted_named_or_not(
    opened, pass_sockets, tmp_path, names, description
) -> None:
    passed = [tcp_socket(), six_socket(), unix_socket(f"{tmp_path}/s")]
    pass_sockets(*passed, names=names)
    found = opened(description)
    assert [one.name for one in found] == [
        f"tcp:127.0.0.1:{passed[0].getsockname()[1]}",
        f"tcp:[::1]:{passed[1].getsockname()[1]}",
        f"unix:{tmp_path}/s",
    ]
    assert all(one.shared and not one.socket.getblocking() for one in found)
    for one in found:
        one.close()
    assert (tmp_path / "s").exists()
    assert all(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for sock in passed)


def test_passed_sockets_are_chosen_by_name_and_by_index(opened, pass_sockets) -> None:
    passed = [tcp_socket(), tcp_socket(), tcp_socket()]
    names = [f"tcp:127.0.0.1:{sock.getsockname()[1]}" for sock in passed]
    pass_sockets(*passed, names="web:other:web")
    for description, chosen in (
        ("systemd:name=web", [names[0], names[2]]),
        ("systemd:INET:index=1", [names[1]]),
        ("systemd:index=1", [names[1]]),
        ("systemd:domain=INET", names),
    ):
        assert [one.name for one in opened(description)] == chosen
        check_description(description)


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("systemd:index=1", "index 1 is not there: 1 socket was passed"),
        ("systemd:name=web", "no socket named 'web' was passed; there are: rt"),
        ("systemd:domain=INET6", "descriptor 300 is of domain INET, not 'INET6'"),
    ],
)
def test_a_passed_socket_that_is_not_there_is_refused_with_what_is(pass_sockets, description, problem) -> None:
    pass_sockets(tcp_socket(), names="rt")
    assert refusal(description) == problem


def test_a_passed_socket_that_does_not_listen_is_refused_and_the_others_are_let_go(pass_sockets) -> None:
    before = len(os.listdir("/proc/self/fd"))
    pass_sockets(tcp_socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    passed = len(os.listdir("/proc/self/fd"))
    assert refusal("systemd:") == "descriptor 301 is not a listening stream socket"
    assert len(os.listdir("/proc/self/fd")) == passed == before + 4


def passed_descriptors() -> dict[str, Callable[[pathlib.Path], Any]]:
    """What is no socket that can be served, by how it is refused; each made in a directory."""

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
    """A directory that is open."""

    def __init__(self, path: pathlib.Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)

    def fileno(self) -> int:
        return self._descriptor

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        os.close(self._descriptor)


@pytest.mark.parametrize("kind", passed_descriptors())
def test_what_a_service_manager_passes_and_nobody_can_serve_is_refused_with_its_number(
    pass_sockets, tmp_path, kind
) -> None:
    pass_sockets(tcp_socket(), passed_descriptors()[kind](tmp_path))
    expected = "is not a socket" if kind in ("pipe", "file", "directory") else "is not a listening stream socket"
    assert refusal("systemd:") == f"descriptor 301 {expected}"


def test_a_descriptor_that_is_closed_is_refused(pass_sockets) -> None:
    pass_sockets(tcp_socket())
    activation._initial_environment()["LISTEN_FDS"] = "2"  # type: ignore[index]  # it is the test's own
    assert refusal("systemd:") == "descriptor 301 cannot be used: bad file descriptor"


def test_more_descriptors_than_there_can_be_are_refused_and_cost_nothing(pass_sockets) -> None:
    pass_sockets(tcp_socket())
    activation._initial_environment()["LISTEN_FDS"] = "9" * 18  # type: ignore[index]  # it is the test's own
    assert refusal("systemd:") == f"LISTEN_FDS is {'9' * 18}, which is more than a process can have"


@pytest.mark.parametrize(
    ("family", "proto", "problem"),
    [
        (
            socket.AddressFamily.AF_VSOCK,
            0,
            "a socket of AF_VSOCK; what can be served is of AF_INET, AF_INET6 or AF_UNIX",
        ),
        (socket.AddressFamily.AF_TIPC, 0, "a socket of AF_TIPC; what can be served is of AF_INET, AF_INET6 or AF_UNIX"),
        # AF_SMC, of which Python knows no name.
        (43, 0, "a socket of address family 43; what can be served is of AF_INET, AF_INET6 or AF_UNIX"),
        (socket.AF_INET, 132, "a socket of protocol 132, and neither TCP nor MPTCP"),  # IPPROTO_SCTP
        (socket.AF_INET6, 256, "a socket of protocol 256, and neither TCP nor MPTCP"),  # IPPROTO_SMC
    ],
)
def test_a_listening_socket_of_a_foreign_family_or_protocol_is_refused(family, proto, problem) -> None:
    sock: Any = SimpleNamespace(family=family, type=socket.SOCK_STREAM, proto=proto, getsockopt=lambda level, option: 1)
    for domain in (None, "VSOCK"):
        assert activation._unfit(sock, domain) == f"is {problem}"


def test_a_socket_of_multipath_tcp_is_served(opened, pass_sockets) -> None:
    try:
        multipath = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP, which Python 3.11 lacks
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    multipath.bind(("127.0.0.1", 0))
    multipath.listen()
    pass_sockets(multipath)
    assert [one.name for one in opened("systemd:domain=INET")] == [f"tcp:127.0.0.1:{multipath.getsockname()[1]}"]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract UNIX addresses are Linux's")
def test_an_abstract_unix_socket_has_a_name_that_can_be_logged(opened, pass_sockets) -> None:
    abstract = f"rtservice-{os.getpid()}"
    pass_sockets(unix_socket(f"\0{abstract}"), unix_socket(f"\0{abstract}\0\xff".encode("latin-1")))
    assert [one.name for one in opened("systemd:")] == [f"unix:@{abstract}", f"unix:@{abstract}@\\xff"]


def test_ssl_and_proxy_go_before_passed_sockets(opened, pass_sockets, certificates) -> None:
    passed = [tcp_socket(), tcp_socket()]
    ports = [sock.getsockname()[1] for sock in passed]
    pass_sockets(*passed, names="plain:web")
    (secure,) = opened(described(certificates, f"ssl:systemd:name=web:{FILES}:alpn=echo"))
    assert (secure.name, secure.shared, secure.proxied) == (f"ssl:127.0.0.1:{ports[1]}", True, False)
    assert handshake(secure, certificates) == {**PLAIN, "alpn": "echo"}
    (plain,) = opened("proxy:systemd:name=plain")
    assert (plain.name, plain.shared, plain.proxied) == (f"proxy:tcp:127.0.0.1:{ports[0]}", True, True)
    both = opened(described(certificates, f"proxy:ssl:systemd:{FILES}"))
    assert [one.name for one in both] == [f"proxy:ssl:127.0.0.1:{port}" for port in ports]


LAUNCHER = """
import fcntl, os, socket, sys
for number in (3, 4):
    high = fcntl.fcntl(socket.create_server(("127.0.0.1", 0)), fcntl.F_DUPFD, 50)
    os.dup2(high, number, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2")
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_service_speaks_tls_on_the_sockets_that_it_is_passed(service, certificates) -> None:
    description = described(certificates, f"--listen=ssl:systemd:{FILES}")
    one = service(description, launcher=[sys.executable, "-c", LAUNCHER])
    client = ssl.create_default_context(cafile=certificates["ca.pem"])
    for count in (1, 2):
        port = int(one.wait_line(r"listening on ssl:127\.0\.0\.1:\d+$", count).rpartition(":")[2])
        with (
            socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
            client.wrap_socket(sock, server_hostname="localhost") as secure,
        ):
            assert secure.recv(100) == b"Hello from the server!"


@pytest.mark.parametrize("arguments", [(), ("",), ("a=b", "", "LISTEN_PID=7")])
@pytest.mark.parametrize("variables", [{"LISTEN_PID": "1", "X": "=", "E": "", "Ä": "\udcff" * 5}, {"LISTEN_PID": "1"}])
def test_the_initial_environment_is_found_without_proc(arguments, variables) -> None:
    program = """if True:
        import os
        from rtservice.net.activation import _initial_environment_in_memory
        del os.environ["LISTEN_PID"]
        os.environ["NEW"] = "x" * 10_000
        with open("/proc/self/environ", "rb") as file:
            assert _initial_environment_in_memory() == file.read().split(bytes(1))
    """
    subprocess.run([sys.executable, "-c", program, *arguments], env=variables, check=True)


def test_a_c_library_that_tells_nothing_leaves_the_environment_of_now(monkeypatch) -> None:
    def missing(name, *how):
        raise OSError(name)

    monkeypatch.setattr(activation, "open", missing, raising=False)
    monkeypatch.setattr(activation.ctypes, "CDLL", missing)
    assert activation._initial_environment() is os.environ


# --- checks ---


def test_a_check_takes_no_port_and_makes_no_file(tmp_path, certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, unix_socket(f"{tmp_path}/live"):
        port = taken.getsockname()[1]
        check_port(port, interface="127.0.0.1")
        check_description(f"tcp:{port}:interface=127.0.0.1")
        check_description(described(certificates, f"ssl:{port}:{FILES}:interface=127.0.0.1"))
        # A service that runs is what a check is mostly made beside.
        check_description(f"unix:{tmp_path}/live")
        check_description(f"unix:{tmp_path}/new")
    assert sorted(os.listdir(tmp_path)) == ["live"]


@pytest.mark.parametrize(
    "interface",
    ["", "127.0.0.1", pytest.param("::1", marks=needs_ipv6), pytest.param("[::1]", marks=needs_ipv6), "*", "localhost"],
)
def test_a_port_of_this_host_passes_its_check(interface) -> None:
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
def test_a_port_of_another_host_fails_its_check(interface, problem) -> None:
    with pytest.raises(ListenError) as caught:
        check_port(7, interface=interface)
    assert str(caught.value).startswith(problem)


def test_a_directory_where_no_socket_can_be_made_fails_the_check(tmp_path) -> None:
    tmp_path.chmod(0o755)
    root = os.geteuid() == 0
    if root:  # who may write anywhere
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
def test_a_check_rejects_ipv4_in_ipv6_as_binding_does(host: str) -> None:
    """Peers would show as such addresses too, which limits and PROXY rules do not mean."""
    for find in (check_description, partial(open_description, backlog=1)):
        with pytest.raises(ListenError, match=r"cannot listen on \[::ffff:.*\]:0: invalid argument"):
            find(f"tcp6:[{host}]:0")
