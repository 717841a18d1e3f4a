"""From `ssl:` descriptions to listeners with a TLS context."""

import pathlib
import socket
import ssl

import pytest

from rtservice.net.description import ListenError
from rtservice.net.listen_types import open_description
from tests.support.ipv6 import needs_ipv6
from tests.support.listeners import FILES, PLAIN, described, handshake, refusal


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


def test_minimum_1_3_rejects_1_2_and_the_default_accepts_it(open_secure, certificates) -> None:
    old = {"maximum_version": ssl.TLSVersion.TLSv1_2}
    assert handshake(open_secure(f"ssl:0:{FILES}"), certificates, **old) == {**PLAIN, "version": "TLSv1.2"}
    with pytest.raises(ssl.SSLError):
        handshake(open_secure(f"ssl:0:{FILES}:minimum=1.3"), certificates, **old)


def test_ssl_file_names_have_twisteds_defaults(certificates, tmp_path, monkeypatch) -> None:
    """`ssl:PORT` reads key and certificate from server.pem; the default certificate file is the key file."""
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


def test_ssl_paths_are_resolved_by_the_given_function(certificates) -> None:
    (listener,) = open_description(
        "ssl:0:privateKey=server.key:certKey=server.pem:clientCA=ca.pem",
        backlog=10,
        resolve_path=certificates.__getitem__,
    )
    listener.close()
    assert listener.tls is not None
    assert [dict(pair[0] for pair in ca["subject"])["commonName"] for ca in listener.tls.get_ca_certs()] == ["ca"]


@needs_ipv6
def test_ssl_listens_on_ipv6(open_secure) -> None:
    listener = open_secure(rf"ssl:0:{FILES}:interface=\:\:1")
    assert listener.name == f"ssl:[::1]:{listener.socket.getsockname()[1]}"


@pytest.mark.parametrize(
    ("description", "problem"),
    [
        ("ssl:", "the port is missing; write ssl:PORT, such as ssl:8080"),
        ("ssl:x", "port 'x' is not a whole number"),
        (f"ssl:0:{FILES}:bogus=1", "unknown keyword 'bogus'; accepted are port, privateKey, certKey"),
        (f"ssl:0:{FILES}:minimum=1.1", "minimum '1.1' is unknown; accepted are 1.2, 1.3"),
        (f"ssl:0:{FILES}:minimum=", "minimum '' is unknown; accepted are 1.2, 1.3"),
        (f"ssl:0:{FILES}:library=openssl", "library 'openssl' is unknown; accepted are ssl, pyopenssl"),
        (f"ssl:0:{FILES}:alpn=", "alpn '' is not a list"),
        (f"ssl:0:{FILES}:alpn=h2,,x", "alpn 'h2,,x' is not a list"),
        (f"ssl:0:{FILES}:alpn={'x' * 256}", "is not a list of protocol names"),
        (
            f"ssl:0:{FILES}:sslmethod=TLSv1_METHOD",
            "sslmethod= is not supported; choose the lowest TLS version with minimum=",
        ),
        (f"ssl:0:{FILES}:dhParameters=dh.pem", "dhParameters= is not supported"),
        (f"ssl:0:{FILES}:clientCA=", "clientCA= is empty"),
        ("ssl:0:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
        ("ssl:0:privateKey={server.key}:certKey=/no/c.pem", "certificate '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:extraCertChain=/no/c.pem", "certificate chain '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:clientCA=/no/c.pem", "client CA '/no/c.pem': no such file"),
        (f"ssl:0:{FILES}:clientCRL={{ca.pem}}", "clientCRL= is given without clientCA="),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL=", "clientCRL= is empty; give the path of a file"),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL=/no/c.crl", "revocation list '/no/c.crl': no such file"),
        (f"ssl:0:{FILES}:clientCA={{ca.pem}}:clientCRL={{ca.pem}}", "no usable revocation list in PEM form in"),
        ("ssl:0:certificates=/d:clientCRL={ca.pem}", "clientCRL= is given without clientCA="),
        ("ssl:0:privateKey={server.key}:certKey={client.pem}", "does not belong to the certificate"),
        ("ssl:0:certificates=/no/d", "cannot read the directory '/no/d': no such file"),
        ("ssl:0:certificates=", "certificates= is empty; give the path of a file"),
        ("ssl:0:certificates=/d:privateKey={server.key}", "privateKey= and certificates= are both given"),
        ("ssl:0:certificates=/d:extraCertChain={inner.pem}", "extraCertChain= and certificates= are both given"),
        ("proxy:ssl:tcp6:0:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
        ("ssl:systemd:privateKey=/no/key.pem:certKey={server.pem}", "private key '/no/key.pem': no such file"),
    ],
)
def test_an_invalid_ssl_description_is_rejected_with_the_problem(certificates, description, problem) -> None:
    assert problem in refusal(described(certificates, description))


def test_files_are_checked_before_binding(certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ListenError, match="no such file"):
        # If the port were bound first, the error would be the port in use.
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
def test_the_ssl_prefix_applies_to_other_types(open_secure, certificates, tmp_path, description, name) -> None:
    listener = open_secure(description.replace("{directory}", str(tmp_path)))
    assert listener.name.startswith(name.replace("{directory}", str(tmp_path)))
    assert handshake(listener, certificates)["version"] == "TLSv1.3"
    assert not listener.proxied
