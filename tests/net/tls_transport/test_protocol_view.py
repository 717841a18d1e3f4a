"""TLS in the transport: the information available to a protocol."""

import ssl
import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.threads import deferToThread

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.recording import HandshakeListening, Recording, echo
from tests.support.tls_client import Client, ResetError
from tests.support.tls_libraries import BOTH
from tests.support.tls_versions import VERSIONS


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_version_cipher_alpn_and_certificate_are_available_in_connection_made(
    serve, client_context, version, certificates
):
    seen: dict[str, Any] = {}
    calls: list[str] = []

    def record_view(protocol):
        calls.append("connectionMade")
        transport = protocol.transport
        seen["version"], seen["cipher"] = transport.tls_version, transport.tls_cipher
        seen["alpn"] = transport.negotiatedProtocol
        seen["subject"] = transport.getPeerCertificate()["subject"]
        seen["handle"] = transport.getHandle()
        seen["peer"], seen["host"] = transport.getPeer().port, transport.getHost().port

    def client():
        context = client_context(version, certificate="client", alpn=("x", "echo"))
        with Client(served.address, context).shake() as peer:
            peer.write(b"hello")
            peer.read_exactly(5)
            peer.close_notify()
            peer.read_to_end()
            return peer.tls.cipher()[0], peer.tls.selected_alpn_protocol()

    factory = Recording(
        HandshakeListening, on_connect=record_view, on_handshake=lambda protocol: calls.append("handshakeCompleted")
    )
    factory.on_data = lambda protocol, data: calls.append("dataReceived") or echo(protocol, data)
    served = serve(factory, client_ca=certificates["ca.pem"], alpn=("echo", "h2"))
    cipher, alpn = yield deferToThread(client)
    assert seen["version"] == version.replace("_", ".")
    assert (seen["cipher"], seen["alpn"], alpn) == (cipher, b"echo", "echo")
    assert seen["subject"] == ((("commonName", "client"),),)
    assert isinstance(seen["handle"], ssl.SSLObject)
    assert seen["host"] == served.address[1]
    assert calls == ["connectionMade", "handshakeCompleted", "dataReceived"]
    yield eventually(lambda: served.closed)
    # It is still available in connectionLost, for records.
    assert served.closed[0][0].tls_version == version.replace("_", ".")
    assert served.closed[0][0].getPeerCertificate()["subject"] == seen["subject"]


@pytest_twisted.inlineCallbacks
def test_tls_facts_are_none_before_the_handshake_and_without_certificate_and_alpn(serve, client_context):
    served = serve(Recording(), alpn=("echo",))
    peer = yield deferToThread(Client, served.address, client_context())
    with peer:
        yield eventually(lambda: served.opened)
        (connection,) = served.opened

        def known():
            return (
                connection.tls_version,
                connection.tls_cipher,
                connection.negotiatedProtocol,
                connection.getPeerCertificate(),
            )

        assert known() == (None, None, None, None)
        yield deferToThread(peer.shake)
        yield eventually(lambda: served.factory.made)
        assert known() == ("TLSv1.3", peer.tls.cipher()[0], None, None)
        assert ISSLTransport.providedBy(connection)
        with pytest.raises(RuntimeError, match="in TLS already"):
            connection.startTLS(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


@BOTH
@VERSIONS
@pytest.mark.parametrize("certificate", ["client", "stranger", ""])
@pytest_twisted.inlineCallbacks
def test_a_client_ca_accepts_only_certificates_it_signed(
    serve, client_context, version, certificate, certificates, logged
):
    def client():
        with Client(served.address, client_context(version, certificate=certificate)) as peer:
            peer.shake()
            peer.write(b"hello")
            return peer.read_exactly(5)

    served = serve(Recording(), client_ca=certificates["ca.pem"])
    if certificate == "client":
        answer = yield deferToThread(client)
        assert answer == b"hello"
    else:
        with pytest.raises((ssl.SSLError, ResetError, OSError)):
            yield deferToThread(client)
        yield eventually(lambda: served.closed)
        assert isinstance(served.closed[0][1], ConnectionLost)
        assert served.closed[0][0].error.reason in ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "CERTIFICATE_VERIFY_FAILED")
        assert (served.factory.made, served.factory.received, logged) == ([], b"", [])


@BOTH
@pytest_twisted.inlineCallbacks
def test_minimum_version_1_3_rejects_1_2(serve, client_context):
    def client():
        with Client(served.address, client_context("TLSv1_2")) as peer, pytest.raises((ssl.SSLError, ResetError)):
            peer.shake()

    served = serve(Recording(), minimum="1.3")
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    assert served.closed[0][0].error.reason == "UNSUPPORTED_PROTOCOL"


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_session_is_resumed(serve, client_context, version):
    def client():
        context = client_context(version)
        session = None
        reused = []
        for _ in range(3):
            with Client(served.address, context) as peer:
                if session is not None:
                    peer.tls.session = session
                peer.shake()
                peer.write(b"hello")
                assert peer.read_exactly(5) == b"hello"
                session = peer.tls.session
                reused.append(peer.tls.session_reused)
                peer.close_notify()
                peer.read_to_end()
        return reused

    served = serve(Recording())
    reused = yield deferToThread(client)
    assert reused == [False, True, True]


@BOTH
@pytest_twisted.inlineCallbacks
def test_many_concurrent_clients_each_receive_their_own_echo(serve, client_context):
    def client(number: int):
        data = bytes([number]) * 300_000
        with Client(served.address, client_context()).shake() as peer:
            results.append(peer.exchange(data) == data)

    def clients():
        threads = [threading.Thread(target=client, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)

    results: list[bool] = []
    served = serve(Recording())
    yield deferToThread(clients)
    assert results == [True] * 20
