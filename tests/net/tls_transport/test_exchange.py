"""TLS in the transport: greeting, echo, and half-close."""

import contextlib
import os
import ssl

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionDone
from twisted.internet.threads import deferToThread

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.greeting import GREETING
from tests.support.recording import HalfClosing, Recorder, Recording
from tests.support.tls_client import Client
from tests.support.tls_libraries import BOTH
from tests.support.tls_versions import VERSIONS


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_a_client_receives_the_greeting_and_its_echo(serve, client_context, version):
    def client():
        with Client(served.address, client_context(version)).shake() as peer:
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
def test_half_close_echoes_everything_received_and_answers_with_close_notify(serve, client_context, version, protocol):
    def client():
        with Client(served.address, client_context(version)).shake() as peer:
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
def test_data_in_one_segment_with_close_notify_is_echoed(serve, client_context, version):
    def client():
        with Client(served.address, client_context(version)).shake() as peer:
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
def test_data_sent_with_the_client_finished_message_is_not_lost(serve, client_context, version, notify):
    """In TLS 1.3 the client may send data right after its Finished; in 1.2 it waits for the server's."""

    def client():
        with Client(served.address, client_context(version)) as peer:
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
def test_a_thousand_records_in_few_segments_are_all_processed(serve, client_context):
    def client():
        with Client(served.address, client_context()).shake() as peer:
            for i in range(1000):
                peer.tls.write(b"%04d" % i)
            peer.flush()
            return peer.read_exactly(4000)

    served = serve(Recording())
    answer = yield deferToThread(client)
    assert answer == b"".join(b"%04d" % i for i in range(1000))


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_record_received_byte_by_byte_is_processed_when_complete(serve, client_context):
    def client():
        with Client(served.address, client_context()) as peer:
            peer.outgoing, real = peer.outgoing, peer.outgoing
            peer.flush = lambda: [peer.sock.send(bytes([byte])) for byte in real.read()]
            peer.shake()
            peer.write(b"hello")
            return peer.read_exactly(5)

    served = serve(Recording())
    answer = yield deferToThread(client)
    assert answer == b"hello"
    assert served.factory.received == b"hello"
