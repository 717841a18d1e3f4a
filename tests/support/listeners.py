"""Helpers for tests of descriptions and listeners."""

import contextlib
import socket
import ssl

import pytest

from rtservice.net.description import ListenError
from rtservice.net.listen_types import check_description, open_description
from rtservice.net.listener import Listener


def refusal(description: str) -> str:
    """Return the one-line error of an invalid description; check_description reports it too, if it can."""
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


def described(certificates, description: str) -> str:
    """Return the description with each {NAME} replaced by the path of that certificate file."""
    for name in ("server.key", "server.pem", "leaf.key", "leaf.pem", "inner.pem", "ca.pem", "client.pem"):
        description = description.replace(f"{{{name}}}", certificates[name])
    return description


def handshake(listener: Listener, certificates, **attributes) -> dict[str, object]:
    """Return the results of a handshake between a client that trusts the root and the context of a listener."""
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


def facts(listener: Listener) -> tuple:
    return listener.tls, listener.certificates


def unix_socket(address: str | bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(address)
    sock.listen()
    return sock
