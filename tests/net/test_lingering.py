"""Connections that the server closes before the peer has finished sending."""

import contextlib
import errno
import os
import select
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from rtservice.net.connection import Connection
from rtservice.net.port import Port
from tests.support.deadline import DEADLINE
from tests.support.fake_reactor import FakeReactor
from tests.support.recording import Recording
from tests.support.reset import reset


def talking(address) -> bytes:
    """Run a client that keeps sending until it has read everything."""
    enough = threading.Event()

    def send(sock: socket.socket) -> None:
        # After a complete close, later data is answered with a reset.
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
def test_a_client_that_keeps_sending_during_close_receives_every_byte_and_eof(serve, tmp_path, description):
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


def test_data_received_at_close_causes_no_reset(monkeypatch) -> None:
    def too_late(connection, reason):
        lingering.client.sendall(b"now")
        connection_lost(connection, reason)

    connection_lost = Connection.connectionLost
    monkeypatch.setattr(Connection, "connectionLost", too_late)
    lingering = LingeringConnection(b"")
    lingering.close()
    assert lingering.connection.disconnected
    assert lingering.client.recv(100) == b"last words"
    assert lingering.client.recv(100) == b""  # and no reset
    lingering.client.close()


class LingeringConnection:
    """A connection on a fake clock: all output is sent, and the client's data is unread."""

    def __init__(self, unread: bytes = b"unread") -> None:
        self.clock = FakeReactor()
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

    def close(self) -> None:
        self.connection.write(b"last words")
        self.connection.loseConnection()
        self.connection.doWrite()

    @property
    def descriptor(self) -> Any:
        """The descriptor that is registered with the reactor."""
        (reader,) = self.clock.getReaders()
        return reader

    def send_more(self) -> None:
        """Send data from the client, and let the server read it."""
        self.client.sendall(b"more")
        select.select([self.connection.socket], [], [], DEADLINE)
        assert self.descriptor.doRead() is None


@pytest.fixture
def lingering():
    lingering = LingeringConnection()
    lingering.close()
    yield lingering
    lingering.client.close()
    assert lingering.clock.getDelayedCalls() == []
    assert lingering.clock.getReaders() == lingering.clock.getWriters() == []


def test_a_lingering_connection_has_sent_everything_before_connection_lost(lingering) -> None:
    assert lingering.connection.phase == "closing"
    assert type(lingering.connection) is Connection
    assert not ISSLTransport.providedBy(lingering.connection)
    assert lingering.client.recv(100) == b"last words"
    assert lingering.client.recv(100) == b""
    lingering.connection.write(b"too late")
    lingering.connection.loseConnection()
    assert lingering.factory.lost == []
    lingering.client.close()
    assert lingering.descriptor.doRead() is None  # the unread data
    lingering.descriptor.readConnectionLost(Failure(ConnectionDone()))
    assert [type(reason) for reason in lingering.factory.lost] == [ConnectionDone]
    assert lingering.factory.transports == [Connection]


def test_lingering_ends_after_a_second_without_progress(lingering) -> None:
    lingering.send_more()
    lingering.clock.advance(1)
    lingering.clock.advance(0.99)
    assert lingering.factory.lost == []
    lingering.clock.advance(0.01)
    assert [type(reason) for reason in lingering.factory.lost] == [ConnectionDone]
    assert lingering.factory.transports == [Connection]
    assert lingering.connection.disconnected


def test_lingering_ends_after_thirty_seconds_if_the_peer_keeps_sending(lingering) -> None:
    for _ in range(30):
        assert lingering.factory.lost == []
        lingering.send_more()
        lingering.clock.advance(1)
    assert [type(reason) for reason in lingering.factory.lost] == [ConnectionDone]


def test_abort_resets_a_lingering_connection_and_is_reported_once(lingering) -> None:
    lingering.connection.abortConnection()
    assert lingering.factory.lost == []
    lingering.clock.advance(0)
    assert [type(reason) for reason in lingering.factory.lost] == [ConnectionAborted]
    assert lingering.factory.transports == [Connection]
    with pytest.raises(BrokenPipeError):  # a reset, after FIN
        lingering.client.sendall(b"x")


def test_abort_at_the_end_of_lingering_is_reported_once(lingering) -> None:
    lingering.clock.callLater(1, lingering.connection.abortConnection)
    lingering.clock.advance(1)
    lingering.clock.advance(0)
    assert len(lingering.factory.lost) == 1


def test_a_reset_of_a_lingering_connection_ends_it_with_the_error(lingering) -> None:
    reset(lingering.client)
    select.select([lingering.connection.socket], [], [], DEADLINE)
    assert lingering.descriptor.doRead() is None  # the unread data
    why = lingering.descriptor.doRead()
    assert isinstance(why, ConnectionLost)
    assert lingering.connection.error.errno == errno.ECONNRESET
    lingering.descriptor.connectionLost(Failure(why))
    assert lingering.factory.transports == [Connection]


def test_close_stops_a_producer_without_waiting_for_it() -> None:
    """This applies to a paused producer, an endless producer, and the transport as its own producer."""
    calls: list[str] = []

    class Producer:
        pauseProducing = resumeProducing = lambda self: calls.append("more")

        def stopProducing(self):
            calls.append("stop")

    for streaming, itself in ((True, False), (False, False), (True, True)):
        near, far = socket.socketpair()
        near.setblocking(False)
        clock, factory = FakeReactor(), Recording()
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
        (connection._stage or connection).readConnectionLost(Failure(ConnectionDone()))  # ends lingering
        assert [type(reason) for reason in factory.lost] == [ConnectionDone]
        assert calls == ([] if itself else ["stop"])
        assert str(connection.error) == "drained"
