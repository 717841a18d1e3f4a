"""Connections: the ITransport contract, on loopback sockets and the real reactor."""

import contextlib
import errno
import os
import socket
import threading
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, globalLogPublisher

from rtservice.net.connection import Connection
from rtservice.net.port import Port
from tests.support.deadline import DEADLINE
from tests.support.puller import Puller
from tests.support.recording import HalfClosing, Recording
from tests.support.reset import reset


def talk(address, *steps) -> bytes:
    """Run a blocking client: send each bytes step, call each other step with the socket, then read until EOF."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    with socket.socket(family) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(address)
        for step in steps:
            if callable(step):
                step(sock)
            else:
                sock.sendall(step)
        received = bytearray()
        while data := sock.recv(1 << 20):
            received += data
        return bytes(received)


def finish(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_WR)


def connected(address) -> socket.socket:
    sock = socket.create_connection(address, timeout=DEADLINE)
    return sock


@pytest_twisted.inlineCallbacks
def test_half_close_echoes_everything_received_even_without_ihalfcloseableprotocol(serve):
    factory = Recording()
    address, closed = serve(factory)
    data = os.urandom(4 << 20)

    answer = yield deferToThread(exchange, address, data)
    assert answer == data
    reason = yield factory.end()
    assert isinstance(reason, ConnectionDone)
    assert (closed[0].bytes_in, closed[0].bytes_out) == (len(data), len(data))
    assert closed[0].peer_finished


def exchange(address, data: bytes) -> bytes:
    """Send and read concurrently, as nc does."""
    with connected(address) as sock:

        def send():
            sock.sendall(data)
            finish(sock)

        sender = threading.Thread(target=send)
        sender.start()
        received = bytearray()
        while piece := sock.recv(1 << 20):
            received += piece
        sender.join()
        return bytes(received)


@pytest_twisted.inlineCallbacks
def test_a_client_that_half_closed_before_accept_receives_all_data(serve):
    data = os.urandom(4 << 20)
    address, _ = serve(Recording(on_connect=lambda protocol: protocol.transport.write(data)))
    for _ in range(20):
        answer = yield deferToThread(talk, address, finish)
        assert answer == data


@pytest_twisted.inlineCallbacks
def test_a_thousand_writes_in_one_event_are_sent_in_order_in_one_send(serve):
    def write_many(protocol, data):
        transport = protocol.transport
        send = transport._send
        transport._send = lambda piece: sends.append(len(piece)) or send(piece)
        for i in range(1000):
            transport.write(b"%04d" % i)
        transport.loseConnection()

    sends: list[int] = []
    address, _ = serve(Recording(on_data=write_many))
    answer = yield deferToThread(talk, address, b"go")
    assert answer == b"".join(b"%04d" % i for i in range(1000))
    assert sends == [4000]


@pytest_twisted.inlineCallbacks
def test_lose_connection_right_after_a_large_write_delivers_everything(serve):
    data = os.urandom(20 << 20)

    def write_and_close(protocol):
        protocol.transport.writeSequence([data[: 1 << 20], data[1 << 20 :]])
        protocol.transport.loseConnection()

    factory = Recording(on_connect=write_and_close)
    address, closed = serve(factory)
    answer = yield deferToThread(talk, address)
    assert answer == data
    reason = yield factory.end()
    assert isinstance(reason, ConnectionDone)
    assert closed[0].bytes_out == len(data)


@pytest_twisted.inlineCallbacks
def test_a_paused_transport_registered_as_its_own_producer_delivers_everything_and_closes(serve):
    data = os.urandom(4 << 20)

    def write_and_close(protocol):
        protocol.transport.registerProducer(protocol.transport, True)
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    factory = Recording(on_connect=write_and_close)
    address, _ = serve(factory)
    answer = yield deferToThread(talk, address)
    assert answer == data
    reason = yield factory.end()
    assert isinstance(reason, ConnectionDone)


@pytest_twisted.inlineCallbacks
def test_writes_from_a_timer_are_sent(serve):
    def later(protocol, data):
        reactor.callLater(0, protocol.transport.write, b"one")
        reactor.callLater(0, protocol.transport.writeSequence, [b"two", b"three"])
        reactor.callLater(0, protocol.transport.loseConnection)

    address, _ = serve(Recording(on_data=later))
    answer = yield deferToThread(talk, address, b"x")
    assert answer == b"onetwothree"


@pytest_twisted.inlineCallbacks
def test_a_pull_producer_sends_its_whole_content(serve):
    address, _ = serve(Recording(on_connect=Puller.start))
    answer = yield deferToThread(talk, address)
    assert answer == Puller.CONTENT


@pytest_twisted.inlineCallbacks
def test_close_after_lose_connection_does_not_wait_for_the_producer(serve):
    class Silent:
        def resumeProducing(self):
            pass

        def stopProducing(self):
            pass

    def start(protocol):
        protocol.transport.registerProducer(Silent(), False)
        protocol.transport.write(b"all")
        protocol.transport.loseConnection()
        reactor.callLater(0.05, protocol.transport.close, "drained")

    address, _ = serve(Recording(on_connect=start))
    answer = yield deferToThread(talk, address)
    assert answer == b"all"


@pytest_twisted.inlineCallbacks
def test_a_push_producer_is_paused_above_64_kib_and_resumed_when_all_data_is_sent(serve):
    calls: list[str] = []

    class Pusher:
        def pauseProducing(self):
            calls.append("pause")

        def resumeProducing(self):
            calls.append("resume")
            self.transport.unregisterProducer()
            self.transport.loseConnection()

        def stopProducing(self):
            calls.append("stop")

    def start(protocol):
        pusher = Pusher()
        pusher.transport = protocol.transport
        protocol.transport.registerProducer(pusher, True)
        protocol.transport.write(b"x" * 65536)
        assert calls == []
        protocol.transport.write(b"x")
        assert calls == ["pause"]

    address, _ = serve(Recording(on_connect=start))
    answer = yield deferToThread(talk, address)
    assert answer == b"x" * 65537
    assert calls == ["pause", "resume"]


@pytest_twisted.inlineCallbacks
def test_a_slow_reader_receives_fifty_megabytes_in_bounded_memory(serve):
    pieces, unsent = 50, []

    class Pusher:
        left = pieces
        running = False

        def __init__(self, transport):
            self.transport = transport

        def resumeProducing(self):
            self.running = True
            while self.running and self.left:
                self.left -= 1
                self.transport.write(bytes([self.left]) * 1_000_000)
                unsent.append(self.transport._unsent)
            if not self.left:
                self.transport.unregisterProducer()
                self.transport.loseConnection()

        def pauseProducing(self):
            self.running = False

        stopProducing = pauseProducing

    def start(protocol):
        pusher = Pusher(protocol.transport)
        protocol.transport.registerProducer(pusher, True)
        pusher.resumeProducing()

    def read_slowly(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)

    address, closed = serve(Recording(on_connect=start))
    answer = yield deferToThread(talk, address, read_slowly)
    assert answer == b"".join(bytes([left]) * 1_000_000 for left in reversed(range(pieces)))
    assert max(unsent) == 1_000_000
    assert closed[0].bytes_out == 50_000_000


@pytest_twisted.inlineCallbacks
def test_lose_write_connection_sends_fin_and_continues_reading(serve):
    received: list[bytes] = []

    def on_data(protocol, data):
        received.append(data)
        if data == b"first":
            protocol.transport.write(b"last words")
            protocol.transport.loseWriteConnection()

    def read_then_send(sock):
        sock.settimeout(DEADLINE)
        answer = b""
        while piece := sock.recv(100):
            answer += piece
        assert answer == b"last words"
        sock.sendall(b"second")
        finish(sock)

    factory = Recording(HalfClosing, on_data=on_data)
    address, _ = serve(factory)
    yield deferToThread(talk, address, b"first", read_then_send)
    yield factory.end()
    assert received == [b"first", b"second"]
    assert factory.write_lost == 1


@pytest_twisted.inlineCallbacks
def test_abort_resets_the_connection_and_drops_unsent_data(serve):
    def abort(protocol, data):
        protocol.transport.write(b"never")
        protocol.transport.abortConnection()
        assert not factory.lost  # connectionLost is called in a later event

    factory = Recording(on_data=abort)
    address, closed = serve(factory)
    with pytest.raises(ConnectionResetError):
        yield deferToThread(talk, address, b"x")
    reason = yield factory.end()
    assert isinstance(reason, ConnectionAborted)
    assert closed[0].bytes_out == 0


@pytest_twisted.inlineCallbacks
def test_a_client_reset_ends_the_connection_with_the_error(serve):
    factory = Recording()
    address, closed = serve(factory)

    def hello_and_reset(sock):
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        reset(sock)

    yield deferToThread(lambda: hello_and_reset(connected(address)))
    reason = yield factory.end()
    assert isinstance(reason, ConnectionLost)
    assert closed[0].error.errno == errno.ECONNRESET


@pytest_twisted.inlineCallbacks
def test_a_client_reset_with_much_unsent_data_ends_the_connection(serve):
    factory = Recording(on_connect=lambda protocol: protocol.transport.write(b"x" * (50 << 20)))
    address, _ = serve(factory)
    yield deferToThread(lambda: reset(connected(address)))
    reason = yield factory.end()
    assert isinstance(reason, ConnectionLost)


@pytest.mark.parametrize("where", ["on_connect", "on_data", "on_fin"])
@pytest_twisted.inlineCallbacks
def test_an_exception_in_a_protocol_ends_only_its_connection_and_is_logged_once(serve, where):
    def fail(*_):
        raise ZeroDivisionError("of the test")

    def others(event):
        if event["log_level"] >= LogLevel.error:
            logged.append(event)

    logged: list[Any] = []
    factory = Recording(HalfClosing, **{where: fail})
    good = Recording()
    address, _ = serve(factory)
    good_address, _ = serve(good)
    bystander = yield deferToThread(connected, good_address)
    globalLogPublisher.addObserver(others)
    try:
        with contextlib.suppress(OSError):  # the reset may interrupt any of the client's steps
            yield deferToThread(talk, address, b"x", finish)
        reason = yield factory.end()
        assert isinstance(reason, ZeroDivisionError)
        assert [event["log_failure"].type for event in logged] == [ZeroDivisionError]
    finally:
        globalLogPublisher.removeObserver(others)
    with bystander:
        bystander.sendall(b"still here")
        answer = yield deferToThread(bystander.recv, 100)
        assert answer == b"still here"


@pytest.mark.parametrize("build", [lambda address: None, lambda address: 1 / 0], ids=["None", "raises"])
@pytest_twisted.inlineCallbacks
def test_a_connection_is_closed_if_no_protocol_is_built(serve, build):
    factory = Recording()
    factory.buildProtocol = build
    address, _ = serve(factory)
    answer = yield deferToThread(talk, address)
    assert answer == b""


@pytest_twisted.inlineCallbacks
def test_peer_and_host_addresses_are_those_of_the_socket(serve, tmp_path):
    seen = []

    def record_addresses(protocol):
        seen.append((protocol.transport.getPeer(), protocol.transport.getHost(), protocol.transport.getTcpNoDelay()))
        protocol.transport.loseConnection()

    address, _ = serve(Recording(on_connect=record_addresses))
    yield deferToThread(talk, address)
    path, _ = serve(Recording(on_connect=record_addresses), f"unix:{tmp_path}/s")
    yield deferToThread(talk, path)
    (tcp_peer, tcp_host, no_delay), (unix_peer, unix_host, _) = seen
    assert (tcp_peer.host, tcp_host.host, tcp_host.port, no_delay) == ("127.0.0.1", "127.0.0.1", address[1], True)
    assert (unix_peer.name, unix_host.name) == (None, os.fsencode(path))


@pytest.mark.parametrize("data", ["text", 5, None])
def test_write_rejects_other_types_than_bytes(data) -> None:
    near, far = socket.socketpair()
    with near, far:
        port = Port(MemoryReactorClock(), near, None, name="test")
        connection = Connection(port.reactor, near, port, None, 1)
        with pytest.raises(TypeError, match="must be bytes"):
            connection.write(data)


class Text(bytes):
    pass


@pytest.mark.parametrize("data", [Text(b"x"), bytearray(b"x"), memoryview(b"x")], ids=["subclass", "bytearray", "view"])
@pytest_twisted.inlineCallbacks
def test_write_accepts_all_bytes_like_types(serve, data):
    def write_and_close(protocol):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    address, _ = serve(Recording(on_connect=write_and_close))
    answer = yield deferToThread(talk, address)
    assert answer == b"x"
