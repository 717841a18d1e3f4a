"""Unmodified third-party protocols with TLS, PROXY headers, workers, limits and a drain.

Autobahn needs the pyOpenSSL connection of its transport, which `library=pyopenssl` provides.
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
# A text frame, masked with zeros (RFC 6455, section 5.2), and its echo.
FRAME, FRAME_BACK = b"\x81\x82\0\0\0\0hi", b"\x81\x02hi"
# An anonymous bind (RFC 4511, section 4.2) and its success response.
BIND, BOUND = bytes.fromhex("300c020101600702010304008000"), bytes.fromhex("300c02010161070a010004000400")


# The protocol, the package it needs, the data that a client sends, and the data expected in the response.
HOSTED = {
    "twisted-echo": ("twisted.protocols.wire:Echo", "", b"hello", b"hello"),
    # Daytime is left out: it fails, because it adds bytes to text.
    "twisted-finger": ("twisted.protocols.finger:Finger", "", b"root\r\n", b"No such user"),
    "twisted-discard": ("twisted.protocols.wire:Discard", "", b"anything", b""),
    "autobahn-websocket": ("others:factory", "autobahn", UPGRADE + FRAME, FRAME_BACK),
    "ldaptor-ldap": ("ldaptor.protocols.ldap.ldapserver:LDAPServer", "ldaptor", BIND, BOUND),
}


@pytest.fixture(params=HOSTED)
def third_party(request, hosted, tmp_path, certificates):
    """A function that starts a service with TLS behind a proxy, the request to send, and the expected response."""
    protocol, package, request_data, expected = HOSTED[request.param]
    if package:
        pytest.importorskip(package, reason=f"{package} (PyPI) is not installed", exc_type=ImportError)
    copy_hosted("others", tmp_path)

    def start(*arguments: str):
        keys = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
        library = "pyopenssl" if package == "autobahn" else "ssl"
        listen = f"--listen=proxy:ssl:0:interface=127.0.0.1:{keys}:library={library}"
        path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
        return hosted(protocol, listen, *arguments, PYTHONPATH=path)

    return start, request_data, expected


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
    third_party, certificates, workers
) -> None:
    start, request_data, expected = third_party
    running = start(f"--workers={workers}", "--drain-timeout=0.5")
    for _ in range(4):
        with connect(running, certificates) as client:
            client.sendall(request_data)
            receive(client, expected)
    running.wait_event("connection.closed", 4, peer="192.0.2.7:4711")
    with connect(running, certificates) as client:
        client.sendall(request_data)
        receive(client, expected)
        assert running.stop() == 0
    assert not any("Traceback" in line or "failed in" in line for line in running.lines)


def test_connection_limit_and_idle_timeout_apply_to_third_party_protocols(third_party, certificates) -> None:
    start, request_data, expected = third_party
    running = start("--max-connections=1", "--at-limit=reject", "--idle-timeout=1", "--drain-timeout=0")
    with connect(running, certificates) as first:
        # The only allowed connection stays open until it is idle.
        with contextlib.suppress(OSError):
            connect(running, certificates).close()
        running.wait_event("connection.refused", setting="max-connections")
        first.sendall(request_data)
        receive(first, expected)
        while first.recv(65536):
            pass
    running.wait_event("connection.closed", reason=re.compile("^(idle|closed)$"))
    assert running.stop() == 0
