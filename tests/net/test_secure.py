"""TLS in the transport: the contract of plain connections, and what hostile or hasty peers may do, on loopback."""

import contextlib
import importlib.util
import os
import select
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, IHandshakeListener, ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, globalLogPublisher
from zope.interface import implementer

from rtservice.net.port import Port
from rtservice.net.tls import Context, ServerTLS
from tests.support.registered import is_registered

DEADLINE = 20
GREETING = b"Hello from the server!"

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl (Debian: openssl) is not installed")

# --- the server's side ---


class Recorder(Protocol):
    """Does what its factory's hooks say; the factory knows who came and went."""

    def connectionMade(self):
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data):
        self.factory.received += data
        self.factory.on_data(self, data)

    def connectionLost(self, reason):
        self.factory.lost.append(reason.value)
        self.factory.transports.append(ISSLTransport.providedBy(self.transport))


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    def readConnectionLost(self):
        self.factory.on_fin(self)

    def writeConnectionLost(self):
        self.factory.write_closed.set()


@implementer(IHandshakeListener)
class Listening(Recorder):
    def handshakeCompleted(self):
        self.factory.on_handshake(self)


def nothing(*_: Any) -> None:
    pass


def echo(protocol, data):
    protocol.transport.write(data)


class Recording(Factory):
    noisy = False

    def __init__(self, protocol=Recorder, on_connect=nothing, on_data=echo, on_fin=nothing, on_handshake=nothing):
        self.protocol = protocol
        self.on_connect, self.on_data, self.on_fin, self.on_handshake = on_connect, on_data, on_fin, on_handshake
        self.made: list[Any] = []
        self.lost: list[Any] = []
        self.transports: list[bool] = []  # whether each was in TLS at its end
        self.received = bytearray()
        self.write_closed = threading.Event()


class Timed:
    """The reactor, with the timers of a Clock."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.callLater = self.clock.callLater

    def __getattr__(self, name: str) -> Any:
        return getattr(reactor, name)


class Served:
    """A port in service, and every connection that it opened and closed."""

    def __init__(self, factory: Recording, tls: Context, on: Any, timeout: float) -> None:
        self.factory = factory
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.socket.setblocking(False)
        self.address = self.socket.getsockname()
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.port = Port(
            on,
            self.socket,
            factory,
            name="ssl:test",
            tls=tls,
            handshake_timeout=timeout,
            opened=self.opened.append,
            closed=lambda connection, reason: self.closed.append((connection, reason.value)),
        )
        self.port.startListening()

    def stop(self) -> None:
        self.port.stopListening()
        self.socket.close()
        gone = [connection for connection, _ in self.closed]
        for connection in self.opened:
            if connection not in gone:
                connection.abortConnection()


# Whose TLS it is: what is true of our own alone, and what also with Twisted's on our transport.
needs_pyopenssl = pytest.mark.skipif(
    importlib.util.find_spec("OpenSSL") is None, reason="pyOpenSSL (twisted[tls]) is not installed"
)
BOTH = pytest.mark.parametrize("library", ["ssl", pytest.param("pyopenssl", marks=needs_pyopenssl)])


@pytest.fixture
def library() -> str:
    return "ssl"


@pytest.fixture
def contexts(certificates, library):
    """Makes server contexts, by default with one certificate and nothing special."""

    def make(name: str = "server", **settings: Any) -> Context:
        files = certificates[f"{name}.key"], certificates[f"{name}.pem"]
        return ServerTLS(*files, library=library, **settings).load().context

    return make


@pytest.fixture
def serve(contexts):
    """Serves a factory over TLS on a free loopback port."""
    started: list[Served] = []

    def start(factory: Recording, *, on: Any = reactor, timeout: float = 10.0, **settings: Any) -> Served:
        one = Served(factory, contexts(**settings), on, timeout)
        started.append(one)
        return one

    yield start
    for one in started:
        one.stop()

    # An aborted connection ends in a later event; on a Clock of the test's it ends never, and has no need to.
    def ended() -> bool:
        return all(len(one.opened) == len(one.closed) for one in started if not isinstance(one.port.reactor, Timed))

    pytest_twisted.blockon(eventually(ended))
    for one in started:
        if isinstance(one.port.reactor, Timed):
            one.port.reactor.clock.advance(0)


@pytest_twisted.inlineCallbacks
def eventually(true: Callable[[], Any]) -> Any:
    """Fires when the function gives something true, with that."""
    end = time.monotonic() + DEADLINE
    while not (value := true()):
        assert time.monotonic() < end, "the deadline has passed"
        yield deferLater(reactor, 0.002, nothing)
    return value


# --- the client's side ---


class ResetError(Exception):
    """The server reset the connection."""


class Client:
    """A client of TLS whose every record is the test's to send, on a blocking socket."""

    def __init__(self, address, context: ssl.SSLContext, *, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(DEADLINE)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname="localhost")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: Any) -> None:
        self.sock.close()

    def flush(self) -> None:
        if data := self.outgoing.read():
            self.sock.sendall(data)

    def feed(self) -> None:
        """Read once from the socket; raises ResetError."""
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            raise ResetError from None
        if data:
            self.incoming.write(data)
        else:
            self.incoming.write_eof()

    def shake(self, *, finish: bool = True) -> "Client":
        """Do the handshake; the last flight stays to be sent with `flush` unless told to finish."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self.feed()
            else:
                break
        if finish:
            self.flush()
        return self

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.tls.write(view[: 1 << 18]) :]
            self.flush()

    def read(self) -> bytes:
        """What came; b"" at the server's close_notify. Raises SSLEOFError at a FIN without one, and ResetError."""
        while True:
            try:
                return self.tls.read(1 << 16)
            except ssl.SSLZeroReturnError:  # instead of b"", once our own is sent
                return b""
            except ssl.SSLWantReadError:
                self.feed()

    def read_exactly(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            piece = self.read()
            assert piece, f"close_notify after {len(received)} bytes of {size}"
            received += piece
        return bytes(received)

    def read_to_end(self) -> bytes:
        """All that comes until the server's close_notify, which FIN has to follow."""
        received = bytearray()
        while piece := self.read():
            received += piece
        assert not self.incoming.pending
        assert self.sock.recv(100) == b""
        return bytes(received)

    def close_notify(self) -> None:
        """Say that nothing more is sent; what the server sends can be read on."""
        assert not self.incoming.pending  # OpenSSL would look for the server's close_notify in it
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        self.flush()

    def fin(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        reset(self.sock)

    def exchange(self, data: bytes) -> bytes:
        """Send and read at the same time, say close_notify after the data, and read to the server's."""
        received = bytearray()
        view = memoryview(data)
        waiting = memoryview(b"")
        notified = False
        self.sock.setblocking(False)
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            if not waiting:
                if view:
                    view = view[self.tls.write(view[: 1 << 16]) :]
                elif not notified and not self.incoming.pending:
                    notified = True
                    with contextlib.suppress(ssl.SSLWantReadError):
                        self.tls.unwrap()
                waiting = memoryview(self.outgoing.read())
            readable, writable, _ = select.select([self.sock], [self.sock] if waiting else [], [], 1)
            if writable:
                waiting = waiting[self.sock.send(waiting) :]
            if readable:
                self.feed()
                try:
                    while piece := self.tls.read(1 << 16):
                        received += piece
                    return bytes(received)
                except ssl.SSLZeroReturnError:
                    return bytes(received)
                except ssl.SSLWantReadError:
                    pass
        raise AssertionError("the deadline has passed")


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.fixture
def trusting(certificates):
    """Makes client contexts that trust the root and check the name."""

    def make(version: str = "", certificate: str = "", alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=certificates["ca.pem"])
        if version:
            context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
        if certificate:
            context.load_cert_chain(certificates[f"{certificate}.pem"], certificates[f"{certificate}.key"])
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    return make


@pytest.fixture
def logged():
    """The errors that were logged."""
    events: list[Any] = []

    def observe(event):
        if event["log_level"] >= LogLevel.error:
            events.append(event)

    globalLogPublisher.addObserver(observe)
    yield events
    globalLogPublisher.removeObserver(observe)


VERSIONS = pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])

# --- the exchange ---


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_client_is_greeted_and_echoed(serve, trusting, version):
    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            assert peer.tls.version() == version.replace("_", ".")
            assert peer.read_exactly(22) == GREETING
            for message in (b"hello", b"\0", os.urandom(16384), os.urandom(100_000)):
                peer.write(message)
                assert peer.read_exactly(len(message)) == message
            peer.close_notify()
            return peer.read_to_end()

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.write(GREETING)))
    rest = yield deferToThread(client)
    assert rest == b""
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionDone)
    assert isinstance(served.factory.lost[0], ConnectionDone)
    assert connection.bytes_in == 5 + 1 + 16384 + 100_000
    assert connection.bytes_out == 22 + connection.bytes_in


@VERSIONS
@pytest.mark.parametrize("protocol", [Recorder, HalfClosing])
@pytest_twisted.inlineCallbacks
def test_half_close_echoes_everything_received_and_answers_with_close_notify(serve, trusting, version, protocol):
    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            answer = peer.exchange(data)
            peer.sock.settimeout(DEADLINE)
            assert peer.sock.recv(10) == b""
            return answer

    factory = Recording(protocol, on_fin=lambda protocol: protocol.transport.loseConnection())
    served = serve(factory)
    data = os.urandom(4 << 20)
    answer = yield deferToThread(client)
    assert answer == data
    yield eventually(lambda: served.closed)
    assert isinstance(served.closed[0][1], ConnectionDone)
    assert served.closed[0][0].peer_finished
    assert served.closed[0][0].error is None


@BOTH
@VERSIONS
@pytest_twisted.inlineCallbacks
def test_data_and_close_notify_in_one_segment_are_all_answered(serve, trusting, version):
    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            assert peer.read_exactly(22) == GREETING
            for i in range(200):
                peer.tls.write(b"%03d" % i)
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.unwrap()
            peer.flush()
            peer.fin()
            return peer.read_to_end()

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.write(GREETING)))
    answer = yield deferToThread(client)
    assert answer == b"".join(b"%03d" % i for i in range(200))


@BOTH
@VERSIONS
@pytest.mark.parametrize("notify", [False, True], ids=["open", "close_notify"])
@pytest_twisted.inlineCallbacks
def test_data_right_with_the_clients_finished_is_not_lost(serve, trusting, version, notify):
    """In TLS 1.3 the client may send right after its Finished; in 1.2 it waits for the server's, which does no harm."""

    def client():
        with Client(served.address, trusting(version)) as peer:
            peer.shake(finish=False)
            for _ in range(50):
                peer.tls.write(b"early")
            if notify and version == "TLSv1_3":
                with contextlib.suppress(ssl.SSLWantReadError):
                    peer.tls.unwrap()
            peer.flush()
            answer = peer.read_exactly(22 + 250)
            if notify and version == "TLSv1_2":
                peer.close_notify()
            if notify:
                peer.read_to_end()
            return answer

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.write(GREETING)))
    answer = yield deferToThread(client)
    assert answer == GREETING + b"early" * 50


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_thousand_records_in_few_segments_are_all_handled(serve, trusting):
    def client():
        with Client(served.address, trusting()).shake() as peer:
            for i in range(1000):
                peer.tls.write(b"%04d" % i)
            peer.flush()
            return peer.read_exactly(4000)

    served = serve(Recording())
    answer = yield deferToThread(client)
    assert answer == b"".join(b"%04d" % i for i in range(1000))


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_record_that_comes_byte_by_byte_is_handled_once_it_is_whole(serve, trusting):
    def client():
        with Client(served.address, trusting()) as peer:
            peer.outgoing, real = peer.outgoing, peer.outgoing
            peer.flush = lambda: [peer.sock.send(bytes([byte])) for byte in real.read()]
            peer.shake()
            peer.write(b"hello")
            return peer.read_exactly(5)

    served = serve(Recording())
    answer = yield deferToThread(client)
    assert answer == b"hello"
    assert served.factory.received == b"hello"


# --- much to write ---


@VERSIONS
@pytest.mark.parametrize("pieces", [1, 800], ids=["one write", "800 writes"])
@pytest_twisted.inlineCallbacks
def test_fifty_mebibytes_reach_a_slow_reader_in_bounded_memory_and_end_with_close_notify(
    serve, trusting, version, pieces
):
    size = 50 << 20
    step = size // pieces
    data = os.urandom(step) * pieces
    chunks = [data[i : i + step] for i in range(0, size, step)]

    def write_and_close(protocol):
        tracemalloc.start()
        for chunk in chunks:
            protocol.transport.write(chunk)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, trusting(version), receive_buffer=64 * 1024).shake() as peer:
            received = bytearray()
            while piece := peer.read():
                received += piece
            assert peer.sock.recv(10) == b""
            return received == data

    served = serve(Recording(on_connect=write_and_close))
    try:
        same = yield deferToThread(client)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert same
    # The client's copy is in this process too; the rest is what the server keeps beyond what it was given.
    assert peak < size * 1.15 + (4 << 20)
    yield eventually(lambda: served.closed)
    assert isinstance(served.closed[0][1], ConnectionDone)
    assert served.closed[0][0].bytes_out == size


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_lose_connection_right_after_a_large_write_delivers_everything_and_close_notify(serve, trusting, version):
    data = os.urandom(5 << 20)

    def write_and_close(protocol):
        protocol.transport.writeSequence([data[: 1 << 20], data[1 << 20 :]])
        protocol.transport.loseConnection()
        protocol.transport.write(b"")

    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=write_and_close))
    answer = yield deferToThread(client)
    assert answer == data


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_slow_reader_that_speaks_meanwhile_loses_nothing(serve, trusting):
    """Reads and writes alternate on one TLS state, with a write that the kernel refused in between."""
    data = os.urandom(8 << 20)

    def client():
        with Client(served.address, trusting(), receive_buffer=16 * 1024).shake() as peer:
            for i in range(100):
                peer.write(b"%04d" % i)
            received = bytearray()
            while len(received) < len(data):
                received += peer.read()
                if len(received) % 7 == 0:
                    peer.write(b"....")
            peer.write(b"END.")
            return received == data

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.write(data), on_data=nothing))
    same = yield deferToThread(client)
    assert same
    yield eventually(lambda: served.factory.received.endswith(b"END."))
    assert served.factory.received[:400] == b"".join(b"%04d" % i for i in range(100))


@pytest_twisted.inlineCallbacks
def test_writes_of_one_event_are_one_record(serve, trusting):
    sends: list[int] = []

    def write_many(protocol, data):
        send = protocol.transport._send
        protocol.transport._send = lambda piece: sends.append(len(piece)) or send(piece)
        for i in range(1000):
            protocol.transport.write(b"%04d" % i)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, trusting()).shake() as peer:
            peer.write(b"go")
            return peer.read_to_end()

    served = serve(Recording(on_data=write_many))
    answer = yield deferToThread(client)
    assert answer == b"".join(b"%04d" % i for i in range(1000))
    assert len(sends) == 2, "one record with all of it, and close_notify"
    assert 4000 < sends[0] < 4100


@pytest_twisted.inlineCallbacks
def test_writes_outside_of_events_are_sent(serve, trusting):
    def later(protocol, data):
        reactor.callLater(0, protocol.transport.write, b"one")
        reactor.callLater(0, protocol.transport.writeSequence, [b"two", b"three"])
        reactor.callLater(0.01, protocol.transport.write, bytearray(b"four"))
        reactor.callLater(0.02, protocol.transport.loseConnection)

    def client():
        with Client(served.address, trusting()).shake() as peer:
            peer.write(b"x")
            return peer.read_to_end()

    served = serve(Recording(on_data=later))
    answer = yield deferToThread(client)
    assert answer == b"onetwothreefour"


# --- producers ---


@pytest_twisted.inlineCallbacks
def test_a_pull_producer_gives_its_whole_content(serve, trusting):
    class Puller:
        left = 500

        def resumeProducing(self):
            if not self.left:
                self.transport.unregisterProducer()
                self.transport.loseConnection()
                return
            self.left -= 1
            self.transport.write(b"x" * 10_000)

        def stopProducing(self):
            pass

    def start(protocol):
        puller = Puller()
        puller.transport = protocol.transport
        protocol.transport.registerProducer(puller, False)

    def client():
        with Client(served.address, trusting()).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=start))
    answer = yield deferToThread(client)
    assert answer == b"x" * 5_000_000


@pytest_twisted.inlineCallbacks
def test_a_push_producer_is_paused_and_resumed_until_its_content_is_sent(serve, trusting):
    calls: list[str] = []

    class Pusher:
        rounds = 20
        paused = False

        def produce(self):
            while not self.paused and self.rounds:
                self.rounds -= 1
                self.transport.write(b"x" * 100_000)
            if not self.rounds and not self.paused:
                self.transport.unregisterProducer()
                self.transport.loseConnection()

        def pauseProducing(self):
            calls.append("pause")
            self.paused = True

        def resumeProducing(self):
            calls.append("resume")
            self.paused = False
            self.produce()

        def stopProducing(self):
            calls.append("stop")

    def start(protocol):
        pusher = Pusher()
        pusher.transport = protocol.transport
        protocol.transport.registerProducer(pusher, True)
        pusher.produce()

    def client():
        with Client(served.address, trusting()).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=start))
    answer = yield deferToThread(client)
    assert answer == b"x" * 2_000_000
    assert calls == ["pause", "resume"] * 20


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_producer_is_stopped_when_its_peer_goes(serve, trusting):
    calls: list[str] = []

    class Pusher:
        pauseProducing = resumeProducing = nothing

        def stopProducing(self):
            calls.append("stop")

    def client():
        Client(served.address, trusting()).shake().reset()

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.registerProducer(Pusher(), True)))
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    assert calls == ["stop"]


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_paused_reading_loses_nothing(serve, trusting, version):
    def pause(protocol, data):
        protocol.transport.pauseProducing()
        reactor.callLater(0.002, resume, protocol, data)

    def resume(protocol, data):
        protocol.transport.write(data)
        protocol.transport.resumeProducing()

    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            answer = peer.exchange(data)
            return answer == data

    served = serve(Recording(on_data=pause))
    data = os.urandom(1 << 20)
    same = yield deferToThread(client)
    assert same


@pytest_twisted.inlineCallbacks
def test_what_came_while_reading_was_paused_is_there_without_another_packet(serve, trusting):
    """Nothing of it may wait inside of TLS, where the kernel does not see it."""
    made: Deferred = Deferred()

    def pause(protocol):
        protocol.transport.pauseProducing()
        made.callback(protocol)

    def client():
        peer = Client(served.address, trusting()).shake(finish=False)
        peer.tls.write(b"first")
        peer.tls.write(b"second")
        peer.flush()
        return peer

    served = serve(Recording(on_connect=pause))
    peer = yield deferToThread(client)
    with peer:
        protocol = yield made.addTimeout(DEADLINE, reactor)
        for _ in range(20):
            yield deferToThread(nothing)  # a turn of the reactor, with its poll
        assert served.factory.received == b""
        protocol.transport.resumeProducing()
        answer = yield deferToThread(peer.read_exactly, 11)
    assert answer == b"firstsecond"


# --- ends ---


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_fin_without_close_notify_is_a_connection_lost(serve, trusting, version, logged):
    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            peer.write(b"cut?")
            assert peer.read_exactly(4) == b"cut?"
            peer.fin()
            with pytest.raises((ssl.SSLError, ResetError)):
                peer.read()

    served = serve(Recording(HalfClosing))
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionLost)
    assert isinstance(served.factory.lost[0], ConnectionLost)
    assert isinstance(connection.error, ssl.SSLEOFError)
    assert logged == []


@BOTH
@pytest.mark.parametrize("moment", ["connected", "hello", "shaken", "reading", "writing"])
@pytest_twisted.inlineCallbacks
def test_a_peer_that_resets_ends_its_connection_alone(serve, trusting, moment, logged):
    def client():
        peer = Client(served.address, trusting())
        if moment == "hello":
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.do_handshake()
            peer.flush()
            peer.sock.recv(1)
        elif moment == "shaken":
            peer.shake()
        elif moment == "reading":
            peer.shake()
            peer.tls.write(b"x" * 10000)
            peer.sock.sendall(peer.outgoing.read()[:5000])  # half a record
        elif moment == "writing":
            peer.shake()
            peer.write(b"give")
            peer.read_exactly(100_000)
        peer.reset()

    served = serve(Recording(on_data=lambda protocol, data: protocol.transport.write(b"x" * (50 << 20))))
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionLost)
    assert isinstance(connection.error, OSError)
    assert logged == []
    assert reactor_is_free_of(connection)


def reactor_is_free_of(connection) -> bool:
    return not is_registered(connection) and connection.fileno() == -1


GARBAGE = {
    "zeros": bytes(1000),
    "noise": bytes(range(255, -1, -1)) * 4,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "plain text": b"hello\n",
    "ssl2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(40),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "data before the handshake": b"\x17\x03\x03\x00\x05hello",
    "a hello of nothing": b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
    "a record too long": b"\x16\x03\x01\xff\xff" + bytes(100),
    "one byte and FIN": b"\x16",
    "nothing and FIN": b"",
}


@BOTH
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest_twisted.inlineCallbacks
def test_garbage_instead_of_a_client_hello_is_closed_at_once(serve, garbage, logged):
    def client():
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            sock.sendall(garbage)
            if len(garbage) < 2:
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # what was not read makes the kernel say so
                while sock.recv(1000):
                    pass

    served = serve(Recording())
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionLost)
    assert connection.error is not None
    assert (served.factory.made, logged) == ([], [])
    assert reactor_is_free_of(connection)


@BOTH
@pytest_twisted.inlineCallbacks
def test_every_prefix_of_a_handshake_may_be_the_last_of_a_client(serve, trusting, logged):
    """With FIN or with RST, after each of many parts of both of a client's flights."""

    def client():
        count = 0
        for version in ("TLSv1_2", "TLSv1_3"):
            for end in (socket.socket.close, reset):
                for cut in (0, 1, 5, 6, 50, 150, 10_000):
                    peer = Client(served.address, trusting(version))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        peer.tls.do_handshake()
                    hello = peer.outgoing.read()
                    peer.sock.sendall(hello[:cut])
                    end(peer.sock)
                    count += 1
                for cut in (1, 5, 6, 20, 40):
                    peer = Client(served.address, trusting(version))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        peer.tls.do_handshake()
                    peer.flush()
                    while not (flight := peer.outgoing.read()):
                        peer.feed()
                        with contextlib.suppress(ssl.SSLWantReadError):
                            peer.tls.do_handshake()
                    peer.sock.sendall(flight[:cut])
                    end(peer.sock)
                    count += 1
        return count

    served = serve(Recording())
    count = yield deferToThread(client)
    yield eventually(lambda: len(served.closed) == count)
    assert all(isinstance(reason, ConnectionLost) for _, reason in served.closed)
    assert (served.factory.made, logged) == ([], [])


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_record_that_was_tampered_with_ends_its_connection(serve, trusting, version, logged):
    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            peer.tls.write(b"hello")
            record = bytearray(peer.outgoing.read())
            record[-1] ^= 1
            peer.sock.sendall(record)
            with pytest.raises((ssl.SSLError, ResetError)):
                peer.read()

    served = serve(Recording())
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionLost)
    assert connection.error.reason == "DECRYPTION_FAILED_OR_BAD_RECORD_MAC"
    assert (bytes(served.factory.received), logged) == (b"", [])


@pytest_twisted.inlineCallbacks
def test_abort_resets_the_peer_and_drops_what_is_unsent(serve, trusting):
    def abort(protocol, data):
        protocol.transport.write(b"never")
        protocol.transport.abortConnection()
        assert not served.factory.lost  # the protocol hears of it in a later event

    def client():
        with Client(served.address, trusting()).shake() as peer:
            peer.write(b"x")
            with pytest.raises(ResetError):
                peer.read()

    served = serve(Recording(on_data=abort))
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    ((connection, reason),) = served.closed
    assert isinstance(reason, ConnectionAborted)
    assert connection.bytes_out == 0


@BOTH
@pytest_twisted.inlineCallbacks
def test_lose_connection_while_much_is_unsent_survives_a_client_that_answers_close_notify_first(serve, trusting):
    """Both say close_notify at once; what is unsent is sent all the same."""
    data = os.urandom(4 << 20)

    def write_and_close(protocol, _):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, trusting(), receive_buffer=16 * 1024).shake() as peer:
            peer.tls.write(b"x")
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.unwrap()
            peer.flush()
            peer.fin()
            return peer.read_to_end() == data

    served = serve(Recording(on_data=write_and_close))
    same = yield deferToThread(client)
    assert same


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_client_that_sends_on_while_we_close_gets_every_byte_and_no_reset(serve, trusting, version):
    data = os.urandom(4 << 20)

    def write_and_close(protocol, _):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            received, waiting = bytearray(), memoryview(b"")
            peer.sock.setblocking(False)
            while True:
                if not waiting:
                    peer.tls.write(bytes(16384))
                    waiting = memoryview(peer.outgoing.read())
                readable, writable, _ = select.select([peer.sock], [peer.sock], [], DEADLINE)
                if writable:
                    waiting = waiting[peer.sock.send(waiting) :]
                if readable:
                    peer.feed()
                    with contextlib.suppress(ssl.SSLWantReadError):
                        while piece := peer.tls.read(1 << 16):
                            received += piece
                        return received == data

    served = serve(Recording(on_data=write_and_close))
    for count in range(1, 11):
        same = yield deferToThread(client)
        assert same
        yield eventually(lambda count=count: len(served.closed) == count)
    assert [type(reason) for reason in served.factory.lost] == [ConnectionDone] * 10
    assert served.factory.transports == [True] * 10


@pytest.mark.parametrize("where", ["on_connect", "on_data", "on_fin", "on_handshake"])
@pytest_twisted.inlineCallbacks
def test_a_protocol_that_raises_loses_its_connection_alone_and_is_logged_once(serve, trusting, where, logged):
    def fail(*_):
        raise ZeroDivisionError("of the test")

    def client():
        # The server may be gone at any of these steps.
        with contextlib.suppress(OSError, ResetError), Client(served.address, trusting()).shake() as peer:
            peer.write(b"x")
            if where == "on_fin":
                peer.read_exactly(1)
            peer.close_notify()
            while peer.read():
                pass

    @implementer(IHandshakeListener)
    class Both(HalfClosing):
        def handshakeCompleted(self):
            self.factory.on_handshake(self)

    served = serve(Recording(Both, **{where: fail}))
    good = serve(Recording())
    bystander = yield deferToThread(lambda: Client(good.address, trusting()).shake())
    with bystander:
        yield deferToThread(client)
        yield eventually(lambda: served.closed)
        assert isinstance(served.closed[0][1], ZeroDivisionError)
        assert isinstance(served.factory.lost[0], ZeroDivisionError)
        assert [event["log_failure"].type for event in logged] == [ZeroDivisionError]
        bystander.write(b"still here")
        answer = yield deferToThread(bystander.read_exactly, 10)
        assert answer == b"still here"


@BOTH
@pytest.mark.parametrize("build", [lambda address: None, lambda address: 1 / 0], ids=["None", "raises"])
@pytest_twisted.inlineCallbacks
def test_a_client_for_whom_no_protocol_is_built_is_closed(serve, trusting, build):
    def client():
        with Client(served.address, trusting()).shake() as peer, contextlib.suppress(ssl.SSLEOFError, ResetError):
            assert peer.read() == b""

    factory = Recording()
    factory.buildProtocol = build
    served = serve(factory)
    yield deferToThread(client)
    yield eventually(lambda: served.closed)


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_lose_write_connection_sends_close_notify_and_goes_on_reading(serve, trusting, version):
    def on_data(protocol, data):
        if data == b"first":
            protocol.transport.write(b"last words")
            protocol.transport.loseWriteConnection()

    def client():
        with Client(served.address, trusting(version)).shake() as peer:
            peer.write(b"first")
            answer = b""
            while piece := peer.read():
                answer += piece
            # An answer within the microseconds in which `ssl` closes would end the connection.
            assert served.factory.write_closed.wait(DEADLINE)
            peer.write(b"second")
            with contextlib.suppress(ssl.SSLError):
                peer.tls.unwrap()
            peer.flush()
            peer.fin()
            assert peer.sock.recv(10) == b""
            return answer

    served = serve(Recording(HalfClosing, on_data=on_data, on_fin=lambda protocol: protocol.transport.loseConnection()))
    answer = yield deferToThread(client)
    assert answer == b"last words"
    yield eventually(lambda: served.closed)
    assert served.factory.received == b"firstsecond"
    assert isinstance(served.closed[0][1], ConnectionDone)


# --- handshakes ---


@BOTH
@pytest.mark.parametrize("sent", ["nothing", "half a hello", "hello"])
@pytest_twisted.inlineCallbacks
def test_fifty_handshakes_that_stall_are_gone_at_the_deadline_with_all_they_held(serve, trusting, sent):
    def clients():
        peers = []
        for _ in range(50):
            peer = Client(served.address, trusting())
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.tls.do_handshake()
            hello = peer.outgoing.read()
            peer.sock.sendall({"nothing": b"", "half a hello": hello[:100], "hello": hello}[sent])
            if sent == "hello":
                peer.sock.recv(1)  # the server has answered
            peers.append(peer)
        return peers

    def all_ended():
        for peer in peers:
            with contextlib.suppress(ConnectionResetError):
                while peer.sock.recv(10_000):
                    pass
            peer.sock.close()

    timed = Timed()
    served = serve(Recording(), on=timed, timeout=10)
    before = len(os.listdir("/proc/self/fd"))
    peers = yield deferToThread(clients)
    yield eventually(lambda: len(served.opened) == 50)
    timed.clock.advance(9.9)
    assert served.closed == []
    timed.clock.advance(0.2)
    assert len(served.closed) == 50
    for connection, reason in served.closed:
        assert isinstance(reason, ConnectionLost)
        assert str(connection.error) == "TLS handshake timed out"
        assert reactor_is_free_of(connection)
    assert timed.clock.getDelayedCalls() == []
    yield deferToThread(all_ended)
    assert len(os.listdir("/proc/self/fd")) <= before
    assert served.factory.made == []


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_handshake_that_is_done_or_failed_leaves_no_timer(serve, trusting):
    def good():
        return Client(served.address, trusting()).shake()

    def bad():
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                sock.recv(1000)

    timed = Timed()
    served = serve(Recording(), on=timed, timeout=10)
    peer = yield deferToThread(good)
    with peer:
        yield deferToThread(bad)
        yield eventually(lambda: served.closed and served.factory.made)
        assert timed.clock.getDelayedCalls() == []
        timed.clock.advance(100)
        peer.write(b"still here")
        answer = yield deferToThread(peer.read_exactly, 10)
        assert answer == b"still here"


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_client_that_trickles_its_hello_is_gone_at_the_deadline_all_the_same(serve, trusting):
    timed = Timed()
    served = serve(Recording(), on=timed, timeout=10)
    peer = yield deferToThread(Client, served.address, trusting())
    with peer:
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.tls.do_handshake()
        hello = peer.outgoing.read()
        yield eventually(lambda: served.opened)
        for i in range(101):
            assert served.closed == []
            peer.sock.sendall(hello[i : i + 1])
            for _ in range(3):
                yield deferToThread(nothing)  # a turn of the reactor, with its poll
            timed.clock.advance(0.1)
        assert len(served.closed) == 1


@pytest_twisted.inlineCallbacks
def test_abort_and_lose_during_a_handshake_end_it(serve, trusting):
    served = serve(Recording())
    peers = []
    for _ in range(2):
        peers.append((yield deferToThread(socket.create_connection, served.address, DEADLINE)))
    yield eventually(lambda: len(served.opened) == 2)
    served.opened[0].abortConnection()
    yield eventually(lambda: len(served.closed) == 1)
    with pytest.raises(ConnectionResetError):
        yield deferToThread(peers[0].recv, 10)
    # A write and a close of before the handshake's end wait for it.
    served.opened[1].write(b"last words")
    served.opened[1].loseConnection()

    def client():
        peer = Client.__new__(Client)
        peer.sock, peer.incoming, peer.outgoing = peers[1], ssl.MemoryBIO(), ssl.MemoryBIO()
        peer.tls = trusting().wrap_bio(peer.incoming, peer.outgoing, server_hostname="localhost")
        return peer.shake().read_to_end()

    answer = yield deferToThread(client)
    assert answer == b"last words"
    for peer in peers:
        peer.close()


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_port_that_stops_leaves_handshakes_and_connections_to_go_on(serve, trusting):
    served = serve(Recording())
    done = yield deferToThread(lambda: Client(served.address, trusting()).shake())
    peer = yield deferToThread(Client, served.address, trusting())
    with done, peer:
        yield eventually(lambda: len(served.opened) == 2)
        served.port.stopListening()
        yield deferToThread(peer.shake)
        for one in (done, peer):
            one.write(b"hello")
            answer = yield deferToThread(one.read_exactly, 5)
            assert answer == b"hello"


# --- what a protocol can know ---


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_protocol_knows_version_cipher_alpn_and_certificate_in_connection_made(
    serve, trusting, version, certificates
):
    seen: dict[str, Any] = {}
    calls: list[str] = []

    def look(protocol):
        calls.append("connectionMade")
        transport = protocol.transport
        seen["version"], seen["cipher"] = transport.tls_version, transport.tls_cipher
        seen["alpn"] = transport.negotiatedProtocol
        seen["subject"] = transport.getPeerCertificate()["subject"]
        seen["handle"] = transport.getHandle()
        seen["peer"], seen["host"] = transport.getPeer().port, transport.getHost().port

    def client():
        context = trusting(version, certificate="client", alpn=("x", "echo"))
        with Client(served.address, context).shake() as peer:
            peer.write(b"hello")
            peer.read_exactly(5)
            peer.close_notify()
            peer.read_to_end()
            return peer.tls.cipher()[0], peer.tls.selected_alpn_protocol()

    factory = Recording(Listening, on_connect=look, on_handshake=lambda protocol: calls.append("handshakeCompleted"))
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
    # It can still be told at the end, for a record.
    assert served.closed[0][0].tls_version == version.replace("_", ".")
    assert served.closed[0][0].getPeerCertificate()["subject"] == seen["subject"]


@pytest_twisted.inlineCallbacks
def test_nothing_is_known_of_a_client_without_certificate_and_alpn_or_before_its_handshake(serve, trusting):
    served = serve(Recording(), alpn=("echo",))
    peer = yield deferToThread(Client, served.address, trusting())
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
def test_a_client_ca_lets_in_its_own_alone(serve, trusting, version, certificate, certificates, logged):
    def client():
        with Client(served.address, trusting(version, certificate=certificate)) as peer:
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
def test_a_minimum_of_1_3_refuses_1_2(serve, trusting):
    def client():
        with Client(served.address, trusting("TLSv1_2")) as peer, pytest.raises((ssl.SSLError, ResetError)):
            peer.shake()

    served = serve(Recording(), minimum="1.3")
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    assert served.closed[0][0].error.reason == "UNSUPPORTED_PROTOCOL"


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_session_can_be_resumed(serve, trusting, version):
    def client():
        context = trusting(version)
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
def test_many_clients_at_once_each_get_their_own_bytes_back(serve, trusting):
    def client(number: int):
        data = bytes([number]) * 300_000
        with Client(served.address, trusting()).shake() as peer:
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


# --- what `openssl s_client` can do and `ssl` cannot ---


class OpenSSLClient:
    """An `openssl s_client` whose input is the test's, and whose output is read as it comes."""

    def __init__(self, address, *options: str) -> None:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{address[1]}", *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self.output = bytearray()
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            with self._news:
                self.output += data or b"<end of output>"
                self._news.notify_all()
            if not data:
                return

    def send(self, data: bytes) -> None:
        """One write, so one command: s_client looks at the first byte of what it reads."""
        self.process.stdin.write(data)

    def wait(self, text: bytes, count: int = 1) -> None:
        end = time.monotonic() + DEADLINE
        with self._news:
            while self.output.count(text) < count:
                assert not self.output.endswith(b"<end of output>"), self.output
                assert self._news.wait(end - time.monotonic()), (text, self.output)

    def __enter__(self) -> "OpenSSLClient":
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        with self._news:
            self._news.wait_for(lambda: self.output.endswith(b"<end of output>"), DEADLINE)
        self.process.stdout.close()


@BOTH
@needs_openssl
@pytest_twisted.inlineCallbacks
def test_a_peer_may_update_its_keys_and_ask_for_ours(serve):
    def client():
        with OpenSSLClient(served.address, "-tls1_3") as peer:
            peer.send(b"first\n")
            peer.wait(b"first\n")
            for i, command in enumerate((b"K\n", b"k\n", b"K\n", b"K\n")):
                peer.send(command)
                peer.wait(b"KEYUPDATE", i + 1)
                peer.send(b"message %d\n" % i)
                peer.wait(b"message %d\n" % i)

    served = serve(Recording())
    yield deferToThread(client)
    assert served.factory.received == b"first\nmessage 0\nmessage 1\nmessage 2\nmessage 3\n"
    yield eventually(lambda: served.closed)


@BOTH
@needs_openssl
@pytest_twisted.inlineCallbacks
def test_a_renegotiation_is_refused_and_others_do_not_notice(serve, trusting, logged):
    def client():
        with OpenSSLClient(served.address, "-tls1_2") as peer:
            peer.send(b"first\n")
            peer.wait(b"first\n")
            peer.send(b"R\n")
            peer.wait(b"RENEGOTIATING")
            peer.wait(b"<end of output>")
            return bytes(peer.output)

    served = serve(Recording())
    bystander = yield deferToThread(lambda: Client(served.address, trusting("TLSv1_2")).shake())
    with bystander:
        output = yield deferToThread(client)
        assert b"no renegotiation" in output
        yield eventually(lambda: served.closed)
        bystander.write(b"still here")
        answer = yield deferToThread(bystander.read_exactly, 10)
        assert answer == b"still here"
    assert logged == []
