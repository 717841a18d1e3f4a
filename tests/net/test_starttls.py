"""STARTTLS on a plain connection, with contexts of the standard library and of Twisted."""

import contextlib
import importlib.util
import os
import socket
import ssl
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHandshakeListener, INegotiated, ISSLTransport, ITCPTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from rtservice.net.connection import Connection
from rtservice.net.listen_types import open_description
from rtservice.net.port import Port
from rtservice.net.tls import ServerTLS
from tests.support.deadline import DEADLINE
from tests.support.starttls import STARTTLS


@implementer(IHandshakeListener)
class Upgrading(Protocol):
    """Starts TLS on request, then echoes."""

    factory: Any
    transport: Any

    def dataReceived(self, data):
        if data == STARTTLS:
            self.transport.write(self.factory.plain)
            self.transport.startTLS(self.factory.context)
            self.transport.write(b"first in TLS")
        else:
            self.transport.write(data)

    def handshakeCompleted(self):
        self.factory.shaken += 1

    def connectionLost(self, reason):
        self.transport.unregisterProducer()  # many protocols do, and the TLS layer is already removed
        self.factory.secure = ISSLTransport.providedBy(self.transport)
        self.factory.lost.callback(reason.value)


@pytest.fixture
def serve():
    """Serve Upgrading with a context, after some plain text; return the factory and the port's address."""
    started = []

    def start(context, plain=b"go on\r\n", **port):
        factory: Any = Factory.forProtocol(Upgrading)
        factory.noisy = False
        factory.context, factory.plain = context, plain
        factory.shaken, factory.lost = 0, Deferred()
        (listener,) = open_description("tcp:0:interface=127.0.0.1", backlog=10)
        adopted = Port(reactor, listener.socket, factory, name=listener.name, **port)
        adopted.startListening()
        started.append((adopted, listener))
        return factory, listener.socket.getsockname()

    yield start
    for adopted, listener in started:
        adopted.stopListening()
        listener.close()


@pytest.fixture(params=["ssl", "pyOpenSSL"])
def context(request, certificates):
    """A server context for startTLS, one per library."""
    if request.param == "ssl":
        return ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    if importlib.util.find_spec("OpenSSL") is None:
        pytest.skip("pyOpenSSL (twisted[tls]) is not installed")
    from twisted.internet.ssl import DefaultOpenSSLContextFactory

    return DefaultOpenSSLContextFactory(certificates["server.key"], certificates["server.pem"])


def upgrade(address, certificates, plain: bytes) -> ssl.SSLSocket:
    """Return a client that has read the plain text and completed the handshake."""
    sock = socket.create_connection(address, timeout=DEADLINE)
    sock.sendall(STARTTLS)
    received = bytearray()
    while len(received) < len(plain):
        received += sock.recv(len(plain) - len(received))
    assert received == plain
    client = ssl.create_default_context(cafile=certificates["ca.pem"])
    return client.wrap_socket(sock, server_hostname="localhost")


def read(sock: ssl.SSLSocket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = sock.recv(size - len(received))
        assert piece
        received += piece
    return bytes(received)


@pytest.mark.parametrize("size", [7, 8_000_000], ids=["a line", "more than the kernel takes"])
@pytest_twisted.inlineCallbacks
def test_data_is_plain_before_starttls_and_encrypted_after_it(serve, context, certificates, size):
    plain = os.urandom(size)
    factory, address = serve(context, plain)

    def client():
        with upgrade(address, certificates, plain) as sock:
            assert read(sock, 12) == b"first in TLS"
            data = os.urandom(300_000)
            for start in range(0, len(data), 30_000):
                sock.sendall(data[start : start + 30_000])
                assert read(sock, 30_000) == data[start : start + 30_000]
            sock.unwrap().close()

    yield deferToThread(client)
    reason = yield factory.lost.addTimeout(DEADLINE, reactor)
    assert isinstance(reason, ConnectionDone)
    assert factory.shaken == 1
    assert factory.secure


@pytest_twisted.inlineCallbacks
def test_the_transport_stays_the_same_object_and_provides_issltransport_after_starttls(serve, context, certificates):
    factory, address = serve(context)
    seen: list[Any] = []

    class Looking(Upgrading):
        def record_state(self):
            transport = self.transport
            claims = [interface.providedBy(transport) for interface in (ISSLTransport, INegotiated, ITCPTransport)]
            has = [hasattr(transport, name) for name in ("getPeerCertificate", "negotiatedProtocol", "tls_version")]
            seen.append((transport, type(transport), str(transport.phase), claims, has))

        def dataReceived(self, data):
            self.record_state()
            super().dataReceived(data)
            self.record_state()

        def connectionLost(self, reason):
            self.record_state()
            super().connectionLost(reason)

    factory.protocol = Looking

    def client():
        with upgrade(address, certificates, b"go on\r\n") as sock:
            assert read(sock, 12) == b"first in TLS"
            assert exchange(sock, b"hello") == b"hello"
            sock.unwrap().close()

    yield deferToThread(client)
    yield factory.lost.addTimeout(DEADLINE, reactor)
    assert {transport for transport, *_ in seen} == {seen[0][0]}
    assert {of for _, of, *_ in seen} == {Connection}
    assert [phase for _, _, phase, _, _ in seen] == ["open", "tls", "open", "open", "open"]
    assert [claims for *_, claims, _ in seen] == [[False, False, True]] + 4 * [[True] * 3]
    assert [has for *_, has in seen] == [[False] * 3] + 4 * [[True] * 3]


@pytest.mark.parametrize("when", ["connectionMade", "after a write that waits for the reactor"])
@pytest_twisted.inlineCallbacks
def test_no_data_written_after_starttls_is_sent_unencrypted(serve, context, certificates, when):
    factory, address = serve(context)

    class Early(Upgrading):
        def connectionMade(self):
            if when == "connectionMade":
                self.begin()
            else:
                reactor.callLater(0, self.begin)

        def begin(self):
            self.transport.write(b"go on\r\n")
            self.transport.startTLS(self.factory.context)
            self.transport.write(b"first in TLS")

        def dataReceived(self, data):
            self.transport.write(data)

    factory.protocol = Early

    def client():
        sock = socket.create_connection(address, timeout=DEADLINE)
        assert read(sock, 7) == b"go on\r\n"
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(DEADLINE)
        trusting = ssl.create_default_context(cafile=certificates["ca.pem"])
        with trusting.wrap_socket(sock, server_hostname="localhost") as secure:
            assert read(secure, 12) == b"first in TLS"
            assert exchange(secure, b"hello") == b"hello"

    yield deferToThread(client)
    yield factory.lost.addTimeout(DEADLINE, reactor)


@pytest_twisted.inlineCallbacks
def test_starttls_raises_on_a_closing_connection(serve, context):
    factory, address = serve(context)
    problems: list[BaseException] = []
    opened: list[Any] = []

    class Closing(Upgrading):
        def connectionMade(self):
            opened.append(self.transport)

        def dataReceived(self, data):
            self.transport.write(b"bye")
            self.transport.loseConnection()
            reactor.callLater(0, self.too_late)

        def too_late(self):
            try:
                self.transport.startTLS(self.factory.context)
            except RuntimeError as problem:
                problems.append(problem)

    factory.protocol = Closing

    def client():
        with socket.create_connection(address, timeout=DEADLINE) as sock:
            sock.sendall(bytes(1 << 20))  # more than is read in one event
            with contextlib.suppress(ConnectionError):
                while sock.recv(1 << 16):
                    pass

    yield deferToThread(client)
    yield factory.lost.addTimeout(DEADLINE, reactor)
    assert [str(problem) for problem in problems] == ["this connection is closing"]
    assert factory.secure is False


@pytest_twisted.inlineCallbacks
def test_the_accepting_side_can_be_the_client_of_the_handshake(serve, certificates):
    factory, address = serve(ssl.create_default_context(cafile=certificates["ca.pem"]))
    factory.context.check_hostname = False

    class Reversed(Upgrading):
        def dataReceived(self, data):
            if data == STARTTLS:
                self.transport.startTLS(self.factory.context, normal=False)
                self.transport.write(b"first in TLS")
            else:
                self.transport.write(data)

    factory.protocol = Reversed
    server = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context

    def client():
        sock = socket.create_connection(address, timeout=DEADLINE)
        sock.sendall(STARTTLS)
        with server.wrap_socket(sock, server_side=True) as secure:
            assert read(secure, 12) == b"first in TLS"
            secure.sendall(b"and back")
            assert read(secure, 8) == b"and back"
            secure.unwrap().close()

    yield deferToThread(client)
    assert isinstance((yield factory.lost.addTimeout(DEADLINE, reactor)), ConnectionDone)
    assert factory.shaken == 1


@pytest_twisted.inlineCallbacks
def test_lose_connection_during_the_handshake_delivers_written_data(serve, certificates):
    context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
    factory, address = serve(context)

    class Closing(Upgrading):
        def dataReceived(self, data):
            super().dataReceived(data)
            self.transport.loseConnection()

    factory.protocol = Closing

    def client():
        with upgrade(address, certificates, b"go on\r\n") as sock:
            assert read(sock, 12) == b"first in TLS"
            assert sock.recv(1) == b""

    yield deferToThread(client)
    assert isinstance((yield factory.lost.addTimeout(DEADLINE, reactor)), ConnectionDone)


@pytest_twisted.inlineCallbacks
def test_a_stalled_handshake_ends_at_the_deadline(serve, context):
    factory, address = serve(context, handshake_timeout=0.1)
    sock = socket.create_connection(address, timeout=DEADLINE)
    sock.sendall(STARTTLS)
    reason = yield factory.lost.addTimeout(DEADLINE, reactor)
    assert isinstance(reason, ConnectionLost)
    assert factory.shaken == 0
    sock.close()


@pytest_twisted.inlineCallbacks
def test_a_context_for_the_other_side_is_rejected_and_ends_only_its_connection(serve):
    factory, address = serve(ssl.create_default_context())
    problems: list[BaseException] = []

    class Careful(Upgrading):
        def dataReceived(self, data):
            try:
                super().dataReceived(data)
            except ValueError as problem:
                problems.append(problem)
                self.transport.loseConnection()

    factory.protocol = Careful
    sock = socket.create_connection(address, timeout=DEADLINE)
    sock.sendall(STARTTLS)
    assert isinstance((yield factory.lost.addTimeout(DEADLINE, reactor)), ConnectionDone)
    assert "cannot be the server" in str(problems[0])
    sock.close()


@pytest_twisted.inlineCallbacks
def test_a_paused_producer_is_resumed_after_the_handshake(serve, context, certificates):
    """A transport that is its own producer is also paused again if its client does not read."""
    factory, address = serve(context)
    most = 0

    class Own(Upgrading):
        def dataReceived(self, data):
            nonlocal most
            if data == STARTTLS:
                self.transport.registerProducer(self.transport, True)
                self.transport.write(plain)
                self.transport.startTLS(self.factory.context)
            else:
                self.transport.write(data)
                most = max(most, self.transport.unsent)

    factory.protocol = Own
    plain = bytes(3_000_000)

    def client():
        with upgrade(address, certificates, plain) as sock:
            assert exchange(sock, b"hello") == b"hello"
            sock.setblocking(False)
            sent = 0
            with contextlib.suppress(ssl.SSLWantWriteError):
                while sent < 50_000_000:
                    sent += sock.send(bytes(1 << 16))
            return sent

    sent = yield deferToThread(client)
    assert sent < 50_000_000
    assert most < 1 << 20
    yield factory.lost.addTimeout(DEADLINE, reactor)


def exchange(sock, data):
    sock.sendall(data)
    return read(sock, len(data))


@pytest_twisted.inlineCallbacks
def test_resumed_reading_still_waits_until_plain_text_is_sent(serve, context, certificates):
    factory, address = serve(context)
    plain = bytes(8_000_000)

    class Eager(Upgrading):
        def dataReceived(self, data):
            if data == STARTTLS:
                self.transport.write(plain)
                self.transport.startTLS(self.factory.context)
                self.transport.resumeProducing()
            else:
                self.transport.write(data)

    factory.protocol = Eager

    def client():
        with upgrade(address, certificates, plain) as sock:
            return exchange(sock, b"hello")

    assert (yield deferToThread(client)) == b"hello"
    yield factory.lost.addTimeout(DEADLINE, reactor)


@pytest_twisted.inlineCallbacks
def test_starttls_raises_within_tls(serve, context, certificates):
    factory, address = serve(context)
    problems: list[BaseException] = []

    class Twice(Upgrading):
        def dataReceived(self, data):
            if data == STARTTLS:
                super().dataReceived(data)
            else:
                try:
                    self.transport.startTLS(self.factory.context)
                except RuntimeError as problem:
                    problems.append(problem)
                self.transport.write(data)

    factory.protocol = Twice

    def client():
        with upgrade(address, certificates, b"go on\r\n") as sock:
            assert read(sock, 12) == b"first in TLS"
            return exchange(sock, b"hello")

    assert (yield deferToThread(client)) == b"hello"
    assert [str(problem) for problem in problems] == ["this connection is in TLS already"]
    yield factory.lost.addTimeout(DEADLINE, reactor)


@pytest_twisted.inlineCallbacks
def test_close_sends_written_data_even_while_a_producer_is_paused(serve, context, certificates):
    factory, address = serve(context)
    content = os.urandom(8_000_000)
    made: Deferred = Deferred()

    class Own(Upgrading):
        """Registers its transport as its producer, as an echo protocol does."""

        def dataReceived(self, data):
            if data == STARTTLS:
                super().dataReceived(data)
            else:
                self.transport.registerProducer(self.transport, True)
                self.transport.write(content)
                made.callback(self.transport)

    factory.protocol = Own

    def rest(sock):
        received = bytearray()
        while piece := sock.recv(1 << 16):
            received += piece
        return bytes(received)

    with (yield deferToThread(upgrade, address, certificates, b"go on\r\n")) as sock:
        yield deferToThread(sock.sendall, b"go")
        transport = yield made.addTimeout(DEADLINE, reactor)
        assert transport.unsent
        transport.close("drained")
        received = yield deferToThread(rest, sock)
    assert received == b"first in TLS" + content
    yield factory.lost.addTimeout(DEADLINE, reactor)
