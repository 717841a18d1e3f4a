"""TLS in the transport: large writes, in bounded memory."""

import os
import tracemalloc

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.error import ConnectionDone
from twisted.internet.threads import deferToThread

from tests.support.eventually import eventually
from tests.support.recording import Recording, nothing
from tests.support.tls_client import Client
from tests.support.tls_libraries import BOTH
from tests.support.tls_versions import VERSIONS


@VERSIONS
@pytest.mark.parametrize("pieces", [1, 800], ids=["one write", "800 writes"])
@pytest_twisted.inlineCallbacks
def test_a_slow_reader_receives_fifty_mebibytes_and_close_notify_in_bounded_memory(
    serve, client_context, version, pieces
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
        with Client(served.address, client_context(version), receive_buffer=64 * 1024).shake() as peer:
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
    # The client's copy is also in this process; the rest is the server's memory beyond the written data.
    assert peak < size * 1.15 + (4 << 20)
    yield eventually(lambda: served.closed)
    assert isinstance(served.closed[0][1], ConnectionDone)
    assert served.closed[0][0].bytes_out == size


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_lose_connection_right_after_a_large_write_delivers_everything_and_close_notify(serve, client_context, version):
    data = os.urandom(5 << 20)

    def write_and_close(protocol):
        protocol.transport.writeSequence([data[: 1 << 20], data[1 << 20 :]])
        protocol.transport.loseConnection()
        protocol.transport.write(b"")

    def client():
        with Client(served.address, client_context(version)).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=write_and_close))
    answer = yield deferToThread(client)
    assert answer == data


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_slow_reader_that_also_sends_loses_no_data(serve, client_context):
    """Reads and writes alternate on one TLS state, with a write in between that the kernel did not accept."""
    data = os.urandom(8 << 20)

    def client():
        with Client(served.address, client_context(), receive_buffer=16 * 1024).shake() as peer:
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
def test_writes_of_one_event_are_one_record(serve, client_context):
    sends: list[int] = []

    def write_many(protocol, data):
        send = protocol.transport._send
        protocol.transport._send = lambda piece: sends.append(len(piece)) or send(piece)
        for i in range(1000):
            protocol.transport.write(b"%04d" % i)
        protocol.transport.loseConnection()

    def client():
        with Client(served.address, client_context()).shake() as peer:
            peer.write(b"go")
            return peer.read_to_end()

    served = serve(Recording(on_data=write_many))
    answer = yield deferToThread(client)
    assert answer == b"".join(b"%04d" % i for i in range(1000))
    assert len(sends) == 2, "one record with all of it, and close_notify"
    assert 4000 < sends[0] < 4100


@pytest_twisted.inlineCallbacks
def test_writes_from_a_timer_are_sent(serve, client_context):
    def later(protocol, data):
        reactor.callLater(0, protocol.transport.write, b"one")
        reactor.callLater(0, protocol.transport.writeSequence, [b"two", b"three"])
        reactor.callLater(0.01, protocol.transport.write, bytearray(b"four"))
        reactor.callLater(0.02, protocol.transport.loseConnection)

    def client():
        with Client(served.address, client_context()).shake() as peer:
            peer.write(b"x")
            return peer.read_to_end()

    served = serve(Recording(on_data=later))
    answer = yield deferToThread(client)
    assert answer == b"onetwothreefour"
