"""Connections and ports: the contract of a transport, on loopback sockets and the real reactor."""

import contextlib
import errno
import os
import select
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, globalLogPublisher
from twisted.python.failure import Failure
from zope.interface import implementer

from rtservice.net.connection import Connection
from rtservice.net.listeners import open_description
from rtservice.net.port import Port

DEADLINE = 20


class Recorder(Protocol):
    """Does what its factory's hooks say, and tells when it ended, and what its transport was then."""

    def connectionMade(self):
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data):
        self.factory.on_data(self, data)

    def connectionLost(self, reason):
        self.factory.lost.append(reason.value)
        self.factory.transports.append(type(self.transport))
        waiting, self.factory.waiting = self.factory.waiting, []
        for deferred in waiting:
            # Later, since the connection itself ends after its protocol.
            reactor.callLater(0, deferred.callback, reason.value)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    def readConnectionLost(self):
        self.factory.on_fin(self)

    def writeConnectionLost(self):
        self.factory.write_lost += 1


class Recording(Factory):
    noisy = False

    def __init__(self, protocol=Recorder, on_connect=None, on_data=None, on_fin=None):
        self.protocol = protocol
        self.on_connect = on_connect or (lambda protocol: None)
        self.on_data = on_data or (lambda protocol, data: protocol.transport.write(data))
        self.on_fin = on_fin or (lambda protocol: protocol.transport.loseConnection())
        self.made: list[Any] = []
        self.lost: list[Any] = []
        self.transports: list[type] = []
        self.waiting: list[Deferred] = []
        self.write_lost = 0

    def end(self) -> Deferred:
        """Fires with the reason when a connection ends, or at once when one has."""
        deferred: Deferred = Deferred()
        if self.lost:
            deferred.callback(self.lost[-1])
        else:
            self.waiting.append(deferred)
        return deferred.addTimeout(DEADLINE, reactor)


@pytest.fixture
def serve():
    """Serves a factory on a free loopback port; gives its address and the closed connections."""
    started = []
    connections: set[Any] = set()
    idle: list[Deferred] = []  # fires when the last connection has ended

    def start(factory, description="tcp:0:interface=127.0.0.1", ports=None):
        (listener,) = open_description(description, backlog=100)
        ended = []

        def closed(connection, reason):
            ended.append(connection)
            connections.discard(connection)
            if idle and not connections:
                idle.pop().callback(None)

        port = Port(reactor, listener.socket, factory, name=listener.name, opened=connections.add, closed=closed)
        port.startListening()
        started.append((port, listener))
        if ports is not None:
            ports.append((port, listener))
        return listener.socket.getsockname(), ended

    yield start
    for port, listener in started:
        port.stopListening()
        listener.close()
    if connections:
        idle.append(Deferred())
        waiting = idle[0].addTimeout(DEADLINE, reactor)
        for connection in list(connections):
            connection.abortConnection()
        pytest_twisted.blockon(waiting)


def talk(address, *steps) -> bytes:
    """A blocking client: sends bytes steps, or calls a step with the socket; then reads to the end."""
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


def reset(sock: socket.socket) -> None:
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def connected(address) -> socket.socket:
    sock = socket.create_connection(address, timeout=DEADLINE)
    return sock


@pytest_twisted.inlineCallbacks
def test_half_close_echoes_everything_received_also_for_a_protocol_that_knows_nothing_of_it(serve):
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
    """Send and read at the same time, as nc does."""
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
def test_a_client_that_had_already_finished_gets_all_that_is_written_on_connect(serve):
    data = os.urandom(4 << 20)
    address, _ = serve(Recording(on_connect=lambda protocol: protocol.transport.write(data)))
    for _ in range(20):
        answer = yield deferToThread(talk, address, finish)
        assert answer == data


@pytest_twisted.inlineCallbacks
def test_a_thousand_writes_in_one_event_are_one_send_in_order(serve):
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
def test_a_transport_that_is_its_own_producer_and_paused_delivers_everything_and_closes(serve):
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
def test_writes_of_a_timer_are_sent(serve):
    def later(protocol, data):
        reactor.callLater(0, protocol.transport.write, b"one")
        reactor.callLater(0, protocol.transport.writeSequence, [b"two", b"three"])
        reactor.callLater(0, protocol.transport.loseConnection)

    address, _ = serve(Recording(on_data=later))
    answer = yield deferToThread(talk, address, b"x")
    assert answer == b"onetwothree"


@pytest_twisted.inlineCallbacks
def test_a_pull_producer_gives_its_whole_content(serve):
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

    address, _ = serve(Recording(on_connect=start))
    answer = yield deferToThread(talk, address)
    assert answer == b"x" * 5_000_000


@pytest_twisted.inlineCallbacks
def test_an_end_of_ours_does_not_wait_for_a_producer_that_was_waited_for(serve):
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
def test_a_push_producer_is_paused_above_64_kib_and_resumed_when_all_is_sent(serve):
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
def test_fifty_megabytes_to_a_slow_reader_arrive_with_little_of_them_in_memory(serve):
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
def test_lose_write_connection_sends_fin_and_goes_on_reading(serve):
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
def test_abort_resets_the_peer_and_drops_what_is_unsent(serve):
    def abort(protocol, data):
        protocol.transport.write(b"never")
        protocol.transport.abortConnection()
        assert not factory.lost  # the protocol hears of it in a later event

    factory = Recording(on_data=abort)
    address, closed = serve(factory)
    with pytest.raises(ConnectionResetError):
        yield deferToThread(talk, address, b"x")
    reason = yield factory.end()
    assert isinstance(reason, ConnectionAborted)
    assert closed[0].bytes_out == 0


@pytest_twisted.inlineCallbacks
def test_a_peer_that_resets_ends_its_connection_with_the_error(serve):
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
def test_a_peer_that_resets_while_much_is_unsent_ends_its_connection(serve):
    factory = Recording(on_connect=lambda protocol: protocol.transport.write(b"x" * (50 << 20)))
    address, _ = serve(factory)
    yield deferToThread(lambda: reset(connected(address)))
    reason = yield factory.end()
    assert isinstance(reason, ConnectionLost)


@pytest.mark.parametrize("where", ["on_connect", "on_data", "on_fin"])
@pytest_twisted.inlineCallbacks
def test_a_protocol_that_raises_loses_its_connection_alone_and_is_logged_once(serve, where):
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
        with contextlib.suppress(OSError):  # a reset may meet the client at any of its steps
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
def test_a_client_for_whom_no_protocol_is_built_is_closed(serve, build):
    factory = Recording()
    factory.buildProtocol = build
    address, _ = serve(factory)
    answer = yield deferToThread(talk, address)
    assert answer == b""


@pytest_twisted.inlineCallbacks
def test_addresses_are_those_of_the_socket(serve, tmp_path):
    seen = []

    def look(protocol):
        seen.append((protocol.transport.getPeer(), protocol.transport.getHost(), protocol.transport.getTcpNoDelay()))
        protocol.transport.loseConnection()

    address, _ = serve(Recording(on_connect=look))
    yield deferToThread(talk, address)
    path, _ = serve(Recording(on_connect=look), f"unix:{tmp_path}/s")
    yield deferToThread(talk, path)
    (tcp_peer, tcp_host, no_delay), (unix_peer, unix_host, _) = seen
    assert (tcp_peer.host, tcp_host.host, tcp_host.port, no_delay) == ("127.0.0.1", "127.0.0.1", address[1], True)
    assert (unix_peer.name, unix_host.name) == (None, os.fsencode(path))


@pytest.mark.parametrize("data", ["text", 5, None])
def test_write_takes_bytes_alone(data) -> None:
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
def test_write_takes_all_kinds_of_bytes(serve, data):
    def write_and_close(protocol):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    address, _ = serve(Recording(on_connect=write_and_close))
    answer = yield deferToThread(talk, address)
    assert answer == b"x"


class Listening:
    """A listening socket whose accept() does what it is told."""

    family = socket.AF_UNIX

    def __init__(self, *results) -> None:
        self.results = list(results)

    def fileno(self) -> int:
        return 99

    def accept(self):
        result = self.results.pop(0) if self.results else BlockingIOError()
        if isinstance(result, BaseException):
            raise result
        return result


class Reactor(MemoryReactorClock):
    """Takes our descriptors without asking for a real one."""

    def addReader(self, reader):
        self.readers.add(reader)

    def removeReader(self, reader):
        self.readers.discard(reader)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_shortage_rests_the_listener_logs_once_and_resumes(code) -> None:
    logged: list[Any] = []
    clock = Reactor()
    problem = OSError(code, os.strerror(code))
    port = Port(clock, Listening(problem, problem), Recording(), name="test")
    port.startListening()
    globalLogPublisher.addObserver(logged.append)
    try:
        for _ in range(2):
            port.doRead()
            assert port not in clock.getReaders()
            clock.advance(0.5)
            assert port in clock.getReaders()
    finally:
        globalLogPublisher.removeObserver(logged.append)
    assert len([event for event in logged if event["log_namespace"] == "rtservice.net.port"]) == 1
    port.stopListening()
    assert clock.getDelayedCalls() == []


@pytest.mark.parametrize("code", [errno.ECONNABORTED, errno.EPERM, errno.EPROTO])
def test_one_connection_that_failed_before_it_was_accepted_is_skipped(code) -> None:
    near, far = socket.socketpair()
    clock = Reactor()
    factory = Recording(on_connect=lambda protocol: protocol.transport.write(b"hello"))
    port = Port(clock, Listening(OSError(code, "x"), (near, "")), factory, name="test")
    port.startListening()
    port.doRead()
    with near, far:
        assert far.recv(10) == b"hello"


# --- a listener that pauses, rests and refuses ---


def listening(*results, **arguments) -> tuple[Reactor, Port]:
    clock = Reactor()
    port = Port(clock, Listening(*results), Recording(), name="test", **arguments)
    port.startListening()
    return clock, port


def test_a_pause_during_a_rest_outlasts_it() -> None:
    clock, port = listening(OSError(errno.EMFILE, "x"))
    port.doRead()
    port.pause()
    clock.advance(10)
    assert port not in clock.getReaders()
    port.resume()
    assert port in clock.getReaders()
    port.stopListening()


def test_a_resume_ends_no_rest() -> None:
    clock, port = listening(OSError(errno.EMFILE, "x"))
    port.pause()
    port.resume()
    port.doRead()
    port.pause()
    port.resume()
    assert port not in clock.getReaders()
    clock.advance(0.5)
    assert port in clock.getReaders()
    port.stopListening()


def test_a_port_that_is_paused_when_it_starts_accepts_nobody_until_it_is_resumed() -> None:
    clock = Reactor()
    port = Port(clock, Listening(), Recording(), name="test")
    port.resume()
    assert port not in clock.getReaders()
    port.pause()
    port.startListening()
    assert port not in clock.getReaders()
    port.resume()
    assert port in clock.getReaders()
    port.stopListening()
    port.resume()
    assert port not in clock.getReaders()


def test_a_rest_ends_with_the_port() -> None:
    clock, port = listening(OSError(errno.EMFILE, "x"))
    port.doRead()
    port.stopListening()
    clock.advance(10)
    assert port not in clock.getReaders()


def test_a_pause_in_the_middle_of_a_burst_leaves_the_others_in_the_queue() -> None:
    pairs = [socket.socketpair() for _ in range(5)]
    accepted: list[Any] = []

    def opened(connection):
        accepted.append(connection)
        if len(accepted) == 2:
            port.pause()

    _, port = listening(*((near, "") for near, _ in pairs), opened=opened)
    port.doRead()
    assert len(accepted) == 2
    assert len(port.socket.results) == 3
    port.resume()
    port.doRead()
    assert len(accepted) == 5
    port.stopListening()
    for near, far in pairs:
        near.close()
        far.close()


def test_a_shortage_after_a_good_one_is_logged_again() -> None:
    near, far = socket.socketpair()
    logged: list[Any] = []
    shortage = OSError(errno.EMFILE, "x")
    _, port = listening(shortage, (near, ""), shortage)
    globalLogPublisher.addObserver(logged.append)
    try:
        port.doRead()
        port.doRead()
    finally:
        globalLogPublisher.removeObserver(logged.append)
        port.stopListening()
    with near, far:
        assert len([event for event in logged if event["log_namespace"] == "rtservice.net.port"]) == 2


@pytest.mark.parametrize("proxied", [False, True])
def test_who_is_refused_when_he_comes_is_closed_and_nobody_is_told(proxied) -> None:
    near, far = socket.socketpair()
    closed: list[Any] = []
    clock, port = listening(
        (near, ""), proxied=proxied, opened=lambda connection: connection.refuse(), closed=lambda *_: closed.append(_)
    )
    port.doRead()
    with far:
        assert far.recv(10) == b""
    assert near.fileno() == -1
    assert clock.getReaders() == [port]
    assert clock.getDelayedCalls() == []
    assert (port.factory.made, port.factory.lost, closed) == ([], [], [])
    port.stopListening()


def test_who_is_refused_by_his_header_is_closed_and_nobody_is_told() -> None:
    near, far = socket.socketpair()
    closed: list[Any] = []
    clock, port = listening(
        (near, ""),
        proxied=True,
        identified=lambda connection: connection.refuse(),
        closed=lambda *_: closed.append(_),
    )
    port.doRead()
    (handshake,) = [reader for reader in clock.getReaders() if reader is not port]
    connection = handshake.connection
    far.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
    assert handshake.doRead() is None
    with far:
        assert far.recv(10) == b""
    assert near.fileno() == -1
    assert clock.getReaders() == [port]
    assert clock.getDelayedCalls() == []
    assert (port.factory.made, port.factory.lost, closed) == ([], [], [])
    # What a reactor or a protocol may still ask of it does nothing.
    connection.write(b"x")
    connection.loseConnection()
    connection.abortConnection()
    connection.connectionLost(None)
    assert clock.getDelayedCalls() == []
    port.stopListening()


def test_a_finish_waits_for_a_paused_port_and_a_resting_one() -> None:
    near, far = socket.socketpair()
    clock, port = listening(OSError(errno.EMFILE, "x"), (near, ""))
    port.pause()
    finished: list[Any] = []
    port.finish().addCallback(finished.append)
    clock.advance(5)
    assert port.listening
    port.resume()
    clock.pump([0.2] * 2)  # it runs into the shortage
    assert port.listening
    clock.pump([0.2] * 10)
    assert finished == [None]
    with near, far:
        assert len(port.factory.made) == 1


# --- the end of a connection whose peer has not finished ---


def talking(address) -> bytes:
    """A client that sends and sends, until it has read all that its server says."""
    enough = threading.Event()

    def send(sock: socket.socket) -> None:
        # When we are closed with all said and all read, what is sent later comes too late.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while not enough.is_set():
                sock.sendall(b"x" * 65536)

    with socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(address)
        with ThreadPoolExecutor() as pool:
            sending = pool.submit(send, sock)
            received = bytearray()
            try:
                while piece := sock.recv(1 << 16):
                    received += piece
            finally:
                enough.set()
            sending.result()
        return bytes(received)


@pytest.mark.parametrize("description", ["tcp:0:interface=127.0.0.1", "unix:{}/s"], ids=["tcp", "unix"])
@pytest_twisted.inlineCallbacks
def test_a_client_that_sends_on_while_we_close_reads_every_byte_and_the_end(serve, tmp_path, description):
    def write_and_close(protocol, data):
        protocol.transport.write(content)
        protocol.transport.loseConnection()

    content = os.urandom(4 << 20)
    factory = Recording(on_data=write_and_close)
    address, closed = serve(factory, description.format(tmp_path))
    for count in range(1, 21):
        answer = yield deferToThread(talking, address)
        assert answer == content
        while len(closed) < count:
            yield deferToThread(lambda: None)
    assert [type(reason) for reason in factory.lost] == [ConnectionDone] * 20
    assert factory.transports == [Connection] * 20


def test_what_comes_in_the_very_moment_of_our_close_takes_nothing_from_the_client(monkeypatch) -> None:
    def too_late(connection, reason):
        one.client.sendall(b"now")
        connection_lost(connection, reason)

    connection_lost = Connection.connectionLost
    monkeypatch.setattr(Connection, "connectionLost", too_late)
    one = Ending(b"")
    one.closes()
    assert one.connection.disconnected
    assert one.client.recv(100) == b"last words"
    assert one.client.recv(100) == b""  # and no reset
    one.client.close()


class Ending:
    """A connection with a client, on the test's clock: everything is sent, and what came from the client is unread."""

    def __init__(self, unread: bytes = b"unread") -> None:
        self.clock = Reactor()
        self.factory = Recording()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            self.client = socket.create_connection(listening.getsockname(), timeout=DEADLINE)
            near, _ = listening.accept()
        near.setblocking(False)
        port = Port(self.clock, near, self.factory, name="test")
        self.connection = Connection(self.clock, near, port, None, 1)
        self.connection.connect_protocol()
        if unread:
            self.client.sendall(unread)
            select.select([near], [], [], DEADLINE)

    def closes(self) -> None:
        self.connection.write(b"last words")
        self.connection.loseConnection()
        self.connection.doWrite()

    @property
    def descriptor(self) -> Any:
        """What the reactor reads from."""
        (reader,) = self.clock.getReaders()
        return reader

    def says_more(self) -> None:
        """The client sends something, which is read."""
        self.client.sendall(b"more")
        select.select([self.connection.socket], [], [], DEADLINE)
        assert self.descriptor.doRead() is None


@pytest.fixture
def ending():
    one = Ending()
    one.closes()
    yield one
    one.client.close()
    assert one.clock.getDelayedCalls() == []
    assert one.clock.getReaders() == one.clock.getWriters() == []


def test_a_connection_that_lingers_has_said_all_and_its_protocol_has_not_heard_of_the_end(ending) -> None:
    assert ending.connection.phase == "closing"
    assert type(ending.connection) is Connection
    assert not ISSLTransport.providedBy(ending.connection)
    assert ending.client.recv(100) == b"last words"
    assert ending.client.recv(100) == b""
    ending.connection.write(b"too late")
    ending.connection.loseConnection()
    assert ending.factory.lost == []
    ending.client.close()
    assert ending.descriptor.doRead() is None  # what was unread
    ending.descriptor.readConnectionLost(Failure(ConnectionDone()))
    assert [type(reason) for reason in ending.factory.lost] == [ConnectionDone]
    assert ending.factory.transports == [Connection]


def test_a_peer_that_neither_reads_nor_sends_is_let_go_when_nothing_has_moved_for_a_second(ending) -> None:
    ending.says_more()
    ending.clock.advance(1)
    ending.clock.advance(0.99)
    assert ending.factory.lost == []
    ending.clock.advance(0.01)
    assert [type(reason) for reason in ending.factory.lost] == [ConnectionDone]
    assert ending.factory.transports == [Connection]
    assert ending.connection.disconnected


def test_a_peer_that_sends_for_ever_is_let_go_after_half_a_minute(ending) -> None:
    for _ in range(30):
        assert ending.factory.lost == []
        ending.says_more()
        ending.clock.advance(1)
    assert [type(reason) for reason in ending.factory.lost] == [ConnectionDone]


def test_abort_of_a_connection_that_lingers_resets_it_and_is_heard_of_once(ending) -> None:
    ending.connection.abortConnection()
    assert ending.factory.lost == []
    ending.clock.advance(0)
    assert [type(reason) for reason in ending.factory.lost] == [ConnectionAborted]
    assert ending.factory.transports == [Connection]
    with pytest.raises(BrokenPipeError):  # a reset, after FIN
        ending.client.sendall(b"x")


def test_abort_in_the_very_moment_in_which_it_is_let_go_is_one_end(ending) -> None:
    ending.clock.callLater(1, ending.connection.abortConnection)
    ending.clock.advance(1)
    ending.clock.advance(0)
    assert len(ending.factory.lost) == 1


def test_a_peer_that_resets_a_connection_that_lingers_ends_it_with_the_error(ending) -> None:
    reset(ending.client)
    select.select([ending.connection.socket], [], [], DEADLINE)
    assert ending.descriptor.doRead() is None  # what was unread
    why = ending.descriptor.doRead()
    assert isinstance(why, ConnectionLost)
    assert ending.connection.error.errno == errno.ECONNRESET
    ending.descriptor.connectionLost(Failure(why))
    assert ending.factory.transports == [Connection]


def test_an_end_of_ours_does_not_wait_for_a_producer_and_lets_it_know() -> None:
    """Neither for one that is paused, nor for one that would go on for ever, nor for the transport itself."""
    calls: list[str] = []

    class Producer:
        pauseProducing = resumeProducing = lambda self: calls.append("more")

        def stopProducing(self):
            calls.append("stop")

    for streaming, itself in ((True, False), (False, False), (True, True)):
        near, far = socket.socketpair()
        near.setblocking(False)
        clock, factory = Reactor(), Recording()
        connection = Connection(clock, near, Port(clock, near, factory, name="test"), None, 1)
        connection.connect_protocol()
        connection.registerProducer(connection if itself else Producer(), streaming)
        connection.write(b"x" * (1 << 20))
        calls.clear()
        connection.doWrite()
        assert connection.unsent
        connection.close("drained")
        with far:
            left = 1 << 20
            while left:
                left -= len(far.recv(left))
                connection.doWrite()
            far.close()
        (connection._stage or connection).readConnectionLost(Failure(ConnectionDone()))  # if it lingered
        assert [type(reason) for reason in factory.lost] == [ConnectionDone]
        assert calls == ([] if itself else ["stop"])
        assert str(connection.error) == "drained"


# --- the end of a listener ---


def state_of(sock: socket.socket) -> int:
    """`tcpi_state` of struct tcp_info, tcp(7)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


SYN_SENT = 2  # include/net/tcp_states.h


@pytest.mark.parametrize("count", [0, 1, 99])
@pytest.mark.parametrize("description", ["tcp:0:interface=127.0.0.1", "unix:{}/s"], ids=["tcp", "unix"])
@pytest_twisted.inlineCallbacks
def test_a_listener_that_finishes_serves_its_queue_and_nobody_who_comes_later(serve, tmp_path, description, count):
    """With more in the queue than one event accepts; and what is accepted lives on without the listener."""
    factory, ports = Recording(), []
    address, _ = serve(factory, description.format(tmp_path), ports)
    ((port, listener),) = ports
    kind = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    queued = [socket.socket(kind) for _ in range(count)]
    for client in queued:
        client.settimeout(DEADLINE)
        client.connect(address)
    listener.remove_file()
    finished = port.finish()
    late = socket.socket(kind)
    late.setblocking(False)
    if kind == socket.AF_INET:
        assert late.connect_ex(address) == errno.EINPROGRESS
    else:
        assert late.connect_ex(address) == errno.ENOENT
    yield finished.addTimeout(DEADLINE, reactor)
    assert len(factory.made) == count
    assert not port.listening
    if kind == socket.AF_INET:
        assert state_of(late) == SYN_SENT
        listener.close()
        yield deferToThread(select.select, [], [late], [], DEADLINE)
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
    late.close()
    for client in queued:
        with client:
            client.sendall(b"hello")
            answer = yield deferToThread(client.recv, 100)
            assert answer == b"hello"


def finishing(*results) -> tuple[Reactor, Port, Recording, list[bool]]:
    """A port with a queue of these, on the test's clock, and whether it has finished."""
    clock, factory, done = Reactor(), Recording(), []
    port = Port(clock, Listening(*results), factory, name="test")
    port.startListening()
    return clock, port, factory, done


def pair() -> tuple[socket.socket, str]:
    """What accept() gives."""
    near, _ = socket.socketpair()
    return near, ""


def test_a_listener_has_finished_when_nobody_came_for_as_long_as_a_handshake_takes() -> None:
    clock, port, factory, done = finishing()
    port.finish().addCallback(done.append)
    clock.advance(0.1)
    port.socket.results.append(pair())  # a client far away, whose handshake was under way
    port.doRead()
    clock.pump([0.1, 0.1])
    port.socket.results.append(pair())
    port.doRead()
    clock.pump([0.1, 0.1, 0.09])
    assert (len(factory.made), done, port.listening) == (2, [], True)
    clock.advance(0.02)
    assert (done, port.listening) == ([None], False)
    for protocol in factory.made:
        protocol.transport.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []


def test_a_paused_listener_finishes_when_it_may_go_on() -> None:
    clock, port, factory, done = finishing()
    port.pause()
    port.socket.results.append(pair())
    port.finish().addCallback(done.append)
    clock.pump([0.2] * 100)
    assert (factory.made, done) == ([], [])
    port.resume()
    clock.pump([0.2] * 3)
    assert (len(factory.made), done) == (1, [None])
    factory.made[0].transport.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []


def test_a_listener_that_pauses_while_it_finishes_waits_too() -> None:
    """The register pauses it when the limit is reached, by a client of its queue."""
    clock, port, factory, done = finishing(pair(), pair())
    factory.on_connect = lambda protocol: port.pause()
    port.finish().addCallback(done.append)
    for count in (1, 2):
        clock.pump([0.2] * 100)
        assert (len(factory.made), done) == (count, [])
        port.resume()
    clock.pump([0.2] * 3)
    assert done == [None]
    for protocol in factory.made:
        protocol.transport.connectionLost(Failure(ConnectionDone()))


def test_a_listener_that_finishes_outlives_a_shortage() -> None:
    clock, port, factory, done = finishing(OSError(errno.EMFILE, "x"), pair())
    port.finish().addCallback(done.append)
    clock.pump([0.1] * 4)
    assert (factory.made, done) == ([], [])
    clock.pump([0.1] * 10)
    assert (len(factory.made), done) == (1, [None])
    factory.made[0].transport.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []


def test_a_listener_that_is_stopped_has_finished() -> None:
    clock, port, _, done = finishing()
    port.finish().addCallback(done.append)
    port.stopListening()
    assert done == [None]
    assert clock.getDelayedCalls() == []
    port.finish().addCallback(done.append)  # nothing is left to do
    assert done == [None, None]
