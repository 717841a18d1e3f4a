"""Hostile clients of pyOpenSSL streams (`library=pyopenssl`, startTLS): their cost is bounded."""

import contextlib
import gc
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.error import ConnectionLost
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from rtservice.net.connection import LOST, LocalClose
from rtservice.net.listen_types import open_description
from rtservice.net.port import Port
from rtservice.net.tls_bounds import (
    ANSWER_TIMEOUT,
    ANSWERS_NOT_READ,
    FIRST_READ,
    FULL_READ,
    HANDSHAKE_TOO_LARGE,
    MAX_BYTES_WITHOUT_DATA,
    MAX_HANDSHAKE_BYTES,
    MAX_RECORDS,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.recording import Recorder, Recording, nothing
from tests.support.registered import reads
from tests.support.reset import reset
from tests.support.starttls import STARTTLS
from tests.support.timed_reactor import Timed

pytest.importorskip("OpenSSL.SSL", reason="pyOpenSSL (twisted[tls]) is not installed")

from twisted.internet.ssl import DefaultOpenSSLContextFactory

from rtservice.net import pyopenssl_stream
from tests.support.forge import (
    ALERT,
    APPLICATION_DATA,
    CHANGE_CIPHER_SPEC,
    HANDSHAKE,
    Forger,
    client_hello,
    record,
)

# --- the client's side ---


def start_tls(sock: socket.socket, begin: bytes) -> None:
    """Send the plain text before TLS; request TLS and wait for the answer."""
    sock.sendall(begin)
    if begin == STARTTLS:
        assert sock.recv(1) == b"+"


class Hostile(Forger):
    """A Forger that can request STARTTLS before the handshake and read after it."""

    def __init__(self, address: Any, version: str, *, begin: bytes, **options: Any) -> None:
        self._begin = begin
        super().__init__(address, version, timeout=DEADLINE, **options)

    def _shake(self, context: ssl.SSLContext) -> None:
        start_tls(self.sock, self._begin)
        super()._shake(context)

    def data(self, content: bytes) -> bytes:
        return self.seal(APPLICATION_DATA, content)

    def send_until_closed(self, flood: bytes) -> None:
        """Send a flood without reading until the server closes."""
        with contextlib.suppress(ConnectionError):
            self.sock.sendall(flood)
        read_to_end(self.sock)

    def send_what_is_taken(self, make: Callable[[], bytes]) -> None:
        """Send the output of a function until the kernel accepts no more."""
        self.sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            while True:
                self.sock.sendall(make())
        self.sock.settimeout(DEADLINE)

    def read(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            try:
                piece = self.tls.read(1 << 16)
                assert piece, f"close_notify after {len(received)} bytes of {size}"
                received += piece
            except ssl.SSLWantReadError:
                data = self.sock.recv(1 << 16)
                assert data, f"the end after {len(received)} bytes of {size}"
                self.incoming.write(data)
        return bytes(received)


def read_to_end(sock: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass


def key_updates(client: Hostile, count: int) -> bytes:
    return b"".join(client.key_update() for _ in range(count))


def key_updates_that_ask(client: Hostile, count: int) -> bytes:
    return b"".join(client.key_update(ask=True) for _ in range(count))


def hellos(client: Hostile, count: int) -> bytes:
    hello = client_hello(version="TLSv1_2")
    return b"".join(client.seal(HANDSHAKE, hello) for _ in range(count))


def one_byte_records(client: Hostile, count: int) -> bytes:
    """One-byte records of an endless ClientHello."""
    begun = b"\x01\0\xff\xff"
    return b"".join(client.seal(HANDSHAKE, begun[i : i + 1] or b"\0") for i in range(count))


# Records without data after the handshake, and how many of them exceed the limit.
FLOODS = [
    pytest.param("TLSv1_3", key_updates, 20_000, id="key updates"),
    pytest.param("TLSv1_3", key_updates_that_ask, 20_000, id="key updates with requests"),
    pytest.param("TLSv1_2", hellos, 2_000, id="ClientHellos"),
    pytest.param("TLSv1_2", one_byte_records, 10_000, id="one-byte handshake records"),
]


# --- the server's side ---


class StartingTLS(Recorder):
    """Starts TLS on request."""

    def dataReceived(self, data: bytes) -> None:
        if data == STARTTLS:
            self.transport.write(b"+")
            self.transport.startTLS(self.factory.context)
        else:
            super().dataReceived(data)


class Served:
    """A port with `library=pyopenssl`, or with a protocol that starts TLS with Twisted's contexts."""

    def __init__(self, certificates: Any, *, begin: str = "ssl", on: Any = reactor, send_buffer: int = 0) -> None:
        self.factory: Any = Recording(StartingTLS, on_data=nothing)
        key, chain = certificates["server.key"], certificates["server.pem"]
        self.factory.context = DefaultOpenSSLContextFactory(key, chain)
        files = "" if begin == "startTLS" else f":privateKey={key}:certKey={chain}:library=pyopenssl"
        kind = {"startTLS": "tcp", "ssl": "ssl", "proxy": "proxy:ssl"}[begin]
        self.begin = {"startTLS": STARTTLS, "ssl": b"", "proxy": b"PROXY UNKNOWN\r\n"}[begin]
        (self.listener,) = open_description(f"{kind}:0:interface=127.0.0.1{files}", backlog=50)
        sock = self.listener.socket
        if send_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.address = sock.getsockname()
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.port = Port(
            on,
            sock,
            self.factory,
            name=self.listener.name,
            tls=self.listener.tls,
            proxied=begin == "proxy",
            opened=self.opened.append,
            closed=lambda connection, reason: self.closed.append(connection),
        )
        self.port.startListening()

    def stop(self) -> None:
        self.port.stopListening()
        self.listener.close()
        for connection in self.opened:
            if connection not in self.closed:
                connection.connectionLost(LOST)


@pytest.fixture
def serve(certificates: Any) -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(**settings: Any) -> Served:
        started.append(Served(certificates, **settings))
        return started[-1]

    yield start
    for served in started:
        served.stop()


@pytest.fixture(params=["ssl", "startTLS"])
def begin(request: Any) -> str:
    """How TLS begins: at once, or on request."""
    begins: str = request.param
    return begins


def connect(served: Served, version: str, **options: Any) -> Hostile:
    return Hostile(served.address, version, begin=served.begin, **options)


@pytest.fixture
def fed(monkeypatch: Any) -> list[tuple[int, int, bool]]:
    """The input of OpenSSL in each event: bytes, records begun, and whether the handshake was complete."""
    events: list[tuple[int, int, bool]] = []
    ahead: dict[Any, bytes] = {}
    original = pyopenssl_stream.Layer.dataReceived

    def receive(layer: Any, data: bytes) -> None:
        rest = ahead.get(layer, b"") + data
        records = 0
        while len(rest) >= 5 and len(rest) >= 5 + int.from_bytes(rest[3:5]):
            rest = rest[5 + int.from_bytes(rest[3:5]) :]
            records += 1
        ahead[layer] = rest
        events.append((len(data), records, layer._handshakeDone))
        original(layer, data)

    monkeypatch.setattr(pyopenssl_stream.Layer, "dataReceived", receive)
    return events


def assert_bounded(events: list[tuple[int, int, bool]]) -> None:
    for size, records, done in events:
        assert size <= (FULL_READ if done else FIRST_READ)
        # One more record began in an earlier event.
        assert size <= FIRST_READ or records <= MAX_RECORDS + 1


# --- records without data ---


@pytest.mark.parametrize(("version", "make", "count"), FLOODS)
@pytest_twisted.inlineCallbacks
def test_a_flood_without_data_is_read_in_small_parts_and_closed_with_a_reason(serve, fed, begin, version, make, count):
    served = serve(begin=begin)

    def flood() -> None:
        with connect(served, version) as client:
            client.send_until_closed(make(client, count))

    yield deferToThread(flood)
    (connection,) = yield eventually(lambda: served.closed)
    if make is one_byte_records:  # OpenSSL stops reading
        assert isinstance(connection.error, ssl.SSLError | LocalClose)
    else:
        assert isinstance(connection.error, LocalClose)
        assert str(connection.error) == TOO_MUCH_WITHOUT_DATA
        assert isinstance(served.factory.lost[0], ConnectionLost)
    assert connection.bytes_in <= MAX_BYTES_WITHOUT_DATA + 2 * FULL_READ
    assert_bounded(fed)


@pytest.mark.parametrize(("version", "make", "count"), FLOODS[:3])
@pytest_twisted.inlineCallbacks
def test_a_flood_with_some_data_is_read_in_small_parts_and_loses_no_data(serve, fed, begin, version, make, count):
    """The byte of data ends each run of empty records before the limit."""
    served = serve(begin=begin)
    run = {"TLSv1_3": 2_000, "TLSv1_2": 100}[version]

    def flood() -> None:
        with connect(served, version) as client:
            pieces = []
            for i in range(count // run):
                pieces += [make(client, run), client.data(b"%d," % i)]
            pieces.append(client.data(b"end"))
            client.sock.sendall(b"".join(pieces))
            assert all_received.wait(DEADLINE)

    all_received = threading.Event()
    served.factory.on_data = lambda protocol, data: data.endswith(b"end") and all_received.set()
    yield deferToThread(flood)
    assert served.factory.received == b"".join(b"%d," % i for i in range(count // run)) + b"end"
    assert_bounded(fed)
    yield eventually(lambda: served.closed)


@pytest_twisted.inlineCallbacks
def test_a_thousand_records_in_few_segments_are_processed_over_several_turns(serve, fed, begin):
    """This also applies to a protocol that pauses in each dataReceived."""
    served = serve(begin=begin)

    def pause(protocol: Any, data: bytes) -> None:
        protocol.transport.pauseProducing()
        protocol.transport.write(data)
        reactor.callLater(0, protocol.transport.resumeProducing)

    served.factory.on_data = pause
    content = os.urandom(3_000)

    def client() -> bytes:
        with connect(served, "TLSv1_3") as hostile:
            hostile.sock.sendall(b"".join(hostile.data(content[i : i + 1]) for i in range(len(content))))
            return hostile.read(len(content))

    assert (yield deferToThread(client)) == content
    assert_bounded(fed)
    yield eventually(lambda: served.closed)


@pytest_twisted.inlineCallbacks
def test_read_ahead_data_waits_while_the_protocol_is_paused(serve, begin):
    served = serve(begin=begin)
    served.factory.on_data = lambda protocol, data: protocol.transport.pauseProducing()
    with (yield deferToThread(connect, served, "TLSv1_3")) as client:
        records = b"".join(client.data(b"x") for _ in range(600))
        yield deferToThread(client.sock.sendall, records)
        protocol = yield eventually(lambda: served.factory.received and served.factory)
        protocol = protocol.made[0]
        before = len(served.factory.received)
        for _ in range(20):
            yield deferLater(reactor, 0)
        assert len(served.factory.received) == before
        while len(served.factory.received) < 600:
            before = len(served.factory.received)
            protocol.transport.resumeProducing()
            protocol.transport.resumeProducing()  # must not start a second turn
            yield eventually(lambda: len(served.factory.received) > before)  # noqa: B023  # called in this turn of the loop
    yield deferLater(reactor, 0)
    protocol.transport.resumeProducing()
    yield eventually(lambda: served.closed)


# --- handshakes ---


@pytest.mark.parametrize("between", [0, 31], ids=["alone", "with change_cipher_spec between them"])
@pytest_twisted.inlineCallbacks
def test_one_byte_records_after_a_hello_retry_request_close_the_connection_with_a_reason(serve, fed, begin, between):
    served = serve(begin=begin)
    step = record(HANDSHAKE, b"\0") + CHANGE_CIPHER_SPEC * between

    def flood() -> None:
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            start_tls(sock, served.begin)
            sock.sendall(record(HANDSHAKE, client_hello()))
            assert sock.recv(1) == bytes([HANDSHAKE])
            # For a ClientHello of 64 KiB.
            sock.sendall(b"".join(record(HANDSHAKE, bytes([byte])) for byte in b"\x01\0\xff\xff"))
            with contextlib.suppress(ConnectionError):
                sock.sendall(step * (1_000_000 // len(step)))
            read_to_end(sock)

    yield deferToThread(flood)
    (connection,) = yield eventually(lambda: served.closed)
    assert isinstance(connection.error, LocalClose)
    assert str(connection.error) == HANDSHAKE_TOO_LARGE
    assert sum(size for size, _, _ in fed) <= MAX_HANDSHAKE_BYTES
    assert_bounded(fed)
    assert len(served.factory.lost) == (begin == "startTLS")


# --- answers to a peer that does not read ---


@pytest_twisted.inlineCallbacks
def held_connection(served: Served, client: Hostile) -> Any:
    """Fire with a connection that stopped reading because its client floods it with key update requests."""
    yield deferToThread(client.send_what_is_taken, lambda: key_updates_that_ask(client, 500) + client.data(b"x"))
    (connection,) = served.opened
    yield eventually(lambda: connection._stage.held)
    return connection


@pytest_twisted.inlineCallbacks
def test_answers_to_a_peer_that_does_not_read_are_bounded_and_use_no_cpu(serve, begin, monkeypatch):
    served = serve(begin=begin, send_buffer=4096)
    with (yield deferToThread(connect, served, "TLSv1_3", small_buffers=True)) as client:
        connection = yield held_connection(served, client)
        assert connection.unsent <= MAX_UNSENT_ANSWERS + FULL_READ
        assert not reads(connection)
        events: list[str] = []
        for name in ("doRead", "doWrite", "take_rest"):
            monkeypatch.setattr(type(connection._stage), name, lambda *_, name=name: events.append(name))
        connection.resumeProducing()  # must not bypass the limit
        for _ in range(100):
            yield deferLater(reactor, 0)
        assert events == []
        monkeypatch.undo()
        assert not reads(connection)


@pytest_twisted.inlineCallbacks
def test_a_peer_that_reads_its_answers_later_is_served(serve, begin):
    served = serve(begin=begin, send_buffer=4096)
    served.factory.on_data = lambda protocol, data: data.endswith(b"!") and protocol.transport.write(b"here")
    with (yield deferToThread(connect, served, "TLSv1_3", small_buffers=True)) as client:
        # Complete key updates, so that the stream stays valid: the rest is sent below.
        sealed = b"".join(key_updates_that_ask(client, 500) + client.data(b"x") for _ in range(20))
        sealed += client.data(b"!")
        sender = threading.Thread(target=client.sock.sendall, args=(sealed,))
        sender.start()
        (connection,) = served.opened
        yield eventually(lambda: connection._stage.held)
        assert (yield deferToThread(client.read, 4)) == b"here"
        sender.join()
        assert not connection._stage.held
        assert served.factory.received == b"x" * 20 + b"!"
        assert connection._stage._deadline is None
    yield eventually(lambda: served.closed)


@pytest_twisted.inlineCallbacks
def test_a_peer_that_does_not_read_its_answers_is_aborted_after_the_answer_timeout(serve, begin):
    timed = Timed()
    served = serve(begin=begin, on=timed, send_buffer=4096)
    with (yield deferToThread(connect, served, "TLSv1_3", small_buffers=True)) as client:
        sending = deferToThread(
            client.send_what_is_taken, lambda: key_updates_that_ask(client, 500) + client.data(b"x")
        )
        (connection,) = served.opened

        def held() -> bool:
            timed.clock.advance(0)
            return bool(connection._stage.held)

        yield eventually(held)
        yield sending
        before = connection.bytes_out
        timed.clock.advance(ANSWER_TIMEOUT - 1)
        assert served.closed == []
        while connection.bytes_out == before:  # some progress
            yield deferToThread(client.sock.recv, 1024)
            yield deferLater(reactor, 0)
        timed.clock.advance(2)
        assert served.closed == []
        yield eventually(lambda: ended(timed, served))
        assert isinstance(connection.error, LocalClose)
        assert str(connection.error) == ANSWERS_NOT_READ
        assert timed.clock.getDelayedCalls() == []


def ended(timed: Timed, served: Served) -> list[Any]:
    """Let ANSWER_TIMEOUT pass; return the ended connections. Data that the kernel still accepts counts as progress."""
    timed.clock.advance(ANSWER_TIMEOUT)
    timed.clock.advance(0)
    return served.closed


@pytest_twisted.inlineCallbacks
def test_unsent_data_for_a_slow_reader_does_not_stop_reading(serve, begin):
    """This also applies if the reader updates its keys meanwhile, as peers do after many bytes."""
    served = serve(begin=begin)
    content = os.urandom(50_000_000)
    all_received = threading.Event()

    def on_data(protocol: Any, data: bytes) -> None:
        if data.startswith(b"go"):
            protocol.transport.write(content)
        if data.endswith(b"."):
            all_received.set()

    served.factory.on_data = on_data

    def client() -> bytes:
        with connect(served, "TLSv1_3") as hostile:
            hostile.sock.sendall(hostile.data(b"go"))
            for _ in range(100):
                hostile.sock.sendall(key_updates_that_ask(hostile, 2) + hostile.data(b"meanwhile."))
            assert all_received.wait(DEADLINE)
            return hostile.read(len(content))

    received = yield deferToThread(client)
    assert received == content
    yield eventually(lambda: served.closed)
    assert served.factory.received == b"go" + b"meanwhile." * 100


@pytest_twisted.inlineCallbacks
def test_a_tls_error_with_much_unsent_data_ends_in_bounded_time(serve, begin):
    timed = Timed()
    served = serve(begin=begin, on=timed, send_buffer=4096)
    served.factory.on_data = lambda protocol, data: protocol.transport.write(bytes(1_000_000))
    with (yield deferToThread(connect, served, "TLSv1_3", small_buffers=True)) as client:
        yield deferToThread(client.sock.sendall, client.data(b"x"))
        (connection,) = served.opened
        yield eventually(lambda: connection.unsent > 500_000)
        yield deferToThread(client.sock.sendall, record(APPLICATION_DATA, bytes(100)))
        yield eventually(lambda: connection.disconnecting)
        assert served.closed == []
        yield eventually(lambda: ended(timed, served))
        assert served.closed == [connection]
        assert timed.clock.getDelayedCalls() == []


def test_marks_count_the_unsent_bytes_of_marked_ranges() -> None:
    marks = pyopenssl_stream.Marks()
    assert not marks
    assert marks.after(0) == 0
    marks.add(10, 110)
    marks.add(5, 115)  # extends the previous mark
    marks.add(7, 200)
    assert marks.after(50) == 22
    assert marks.after(103) == 19
    assert marks.after(115) == 7
    marks.add(3, 203)
    assert marks.after(201) == 2
    assert marks
    assert marks.after(203) == 0
    assert not marks


# --- closing ---


ENDS_BEFORE = ["reset at once", "FIN at once", "reset within", "FIN within", "garbage", "large", "timeout"]
ENDS_AFTER = ["reset", "FIN", "close", "tampered", "abort", "lose", "flood"]


@pytest.fixture
def no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "end",
    ENDS_BEFORE + ENDS_AFTER,
)
@pytest.mark.parametrize("begin", ["ssl", "proxy", "startTLS"])
@pytest_twisted.inlineCallbacks
def test_an_ended_connection_closes_its_descriptor_and_is_freed_without_garbage_collection(
    serve, begin, end, no_collection
):
    served = serve(begin=begin)
    if end == "timeout":
        served.port.handshake_timeout = 0.05
    served.factory.on_data = lambda protocol, data: {
        b"abort": protocol.transport.abortConnection,
        b"lose": protocol.transport.loseConnection,
    }.get(data, lambda: None)()

    def before() -> None:
        sock = socket.create_connection(served.address, timeout=DEADLINE)
        if end.endswith("at once"):
            reset(sock) if end.startswith("reset") else sock.close()
            return
        start_tls(sock, served.begin)
        sock.sendall({"garbage": b"GET / HTTP/1.0\r\n\r\n"}.get(end, record(HANDSHAKE, client_hello())))
        if end == "large":
            with contextlib.suppress(ConnectionError):
                sock.sendall(record(HANDSHAKE, b"\x01\0\xff\xff" + bytes(10_000)) * 10)
        with contextlib.suppress(ConnectionError):
            sock.recv(1)
        if end == "reset within":
            reset(sock)
        elif end == "FIN within":
            sock.close()
        else:
            read_to_end(sock)
            sock.close()

    def after() -> None:
        with connect(served, "TLSv1_3") as client:
            client.sock.sendall(client.data(b"hello"))
            if end == "reset":
                reset(client.sock)
                return
            if end == "FIN":
                client.sock.shutdown(socket.SHUT_WR)
            elif end == "flood":
                client.send_until_closed(key_updates(client, 20_000))
                return
            else:
                client.sock.sendall(
                    {
                        "close": client.seal(ALERT, b"\x01\0"),
                        "tampered": record(APPLICATION_DATA, bytes(100)),
                    }.get(end)
                    or client.data(end.encode())
                )
            read_to_end(client.sock)

    yield deferToThread(after if end in ENDS_AFTER else before)
    (connection,) = yield eventually(lambda: served.closed)
    assert connection.fileno() == -1
    freed = weakref.ref(connection)
    protocol = weakref.ref(served.factory.made[0]) if served.factory.made else None
    served.opened.clear()
    served.closed.clear()
    served.factory.made.clear()
    del connection
    yield deferLater(reactor, 0)
    yield eventually(lambda: freed() is None)
    if protocol is not None:
        assert protocol() is None


@pytest.mark.filterwarnings("ignore::twisted.protocols._tls_legacy.LegacyContextFactoryWarning")
@pytest.mark.parametrize("wrong", ["no context at all", "a context that raises"])
@pytest_twisted.inlineCallbacks
def test_an_unusable_context_ends_only_its_connection(serve, wrong):
    class Raising(DefaultOpenSSLContextFactory):
        def getContext(self) -> Any:
            raise ZeroDivisionError("of the test")

    served = serve(begin="startTLS")
    context = served.factory.context
    served.factory.context = object() if wrong == "no context at all" else Raising.__new__(Raising)

    def client() -> None:
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            sock.sendall(STARTTLS)
            read_to_end(sock)

    yield deferToThread(client)
    (connection,) = yield eventually(lambda: served.closed)
    assert connection.fileno() == -1
    assert len(served.factory.lost) == 1
    served.factory.context = context
