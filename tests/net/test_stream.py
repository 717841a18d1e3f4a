"""The transport's contract, on loopback sockets and the real reactor."""

import contextlib
import errno
import os
import socket
import struct
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.internet.threads import deferToThread
from twisted.logger import LogLevel, globalLogPublisher
from zope.interface import implementer

from rtservice.net.listeners import open_description
from rtservice.net.stream import Port

DEADLINE = 20


class Recorder(Protocol):
    """Does what its factory's hooks say, and tells when it ended."""

    def connectionMade(self):
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data):
        self.factory.on_data(self, data)

    def connectionLost(self, reason):
        self.factory.lost.append(reason.value)
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

    def start(factory, description="tcp:0:interface=127.0.0.1"):
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
    import threading

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
    from rtservice.net.stream import Connection

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
    assert len([event for event in logged if event["log_namespace"] == "rtservice.net.stream"]) == 1
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
        assert len([event for event in logged if event["log_namespace"] == "rtservice.net.stream"]) == 2


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
    (connection,) = [reader for reader in clock.getReaders() if reader is not port]
    far.sendall(b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
    assert connection.doRead() is None
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
