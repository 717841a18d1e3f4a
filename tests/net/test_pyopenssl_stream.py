"""Listeners with library=pyopenssl: Twisted's TLS on the Connection transport, from the description to the protocol."""

import contextlib
import os
import re
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import INegotiated, IPullProducer, ISSLTransport
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from rtservice.net.description import ListenError
from rtservice.net.listen_types import open_description
from rtservice.net.port import Port
from tests.support.deadline import DEADLINE
from tests.support.recording import HandshakeListening, Recorder, Recording

SSL = pytest.importorskip("OpenSSL.SSL", reason="pyOpenSSL (twisted[tls]) is not installed")
tls = pytest.importorskip("twisted.protocols.tls", reason="pyOpenSSL (twisted[tls]) is not installed")


@pytest.fixture
def serve(certificates):
    """Serve a protocol as a description says; return its factory, its port, and a function that connects a client."""
    started: list[Any] = []

    def start(protocol: type[Recorder] = Recorder, more: str = "", files: str = "", **hooks: Any) -> Any:
        factory: Any = Recording(protocol, **hooks)
        factory.closed = Deferred()
        files = files or f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
        (listener,) = open_description(f"ssl:0:interface=127.0.0.1:{files}:library=pyopenssl{more}", backlog=10)

        def closed(connection: Any, reason: Any) -> None:
            if not factory.closed.called:
                factory.closed.callback((connection, reason.value))

        port = Port(reactor, listener.socket, factory, name=listener.name, tls=listener.tls, closed=closed)
        port.startListening()
        started.append((port, listener))

        def connect(name: str = "localhost", verify: bool = True, **options: Any) -> ssl.SSLSocket:
            context = ssl.create_default_context(cafile=certificates["ca.pem"])
            if not verify:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if "alpn" in options:
                context.set_alpn_protocols(options["alpn"])
            if "certificate" in options:
                of = options["certificate"]
                context.load_cert_chain(certificates[f"{of}.pem"], certificates[f"{of}.key"])
            plain = socket.create_connection(listener.socket.getsockname(), timeout=DEADLINE)
            return context.wrap_socket(plain, server_hostname=name)

        return factory, port, connect

    yield start
    for port, listener in started:
        port.stopListening()
        listener.close()


def exchange(client: ssl.SSLSocket, data: bytes) -> bytes:
    client.sendall(data)
    received = b""
    while len(received) < len(data) and (piece := client.recv(1 << 16)):
        received += piece
    return received


@pytest_twisted.inlineCallbacks
def test_a_protocol_sees_the_same_transport_as_on_twisteds_tls_listeners(serve, certificates):
    seen: dict[str, Any] = {}
    calls: list[str] = []

    def record_view(protocol: Recorder) -> None:
        calls.append("connectionMade")
        transport = protocol.transport
        seen.update(
            layer=isinstance(transport, tls.TLSMemoryBIOProtocol),
            interfaces=[interface.providedBy(transport) for interface in (ISSLTransport, INegotiated)],
            handle=isinstance(transport.getHandle(), SSL.Connection),
            peer=transport.getPeerCertificate().to_cryptography().subject.rfc4514_string(),
            chosen=transport.negotiatedProtocol,
            version=transport.tls_version,
            cipher=transport.tls_cipher,
            fields=transport.log_fields,
            host=transport.getHost().host,
            who=transport.getPeer().port,
            finished=transport.getHandle().get_peer_finished(),
        )

    factory, _, connect = serve(
        HandshakeListening,
        f":clientCA={certificates['ca.pem']}:alpn=two,one",
        on_connect=record_view,
        on_handshake=lambda protocol: calls.append("handshakeCompleted"),
    )
    client = yield deferToThread(connect, certificate="client", alpn=["one", "two"])
    with client:
        assert (yield deferToThread(exchange, client, b"hello")) == b"hello"
        assert client.selected_alpn_protocol() == "two"
        assert client.get_channel_binding("tls-unique") == seen.pop("finished")
        assert seen == {
            "layer": True,
            "interfaces": [True, True],
            "handle": True,
            "peer": "CN=client",
            "chosen": b"two",
            "version": "TLSv1.3",
            "cipher": client.cipher()[0],
            "fields": {
                "connection": 1,
                "peer": f"127.0.0.1:{client.getsockname()[1]}",
                "listener": f"ssl:127.0.0.1:{client.getpeername()[1]}",
            },
            "host": "127.0.0.1",
            "who": client.getsockname()[1],
        }
        assert calls == ["connectionMade", "handshakeCompleted"]
    yield factory.closed.addTimeout(DEADLINE, reactor)


@pytest_twisted.inlineCallbacks
def test_a_client_without_a_common_alpn_protocol_receives_the_alert_and_others_are_served(serve, logged):
    factory, _, connect = serve(HandshakeListening, ":alpn=two,one")
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        yield deferToThread(connect, alpn=["three"])
    connection, _ = yield factory.closed.addTimeout(DEADLINE, reactor)
    assert connection.error.reason == "NO_APPLICATION_PROTOCOL"
    client = yield deferToThread(connect, alpn=["one"])
    with client:
        assert (yield deferToThread(exchange, client, b"hello")) == b"hello"
    assert not logged


@pytest.mark.parametrize("where", ["on_connect", "on_handshake", "on_data"])
@pytest_twisted.inlineCallbacks
def test_an_exception_in_a_protocol_ends_only_its_connection_and_is_logged_once(serve, logged, where):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of the test")

    factory, _, connect = serve(HandshakeListening, **{where: fail})
    _, _, connect_elsewhere = serve()
    bystander = yield deferToThread(connect_elsewhere)

    def client() -> None:
        with connect() as tls:
            try:
                tls.sendall(b"x")
                assert tls.recv(10) == b""
            except OSError:  # reset, or no close_notify
                pass

    with bystander:
        yield deferToThread(client)
        _, reason = yield factory.closed.addTimeout(DEADLINE, reactor)
        assert isinstance(reason, ZeroDivisionError)
        assert [event["log_failure"].type for event in logged] == [ZeroDivisionError]
        method = {"on_connect": "connectionMade", "on_handshake": "handshakeCompleted", "on_data": "dataReceived"}
        assert logged[0]["method"] == method[where]
        assert (yield deferToThread(exchange, bystander, b"still here")) == b"still here"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest_twisted.inlineCallbacks
def test_a_failed_protocol_receives_no_more_calls(serve, logged, version):
    """This includes data that arrived with the client's Finished message."""

    def fail(protocol: Recorder) -> None:
        raise ZeroDivisionError("of the test")

    received: list[bytes] = []
    factory, port, _ = serve(on_connect=fail, on_data=lambda protocol, data: received.append(data))
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = context.maximum_version = version

    def client() -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing)
        with socket.create_connection(port.socket.getsockname(), timeout=DEADLINE) as sock:
            for _ in range(3):
                with contextlib.suppress(ssl.SSLWantReadError):
                    tls.do_handshake()
                    break
                sock.sendall(outgoing.read())
                incoming.write(sock.recv(1 << 16))
            if version == ssl.TLSVersion.TLSv1_3:  # the client sends the last flight of the handshake
                tls.write(b"right behind it")
            sock.sendall(outgoing.read())
            with contextlib.suppress(ConnectionResetError):
                while sock.recv(1 << 16):
                    pass

    yield deferToThread(client)
    yield factory.closed.addTimeout(DEADLINE, reactor)
    assert len(logged) == 1
    assert received == []


@pytest.mark.parametrize("who", ["client", "server"])
@pytest_twisted.inlineCallbacks
def test_the_side_that_closed_first_is_recorded(serve, who):
    factory, _, connect = serve(on_data=lambda protocol, data: protocol.transport.loseConnection())

    def client() -> None:
        with connect() as tls:
            if who == "client":
                tls.unwrap()
            else:
                tls.sendall(b"close")
                assert tls.recv(10) == b""
                with contextlib.suppress(OSError):
                    tls.unwrap()

    yield deferToThread(client)
    connection, reason = yield factory.closed.addTimeout(DEADLINE, reactor)
    assert isinstance(reason, ConnectionDone)
    assert connection.peer_finished is (who == "client")


@pytest_twisted.inlineCallbacks
def test_close_sends_all_written_data(serve):
    content = os.urandom(8_000_000)
    unsent: list[int] = []

    def end(protocol: Recorder) -> None:
        unsent.append(protocol.transport.unsent)
        protocol.transport.close("drained")

    def write(protocol: Recorder, data: bytes) -> None:
        protocol.transport.write(content)
        reactor.callLater(0, end, protocol)

    factory, _, connect = serve(on_data=write)

    def rest(client: ssl.SSLSocket) -> bytes:
        received = bytearray()
        while piece := client.recv(1 << 16):
            received += piece
        return bytes(received)

    client = yield deferToThread(connect)
    with client:
        yield deferToThread(client.sendall, b"go")
        assert (yield deferToThread(rest, client)) == content
    assert unsent[0] > 0
    connection, _ = yield factory.closed.addTimeout(DEADLINE, reactor)
    assert str(connection.error) == "drained"


@pytest_twisted.inlineCallbacks
def test_a_producer_bounds_the_memory_for_a_slow_reader(serve):
    """As in Twisted, a transport that is registered as its own producer is paused."""
    most = 0

    def register(protocol: Recorder) -> None:
        protocol.transport.registerProducer(protocol.transport, True)

    def echo(protocol: Recorder, data: bytes) -> None:
        nonlocal most
        protocol.transport.write(data)
        most = max(most, protocol.transport.unsent)

    factory, _, connect = serve(on_connect=register, on_data=echo)
    size = 20_000_000

    def client() -> int:
        with connect() as tls:
            tls.setblocking(False)
            sent = received = 0
            while received < size:
                with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                    sent += tls.send(b"x" * min(1 << 16, size - sent)) if sent < size else 0
                with contextlib.suppress(ssl.SSLWantReadError):
                    received += len(tls.recv(1 << 12))
            return received

    assert (yield deferToThread(client)) == size
    assert most < 1 << 20
    yield factory.closed.addTimeout(DEADLINE, reactor)


@pytest_twisted.inlineCallbacks
def test_sni_selects_the_certificate_and_new_clients_see_a_renewed_one(serve, certificates, tmp_path):
    for name, alternative in (("a", "DNS:a.example"), ("star", "DNS:*.example"), ("default", "DNS:d.example")):
        certificates.make(f"layered-{name}", "server", "ca", alternative=alternative)
        both = certificates.join(f"layered-{name}-both.pem", f"layered-{name}.key", f"layered-{name}.pem")
        (tmp_path / f"{name}.pem").write_bytes(Path(both).read_bytes())

    def names(client_name: str) -> list[str]:
        with connect(client_name, verify=False) as client:
            der = client.getpeercert(binary_form=True)
        return [
            name
            for name in ("a", "star", "default", "renewed")
            if der and ssl.DER_cert_to_PEM_cert(der) in Path(certificates[f"layered-{name}.pem"]).read_text()
        ]

    certificates.make("layered-renewed", "server", "ca", alternative="DNS:a.example")
    _, port, connect = serve(files=f"certificates={tmp_path}")
    for asked, shown in (("a.example", "a"), ("A.Example", "a"), ("b.example", "star"), ("x.org", "default")):
        assert (yield deferToThread(names, asked)) == [shown]
    both = certificates.join("layered-renewed-both.pem", "layered-renewed.key", "layered-renewed.pem")
    (tmp_path / "a.pem").write_bytes(Path(both).read_bytes())
    (listener,) = open_description(f"ssl:0:interface=127.0.0.1:certificates={tmp_path}:library=pyopenssl", backlog=1)
    port.tls = listener.tls
    listener.close()
    assert (yield deferToThread(names, "a.example")) == ["renewed"]
    assert (yield deferToThread(names, "b.example")) == ["star"]


def test_without_pyopenssl_the_error_explains_how_to_install_it(certificates, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "OpenSSL", None)
    monkeypatch.delitem(sys.modules, "rtservice.net.pyopenssl", raising=False)
    files = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}"
    with pytest.raises(ListenError, match=r"library=pyopenssl is not installed; pip install 'twisted\[tls\]' \("):
        open_description(f"ssl:0:{files}:library=pyopenssl", backlog=1)


@pytest_twisted.inlineCallbacks
def test_a_producer_is_stopped_at_the_clients_close_notify(serve):
    """Twisted's TLS layer would let it continue."""
    asked = 0

    @implementer(IPullProducer)
    class Endless(Recorder):
        def connectionMade(self) -> None:
            self.transport.registerProducer(self, False)

        def resumeProducing(self) -> None:
            nonlocal asked
            asked += 1
            self.transport.write(b"x" * 1000)

        def stopProducing(self) -> None:
            self.factory.asked_until_then = asked

    factory, _, connect = serve(Endless)

    def client() -> None:
        with connect() as tls:
            tls.recv(1000)
            with contextlib.suppress(OSError):
                tls.unwrap()

    yield deferToThread(client)
    yield factory.closed.addTimeout(DEADLINE, reactor)
    assert asked == factory.asked_until_then


@pytest_twisted.inlineCallbacks
def test_close_does_not_wait_for_the_clients_close_notify_and_ignores_later_data(serve):
    received: list[bytes] = []

    def close(protocol: Recorder, data: bytes) -> None:
        received.append(data)
        protocol.transport.write(b"bye")
        protocol.transport.loseConnection()

    factory, _, connect = serve(on_data=close)

    def client() -> bytes:
        with connect() as tls:
            tls.sendall(b"quit")
            answer = tls.recv(10)
            assert tls.recv(10) == b""  # its close_notify
            plain = socket.socket(fileno=tls.detach())
            with plain, contextlib.suppress(OSError):
                assert plain.recv(10) == b""  # the FIN, without further data
                plain.sendall(bytes(100))
            return answer

    assert (yield deferToThread(client)) == b"bye"
    connection, reason = yield factory.closed.addTimeout(DEADLINE, reactor)
    assert received == [b"quit"]
    assert isinstance(reason, ConnectionDone)
    assert not connection.peer_finished


@pytest_twisted.inlineCallbacks
def test_a_server_certificate_chain_may_be_long(serve, certificates):
    chain = certificates.join("layered-long.pem", *["ca.pem"] * 100)
    files = f"privateKey={certificates['server.key']}:certKey={certificates['server.pem']}:extraCertChain={chain}"
    factory, _, connect = serve(files=files)

    def client() -> bytes:
        with connect(verify=False) as tls:
            return exchange(tls, b"hello")

    assert (yield deferToThread(client)) == b"hello"
    yield factory.closed.addTimeout(DEADLINE, reactor)


@pytest.mark.parametrize(
    ("sent", "error"),
    [(b"\x17\x03\x03\x00\x20" + b"z" * 32, ssl.SSLError), (b"garbage", ssl.SSLError), (b"", ssl.SSLEOFError)],
    ids=["tampered", "garbage", "FIN"],
)
@pytest_twisted.inlineCallbacks
def test_tls_errors_are_classified_as_with_the_ssl_library(serve, sent, error):
    factory, _, connect = serve()

    def client() -> None:
        tls = connect()
        assert exchange(tls, b"hello") == b"hello"
        with socket.socket(fileno=tls.detach()) as plain:
            plain.sendall(sent)
            if not sent:
                plain.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while plain.recv(1000):
                    pass

    yield deferToThread(client)
    connection, _ = yield factory.closed.addTimeout(DEADLINE, reactor)
    assert type(connection.error) is error
    if error is ssl.SSLError:  # the word depends on the OpenSSL version
        assert re.fullmatch("[A-Z0-9_]+", connection.error.reason)
