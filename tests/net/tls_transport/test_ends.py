"""TLS in the transport: all ways a connection can end."""

import contextlib
import os
import select
import socket
import ssl

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHandshakeListener
from twisted.internet.threads import deferToThread
from zope.interface import implementer

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.recording import HalfClosing, Recording, nothing
from tests.support.reset import reset
from tests.support.tls_client import Client, ResetError
from tests.support.tls_libraries import BOTH
from tests.support.tls_service import reactor_is_free_of
from tests.support.tls_versions import VERSIONS


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_fin_without_close_notify_is_reported_as_connection_lost(serve, client_context, version, logged):
    def client():
        with Client(served.address, client_context(version)).shake() as peer:
            peer.write(b"cut?")
            assert peer.read_exactly(4) == b"cut?"
            peer.fin()
            with pytest.raises((ssl.SSLError, ResetError)):
                peer.read()

    served = serve(Recording(HalfClosing, on_fin=nothing))
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
def test_a_client_reset_ends_only_its_connection(serve, client_context, moment, logged):
    def client():
        peer = Client(served.address, client_context())
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


GARBAGE = {
    "zeros": bytes(1000),
    "noise": bytes(range(255, -1, -1)) * 4,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "plain text": b"hello\n",
    "ssl2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(40),
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "data before the handshake": b"\x17\x03\x03\x00\x05hello",
    "an empty ClientHello": b"\x16\x03\x01\x00\x04\x01\x00\x00\x00",
    "an oversized record": b"\x16\x03\x01\xff\xff" + bytes(100),
    "one byte and FIN": b"\x16",
    "nothing and FIN": b"",
}


@BOTH
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
@pytest_twisted.inlineCallbacks
def test_garbage_instead_of_a_client_hello_closes_the_connection_immediately(serve, garbage, logged):
    def client():
        with socket.create_connection(served.address, timeout=DEADLINE) as sock:
            sock.sendall(garbage)
            if len(garbage) < 2:
                sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):  # the kernel sends RST because of unread data
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
def test_a_client_may_leave_after_any_prefix_of_its_handshake(serve, client_context, logged):
    """With FIN or RST, after many prefixes of both flights of a client."""

    def client():
        count = 0
        for version in ("TLSv1_2", "TLSv1_3"):
            for end in (socket.socket.close, reset):
                for cut in (0, 1, 5, 6, 50, 150, 10_000):
                    peer = Client(served.address, client_context(version))
                    with contextlib.suppress(ssl.SSLWantReadError):
                        peer.tls.do_handshake()
                    hello = peer.outgoing.read()
                    peer.sock.sendall(hello[:cut])
                    end(peer.sock)
                    count += 1
                for cut in (1, 5, 6, 20, 40):
                    peer = Client(served.address, client_context(version))
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
def test_a_tampered_record_ends_its_connection(serve, client_context, version, logged):
    def client():
        with Client(served.address, client_context(version)).shake() as peer:
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
def test_abort_resets_the_connection_and_drops_unsent_data(serve, client_context):
    def abort(protocol, data):
        protocol.transport.write(b"never")
        protocol.transport.abortConnection()
        assert not served.factory.lost  # connectionLost is called in a later event

    def client():
        with Client(served.address, client_context()).shake() as peer:
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
def test_lose_connection_delivers_unsent_data_to_a_client_that_sends_close_notify_first(serve, client_context):
    """Both sides send close_notify at the same time; unsent data is still sent."""
    data = os.urandom(4 << 20)

    def write_and_close(protocol, _):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, client_context(), receive_buffer=16 * 1024).shake() as peer:
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
def test_a_client_that_keeps_sending_during_close_receives_every_byte_and_no_reset(serve, client_context, version):
    data = os.urandom(4 << 20)

    def write_and_close(protocol, _):
        protocol.transport.write(data)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, client_context(version)).shake() as peer:
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
    assert served.factory.secure == [True] * 10


@pytest.mark.parametrize("where", ["on_connect", "on_data", "on_fin", "on_handshake"])
@pytest_twisted.inlineCallbacks
def test_an_exception_in_a_protocol_ends_only_its_connection_and_is_logged_once(serve, client_context, where, logged):
    def fail(*_):
        raise ZeroDivisionError("of the test")

    def client():
        # The server may have closed at any of these steps.
        with contextlib.suppress(OSError, ResetError), Client(served.address, client_context()).shake() as peer:
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
    bystander = yield deferToThread(lambda: Client(good.address, client_context()).shake())
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
def test_a_connection_is_closed_if_no_protocol_is_built(serve, client_context, build):
    def client():
        with Client(served.address, client_context()).shake() as peer, contextlib.suppress(ssl.SSLEOFError, ResetError):
            assert peer.read() == b""

    factory = Recording()
    factory.buildProtocol = build
    served = serve(factory)
    yield deferToThread(client)
    yield eventually(lambda: served.closed)


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_lose_write_connection_sends_close_notify_and_continues_reading(serve, client_context, version):
    def on_data(protocol, data):
        if data == b"first":
            protocol.transport.write(b"last words")
            protocol.transport.loseWriteConnection()

    def client():
        with Client(served.address, client_context(version)).shake() as peer:
            peer.write(b"first")
            answer = b""
            while piece := peer.read():
                answer += piece
            # An answer while `ssl` closes would end the connection.
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
