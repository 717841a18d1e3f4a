"""From a description to sockets."""

import contextlib
import os
import pathlib
import socket
import ssl
import stat

import pytest

from rtservice.net.listeners import Listener, ListenError, open_description, open_port, split_description


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this host has no IPv6")


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
    ("description", "parts"),
    [
        ("8080", ("tcp", ["8080"], {})),
        ("tcp:8080", ("tcp", ["8080"], {})),
        ("tcp:8080:interface=127.0.0.1", ("tcp", ["8080"], {"interface": "127.0.0.1"})),
        (r"tcp6:1:interface=\:\:1", ("tcp6", ["1"], {"interface": "::1"})),
        (r"unix:/a\:b\\c\=d", ("unix", [r"/a:b\c=d"], {})),
        ("x:a=b=c:d=", ("x", [], {"a": "b=c", "d": ""})),
        ("unix:", ("unix", [""], {})),
    ],
)
def test_descriptions_are_read_as_twisted_reads_them(description, parts) -> None:
    assert split_description(description) == parts
    if ":" in description:
        from twisted.internet.endpoints import _parse

        positional, keywords = _parse(description)
        assert (positional[0], positional[1:], keywords) == parts


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("tcp:", "the port is missing"),
        ("tcp:x", "port 'x' is not a whole number"),
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
        ("systemd:index=0", "no sockets were passed"),
    ],
)
def test_a_bad_description_is_refused_with_what_was_found(description, problem) -> None:
    with pytest.raises(ListenError) as caught:
        open_description(description, backlog=10)
    assert problem in str(caught.value)


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


@needs_ipv6
def test_tcp_and_tcp6_share_a_port(opened) -> None:
    (four,) = opened("tcp:0")
    port = four.socket.getsockname()[1]
    (six,) = opened(f"tcp6:{port}")
    assert (four.name, six.name) == (f"tcp:0.0.0.0:{port}", f"tcp:[::]:{port}")


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
        ("ssl:0:privateKey={server.key}:certKey={client.pem}", "does not belong to the certificate"),
    ],
)
def test_a_bad_ssl_description_is_refused_with_what_was_found(certificates, description, problem) -> None:
    with pytest.raises(ListenError) as caught:
        open_description(described(certificates, description), backlog=10)
    assert problem in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_nothing_is_bound_when_a_file_is_wrong(certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="no such file"):
        # A port in use would be the complaint, were it tried first.
        open_description(f"ssl:{taken.getsockname()[1]}:privateKey=/no/key:interface=127.0.0.1", backlog=10)
