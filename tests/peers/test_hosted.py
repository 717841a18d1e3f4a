"""Protocols that others wrote, as they are: with TLS, PROXY headers, workers, limits and a drain.

Autobahn's asks its transport for pyOpenSSL's connection, and has it with `library=pyopenssl`.
"""

import base64
import contextlib
import os
import re
import socket
import ssl
import sys

import pytest

from tests.support.hosted import copy_hosted

HELLO = b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 7\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + base64.b64encode(b"0123456789abcdef") + b"\r\n\r\n"
)
# A frame of text, masked with zeros (RFC 6455, section 5.2), and what comes back.
FRAME, FRAME_BACK = b"\x81\x82\0\0\0\0hi", b"\x81\x02hi"
# An anonymous bind (RFC 4511, section 4.2) and the success that answers it.
BIND, BOUND = bytes.fromhex("300c020101600702010304008000"), bytes.fromhex("300c02010161070a010004000400")


# What is hosted, what it takes, what a client sends, and what has to be in what comes back.
HOSTED = {
    "twisted-echo": ("twisted.protocols.wire:Echo", "", b"hello", b"hello"),
    # Not its Daytime, which adds bytes to a text, and fails.
    "twisted-finger": ("twisted.protocols.finger:Finger", "", b"root\r\n", b"No such user"),
    "twisted-discard": ("twisted.protocols.wire:Discard", "", b"anything", b""),
    "autobahn-websocket": ("others:factory", "autobahn", UPGRADE + FRAME, FRAME_BACK),
    "ldaptor-ldap": ("ldaptor.protocols.ldap.ldapserver:LDAPServer", "ldaptor", BIND, BOUND),
}


@pytest.fixture(params=HOSTED)
def hosted_one(request, hosted, tmp_path, certificates):
    """A service with TLS behind a proxy, and what to say to it and to hear from it."""
    protocol, package, says, hears = HOSTED[request.param]
    if package:
        pytest.importorskip(package, reason=f"{package} (PyPI) is not installed", exc_type=ImportError)
    copy_hosted("others", tmp_path)

    def start(*arguments: str):
        keys = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
        library = "pyopenssl" if package == "autobahn" else "ssl"
        listen = f"--listen=proxy:ssl:0:interface=127.0.0.1:{keys}:library={library}"
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        return hosted(protocol, listen, *arguments, PYTHONPATH=path)

    return start, says, hears


def connect(running, certificates) -> socket.socket:
    listener = running.wait_event("listener.listening", listener=re.compile("^proxy:"))["listener"]
    plain = socket.create_connection(("127.0.0.1", int(listener.rpartition(":")[2])), timeout=30)
    plain.sendall(HELLO)
    return ssl.create_default_context(cafile=certificates["ca.pem"]).wrap_socket(plain, server_hostname="localhost")


def receive(client: socket.socket, awaited: bytes) -> bytes:
    received = b""
    while awaited not in received:
        data = client.recv(65536)
        assert data, received
        received += data
    return received


@pytest.mark.parametrize("workers", [1, 2])
def test_third_party_protocols_work_with_tls_proxy_headers_workers_and_a_drain(
    hosted_one, certificates, workers
) -> None:
    start, says, hears = hosted_one
    running = start(f"--workers={workers}", "--drain-timeout=0.5")
    for _ in range(4):
        with connect(running, certificates) as client:
            client.sendall(says)
            receive(client, hears)
    running.wait_event("connection.closed", 4, peer="192.0.2.7:4711")
    with connect(running, certificates) as client:
        client.sendall(says)
        receive(client, hears)
        assert running.stop() == 0
    assert not any("Traceback" in line or "failed in" in line for line in running.lines)


def test_connection_limit_and_idle_timeout_apply_to_third_party_protocols(hosted_one, certificates) -> None:
    start, says, hears = hosted_one
    running = start("--max-connections=1", "--at-limit=reject", "--idle-timeout=1", "--drain-timeout=0")
    with connect(running, certificates) as first:
        # Its first place is its own until it is idle.
        with contextlib.suppress(OSError):
            connect(running, certificates).close()
        running.wait_event("connection.refused", setting="max-connections")
        first.sendall(says)
        receive(first, hears)
        while first.recv(65536):
            pass
    running.wait_event("connection.closed", reason=re.compile("^(idle|closed)$"))
    assert running.stop() == 0
