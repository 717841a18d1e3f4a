"""The cost of a hostile TLS peer on loopback is bounded in bytes, records, memory and time."""

import contextlib
import gc
import os
import socket
import ssl
import threading
import weakref
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.task import deferLater
from twisted.internet.threads import deferToThread

from rtservice.net.client_hello import NO_APPLICATION_PROTOCOL
from rtservice.net.connection import LocalClose
from rtservice.net.expensive import shake_in_thread
from rtservice.net.port import Port
from rtservice.net.tls import ServerTLS
from rtservice.net.tls_bounds import (
    ANSWER_TIMEOUT,
    ANSWERS_NOT_READ,
    HANDSHAKE_TOO_LARGE,
    MAX_BYTES_WITHOUT_DATA,
    MAX_HANDSHAKE_BYTES,
    MAX_UNSENT_ANSWERS,
    TOO_MUCH_WITHOUT_DATA,
)
from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.registered import reads
from tests.support.reset import reset
from tests.support.timed_reactor import Timed

pytest.importorskip("cryptography", reason="cryptography (twisted[tls]) is not installed")

from tests.support.client_hellos import real_hello
from tests.support.forge import (  # after the check
    ALERT,
    APPLICATION_DATA,
    CHANGE_CIPHER_SPEC,
    HANDSHAKE,
    Forger,
    client_hello,
    record,
)


class Echo(Protocol):
    def connectionMade(self):
        self.factory.made.append(self)

    def dataReceived(self, data):
        self.factory.received += len(data)
        self.factory.on_data(self, data)


class Served:
    """A TLS port, its connections and the reasons of their ends."""

    def __init__(self, certificates, on: Any, on_data: Any, proxied: bool = False, **policy: Any) -> None:
        self.factory = factory = Factory.forProtocol(Echo)
        factory.noisy = False
        factory.made, factory.received, factory.on_data = [], 0, on_data
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.socket.setblocking(False)
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self.socket.setsockopt(socket.SOL_SOCKET, buffer, 4096)  # accepted sockets inherit it
        self.address = self.socket.getsockname()
        self.opened: list[Any] = []
        self.ended: list[str] = []
        context = ServerTLS(certificates["server.key"], certificates["server.pem"], **policy).load().context
        self.port = Port(
            on,
            self.socket,
            factory,
            name="ssl:test",
            tls=context,
            proxied=proxied,
            opened=self.opened.append,
            closed=self.closed,
        )
        self.port.startListening()

    def closed(self, connection: Any, reason: Any) -> None:
        self.opened.remove(connection)
        error = connection.error
        self.ended.append(str(error) if isinstance(error, LocalClose) else type(error).__name__)

    def stop(self) -> None:
        self.port.stopListening()
        self.socket.close()
        for connection in list(self.opened):
            connection.abortConnection()


@pytest.fixture
def serve(certificates):
    started: list[Served] = []

    def start(
        on: Any = reactor, on_data: Any = lambda protocol, data: protocol.transport.write(data), **more
    ) -> Served:
        started.append(Served(certificates, on, on_data, **more))
        return started[-1]

    yield start
    for served in started:
        served.stop()
    pytest_twisted.blockon(eventually(lambda: not any(served.opened for served in started)))


def send_until_closed(sock: socket.socket, data: bytes) -> int:
    """Send until the server closes; return the number of bytes accepted."""
    view, sent = memoryview(data), 0
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while sent < len(view):
            sent += sock.send(view[sent : sent + 65536])
        while sock.recv(65536):
            pass
    return sent


# --- records without data ---


def key_updates(peer: Forger) -> bytes:
    return b"".join(peer.key_update() for _ in range(20_000))


def hellos(peer: Forger) -> bytes:
    hello = client_hello(version="TLSv1_2")
    return b"".join(peer.seal(HANDSHAKE, hello) for _ in range(10_000))


def many_hellos_in_a_record(peer: Forger) -> bytes:
    hello = client_hello(version="TLSv1_2")
    many = hello * (16000 // len(hello))
    return b"".join(peer.seal(HANDSHAKE, many) for _ in range(50))


def padded_records(peer: Forger) -> bytes:
    return b"".join(peer.seal(APPLICATION_DATA, b"", padding=16000) for _ in range(50))


def a_record_that_never_ends(peer: Forger) -> bytes:
    return b""


FLOODS = [
    pytest.param("TLSv1_3", key_updates, id="key updates"),
    pytest.param("TLSv1_3", padded_records, id="records of padding"),
    pytest.param("TLSv1_2", hellos, id="ClientHellos"),
    pytest.param("TLSv1_2", many_hellos_in_a_record, id="many ClientHellos in a record"),
]


@pytest.mark.parametrize(("version", "flood"), FLOODS)
@pytest_twisted.inlineCallbacks
def test_a_flood_of_records_without_data_closes_the_connection_with_a_reason(serve, version, flood):
    def client():
        with Forger(served.address, version) as peer:
            peer.sock.sendall(peer.seal(APPLICATION_DATA, b"hello"))
            return send_until_closed(peer.sock, flood(peer))

    served = serve()
    yield deferToThread(client)
    yield eventually(lambda: served.ended)
    assert served.factory.received == 5
    # OpenSSL may have a lower limit.
    assert served.ended[0] in (TOO_MUCH_WITHOUT_DATA, "SSLError")
    if flood is key_updates:
        assert served.ended == [TOO_MUCH_WITHOUT_DATA]


@pytest_twisted.inlineCallbacks
def test_records_without_data_between_data_are_accepted(serve):
    """The total of key updates exceeds the limit, but each run without data is short."""

    def client() -> Forger:
        peer = Forger(served.address)
        for i in range(20):
            updates = b"".join(peer.key_update() for _ in range(200))
            peer.sock.sendall(updates + peer.seal(APPLICATION_DATA, b"%04d" % i))
        return peer

    assert MAX_BYTES_WITHOUT_DATA < 20 * 200 * 27
    served = serve()
    with (yield deferToThread(client)):
        yield eventually(lambda: served.factory.received == 80)
    assert not served.ended


@pytest.mark.parametrize("padding", [0, 100, 16000])
@pytest_twisted.inlineCallbacks
def test_a_client_may_pad_its_records(serve, padding):
    def client() -> Forger:
        peer = Forger(served.address)
        for _ in range(100):
            peer.sock.sendall(peer.seal(APPLICATION_DATA, b"x", padding=padding))
        return peer

    served = serve()
    with (yield deferToThread(client)):
        yield eventually(lambda: served.factory.received == 100)
    assert not served.ended


# --- handshakes ---


def trickle(hello: bytes) -> bytes:
    """Return the message in one-byte records, each followed by 31 change_cipher_spec records (RFC 8446, D.4)."""
    return b"".join(record(HANDSHAKE, bytes([byte])) + 31 * CHANGE_CIPHER_SPEC for byte in hello)


def hello_of_one_byte_records(address) -> int:
    with socket.create_connection(address, timeout=DEADLINE) as sock:
        sock.sendall(record(HANDSHAKE, client_hello()))
        assert sock.recv(65536)[5] == 2, "a ServerHello: the HelloRetryRequest"
        return send_until_closed(sock, trickle(client_hello(key_share=bytes(65), padding=16000)))


def hello_without_end(address) -> int:
    with socket.create_connection(address, timeout=DEADLINE) as sock:
        # Announces 128 KiB or more, in records of the maximum size.
        return send_until_closed(
            sock, b"".join(record(HANDSHAKE, b"\x01\x01\xff\xff" + bytes(16000)) for _ in range(100))
        )


def warnings(address) -> int:
    with socket.create_connection(address, timeout=DEADLINE) as sock:
        return send_until_closed(sock, record(ALERT, b"\x01\x5a") * 100_000)


def empty_records(address) -> int:
    with socket.create_connection(address, timeout=DEADLINE) as sock:
        return send_until_closed(sock, record(HANDSHAKE, b"") * 100_000)


@pytest.mark.parametrize("attack", [hello_of_one_byte_records, hello_without_end, warnings, empty_records])
@pytest_twisted.inlineCallbacks
def test_a_too_large_handshake_closes_the_connection_with_a_reason(serve, attack):
    served = serve()
    yield deferToThread(attack, served.address)
    yield eventually(lambda: served.ended)
    assert served.ended[0] in (HANDSHAKE_TOO_LARGE, "SSLError")
    if attack is hello_of_one_byte_records:
        assert served.ended == [HANDSHAKE_TOO_LARGE]
    assert not served.factory.made


def test_a_handshake_with_a_post_quantum_chain_fits_the_limit() -> None:
    """Three certificates with ML-DSA-65 keys and signatures, a CertificateVerify, and an ML-KEM-768 key share."""
    certificate, signature = 1952 + 3309 + 400, 3309
    assert 3 * certificate + signature + 1800 < MAX_HANDSHAKE_BYTES


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("pieces", [1, 7, 1000])
@pytest_twisted.inlineCallbacks
def test_a_client_without_a_common_alpn_protocol_receives_the_alert(serve, version, pieces):
    """RFC 7301, section 3.2; for any split of the ClientHello."""
    hello = real_hello(alpn=["other"], maximum=ssl.TLSVersion[version])

    def client() -> bytes:
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(hello), pieces):
                sock.sendall(hello[at : at + pieces])
            return sock.recv(100)

    served = serve(alpn=("echo", "h2"))
    answer = yield deferToThread(client)
    assert answer == NO_APPLICATION_PROTOCOL
    yield eventually(lambda: served.ended)
    assert served.ended == ["no common ALPN protocol"]


@pytest.mark.parametrize("offered", [["other", "h2"], None])
@pytest_twisted.inlineCallbacks
def test_a_client_with_a_common_alpn_protocol_or_without_alpn_is_served(serve, certificates, offered):
    def client() -> tuple[str | None, bytes]:
        context = ssl.create_default_context(cafile=certificates["ca.pem"])
        if offered:
            context.set_alpn_protocols(offered)
        with (
            socket.create_connection(served.address, timeout=DEADLINE) as sock,
            context.wrap_socket(sock, server_hostname="localhost") as tls,
        ):
            tls.sendall(b"hello")
            return tls.selected_alpn_protocol(), tls.recv(100)

    served = serve(alpn=("echo", "h2"))
    answer = yield deferToThread(client)
    assert answer == ("h2" if offered else None, b"hello")


class InThread:
    """Handshakes passed to a thread, which waits for `go`."""

    def __init__(self) -> None:
        self.count = 0
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, on: Any, connection: Any, is_wanted: Any, done: Any) -> None:
        self.count += 1
        shake = connection.do_handshake

        def wait_and_shake() -> None:
            self.begun.set()
            assert self.go.wait(DEADLINE)
            shake()

        connection.do_handshake = wait_and_shake
        shake_in_thread(on, connection, is_wanted, done)


@pytest.fixture
def in_thread(monkeypatch):
    spy = InThread()
    monkeypatch.setattr("rtservice.net.handshakes.shake_in_thread", spy)
    yield spy
    spy.go.set()


@pytest.fixture
def shows_chain(certificates):
    """Connect with a client certificate and this many others in its chain, and perform the handshake."""

    def connect(address: Any, version: str, others: int) -> ssl.SSLSocket:
        context = ssl.create_default_context(cafile=certificates["ca.pem"])
        context.maximum_version = ssl.TLSVersion[version]
        chain = certificates.join(f"chain-{others}.pem", "client.pem", *["inner.pem"] * others)
        context.load_cert_chain(chain, certificates["client.key"])
        sock = socket.create_connection(address, timeout=DEADLINE)
        return context.wrap_socket(sock, server_hostname="localhost")

    return connect


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("others", [0, 8])
@pytest_twisted.inlineCallbacks
def test_a_long_client_chain_is_decoded_in_a_thread(serve, certificates, in_thread, shows_chain, version, others):
    def client() -> bytes:
        with shows_chain(served.address, version, others) as tls:
            tls.sendall(b"hello")
            return tls.recv(100)

    in_thread.go.set()
    served = serve(client_ca=certificates["ca.pem"])
    assert (yield deferToThread(client)) == b"hello"
    assert bool(in_thread.count) == bool(others)


@pytest_twisted.inlineCallbacks
def test_other_clients_are_served_while_a_chain_is_decoded(serve, certificates, in_thread, shows_chain):
    served = serve(client_ca=certificates["ca.pem"])
    with (yield deferToThread(shows_chain, served.address, "TLSv1_3", 8)) as slow:
        yield eventually(in_thread.begun.is_set)

        def other() -> bytes:
            with shows_chain(served.address, "TLSv1_3", 0) as tls:
                tls.sendall(b"other")
                return tls.recv(100)

        assert (yield deferToThread(other)) == b"other"
        in_thread.go.set()

        def rest() -> bytes:
            slow.sendall(b"slow")
            return slow.recv(100)

        assert (yield deferToThread(rest)) == b"slow"


@pytest.mark.parametrize("end", ["deadline", "abort", "reset"])
@pytest_twisted.inlineCallbacks
def test_a_handshake_may_end_while_its_chain_is_decoded(serve, certificates, in_thread, shows_chain, end):
    timed = Timed(at_once=True)
    served = serve(timed, client_ca=certificates["ca.pem"])
    slow = yield deferToThread(shows_chain, served.address, "TLSv1_3", 8)
    with slow:
        yield eventually(in_thread.begun.is_set)
        if end == "deadline":
            timed.clock.advance(served.port.handshake_timeout)
        elif end == "abort":
            served.opened[0].abortConnection()
        else:
            reset(slow)
            in_thread.go.set()
        yield eventually(lambda: served.ended)
    in_thread.go.set()
    made = len(served.factory.made)
    assert not made or end == "reset", "a reset is seen after what came before it"
    # The next handshake runs, regardless of how the previous one ended.
    with (yield deferToThread(shows_chain, served.address, "TLSv1_3", 8)):
        yield eventually(lambda: len(served.factory.made) > made)


@pytest_twisted.inlineCallbacks
def test_a_connection_is_not_used_while_its_chain_is_decoded(serve, certificates, in_thread, shows_chain):
    served = serve(client_ca=certificates["ca.pem"])
    with (yield deferToThread(shows_chain, served.address, "TLSv1_3", 8)):
        yield eventually(in_thread.begun.is_set)
        connection = served.opened[0]
        reactor.addWriter(connection)
        connection._waiting = True  # as after a write by the protocol before startTLS
        yield eventually(lambda: connection not in reactor.getWriters())
        assert in_thread.count == 1
        in_thread.go.set()
        yield eventually(lambda: served.factory.made)


@pytest_twisted.inlineCallbacks
def test_a_handshake_that_failed_in_a_thread_is_freed_without_garbage_collection():
    class Failing:
        def do_handshake(self) -> None:
            raise ssl.SSLError(1, "no certificate that is trusted")

    failing = Failing()
    left = weakref.ref(failing)
    done: Deferred = Deferred()
    gc.collect()
    gc.disable()
    try:
        shake_in_thread(reactor, failing, lambda: True, done.callback)
        del failing
        problem = yield done
        assert problem.__traceback__ is None
        yield eventually(lambda: left() is None)
    finally:
        gc.enable()


@pytest_twisted.inlineCallbacks
def test_a_too_long_client_chain_is_also_rejected_with_pyopenssl(serve, certificates, shows_chain):
    """pyOpenSSL decodes it in the reactor's thread, so it is rejected by its size."""
    pytest.importorskip("OpenSSL", reason="pyOpenSSL (twisted[tls]) is not installed")
    served = serve(client_ca=certificates["ca.pem"], library="pyopenssl")

    def client(others: int) -> bytes:
        try:
            with shows_chain(served.address, "TLSv1_3", others) as tls:
                tls.sendall(b"hello")
                return tls.recv(100)
        except OSError:
            return b""

    assert (yield deferToThread(client, 3)) == b"hello"
    assert (yield deferToThread(client, 50)) == b""
    yield eventually(lambda: HANDSHAKE_TOO_LARGE in served.ended)


# --- output of the TLS layer ---


class KeyUpdateRequester:
    """A peer that requests key updates and never reads, until the kernel accepts no more records."""

    def __init__(self, address: Any) -> None:
        self.peer = Forger(address, small_buffers=True)
        self.peer.sock.settimeout(0.5)
        self.sent = 0

    def request_updates(self, data: bytes = b"x", size: int = 4 << 20) -> None:
        """Send key updates that each request an answer, with some data after every 100th."""
        with contextlib.suppress(TimeoutError):
            while self.sent < size:
                batch = b"".join(self.peer.key_update(ask=True) for _ in range(100))
                batch += self.peer.seal(APPLICATION_DATA, data)
                self.peer.sock.sendall(batch)
                self.sent += len(batch)


@pytest_twisted.inlineCallbacks
def test_reading_stops_for_a_peer_that_requests_key_updates_and_never_reads(serve):
    """Memory is bounded, there is no busy loop, and the connection ends at the deadline."""
    timed = Timed(at_once=True)
    served = serve(timed, on_data=lambda protocol, data: None)
    requester = yield deferToThread(KeyUpdateRequester, served.address)
    with requester.peer:
        yield deferToThread(requester.request_updates)
        assert requester.sent < 4 << 20, "the server has stopped reading"
        connection = served.opened[0]
        assert not reads(connection), "there is no busy loop"
        tls = connection._tls
        assert MAX_UNSENT_ANSWERS < tls.outgoing.pending + len(tls.sealed) < MAX_UNSENT_ANSWERS + 64 * 1024
        assert not served.ended
        timed.clock.advance(ANSWER_TIMEOUT - 1)
        assert not served.ended
        timed.clock.advance(ANSWER_TIMEOUT + 2)  # data that the kernel accepted meanwhile may have started another step
        timed.clock.advance(ANSWER_TIMEOUT + 2)
        yield eventually(lambda: served.ended)
    assert served.ended == [ANSWERS_NOT_READ]
    assert not timed.clock.getDelayedCalls()


@pytest_twisted.inlineCallbacks
def test_a_peer_that_reads_its_key_updates_again_is_served(serve):
    timed = Timed(at_once=True)
    served = serve(timed, on_data=lambda protocol, data: None)
    requester = yield deferToThread(KeyUpdateRequester, served.address)

    def read(stop: threading.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                requester.peer.sock.recv(1 << 16)

    with requester.peer:
        # The deadline interrupts sendall within a record, so the last record is completed.
        yield deferToThread(requester.request_updates)
        connection = served.opened[0]
        assert connection._stage.held
        stop = threading.Event()
        reading = deferToThread(read, stop)
        yield eventually(lambda: not connection._stage.held)
        yield eventually(lambda: reads(connection))
        stop.set()
        yield reading
        assert not served.ended
        assert not timed.clock.getDelayedCalls(), "the deadline is cancelled"


@pytest_twisted.inlineCallbacks
def test_a_paused_protocol_stays_paused_when_the_peer_reads_its_key_updates(serve):
    timed = Timed(at_once=True)
    served = serve(timed, on_data=lambda protocol, data: None)
    requester = yield deferToThread(KeyUpdateRequester, served.address)
    with requester.peer:
        yield deferToThread(requester.request_updates)
        connection = served.opened[0]
        connection.pauseProducing()
        connection.resumeProducing()
        assert not reads(connection), "the connection stopped reading"
        connection.pauseProducing()

        def read() -> None:
            with contextlib.suppress(TimeoutError):
                while requester.peer.sock.recv(1 << 16):
                    pass

        reading = deferToThread(read)
        yield eventually(lambda: not connection._stage.held)
        yield reading
        assert not reads(connection)
        connection.resumeProducing()
        yield eventually(lambda: reads(connection))


@pytest_twisted.inlineCallbacks
def test_a_key_update_sets_no_deadline_for_a_slow_reader_of_data(serve):
    """The answer to the key update waits behind the data, without a separate deadline."""
    timed = Timed(at_once=True)
    served = serve(timed, on_data=lambda protocol, data: protocol.transport.write(bytes(8 << 20)))

    def begin() -> Forger:
        peer = Forger(served.address, small_buffers=True)
        peer.sock.sendall(peer.seal(APPLICATION_DATA, b"go"))
        return peer

    peer = yield deferToThread(begin)
    with peer:
        yield eventually(lambda: served.opened and served.opened[0].unsent)
        # OpenSSL answers a key update when it reads the next record.
        peer.sock.sendall(peer.key_update(ask=True) + peer.key_update(ask=True))
        yield deferLater(reactor, 0, lambda: None)
        timed.clock.advance(10 * ANSWER_TIMEOUT)
        yield eventually(lambda: served.opened[0]._tls.outgoing.pending)
        assert reads(served.opened[0])
        timed.clock.advance(10 * ANSWER_TIMEOUT)
        assert not served.ended


# --- descriptors ---


@pytest.mark.parametrize("header", [b"", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"], ids=["plain", "proxied"])
@pytest.mark.parametrize("moment", ["at once", "garbage", "within", "after", "header only"])
@pytest_twisted.inlineCallbacks
def test_a_client_reset_leaves_no_open_descriptor(serve, header, moment):
    def client():
        for _ in range(30):
            if moment == "after":
                with Forger(served.address, before=header) as peer:
                    reset(peer.sock)
                continue
            sock = socket.create_connection(served.address, timeout=DEADLINE)
            if moment != "at once":
                sock.sendall(header)
            if moment == "garbage":
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            if moment == "within":
                sock.sendall(record(HANDSHAKE, client_hello())[:-10])
            reset(sock)

    served = serve(proxied=bool(header))
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        yield deferToThread(client)
        yield eventually(lambda: served.port._number == 30 and not served.opened)
        assert len(os.listdir("/proc/self/fd")) <= before
    finally:
        gc.enable()
