"""TLS in the transport: slow, stalled and failed handshakes."""

import contextlib
import os
import socket
import ssl

import pytest
import pytest_twisted
from twisted.internet.error import ConnectionLost
from twisted.internet.threads import deferToThread

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.recording import Recording, nothing
from tests.support.timed_reactor import Timed
from tests.support.tls_client import Client
from tests.support.tls_libraries import BOTH
from tests.support.tls_service import reactor_is_free_of


@BOTH
@pytest.mark.parametrize("sent", ["nothing", "half a hello", "hello"])
@pytest_twisted.inlineCallbacks
def test_fifty_stalled_handshakes_end_at_the_deadline_and_free_their_memory(serve, client_context, sent):
    def clients():
        peers = []
        for _ in range(50):
            peer = Client(served.address, client_context())
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
def test_a_completed_or_failed_handshake_leaves_no_timer(serve, client_context):
    def good():
        return Client(served.address, client_context()).shake()

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
def test_a_client_hello_sent_byte_by_byte_does_not_extend_the_deadline(serve, client_context):
    timed = Timed()
    served = serve(Recording(), on=timed, timeout=10)
    peer = yield deferToThread(Client, served.address, client_context())
    with peer:
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.tls.do_handshake()
        hello = peer.outgoing.read()
        yield eventually(lambda: served.opened)
        for i in range(101):
            assert served.closed == []
            peer.sock.sendall(hello[i : i + 1])
            for _ in range(3):
                yield deferToThread(nothing)  # one iteration of the reactor, including its poll
            timed.clock.advance(0.1)
        assert len(served.closed) == 1


@pytest_twisted.inlineCallbacks
def test_abort_and_lose_connection_end_a_handshake(serve, client_context):
    served = serve(Recording())
    peers = []
    for _ in range(2):
        peers.append((yield deferToThread(socket.create_connection, served.address, DEADLINE)))
    yield eventually(lambda: len(served.opened) == 2)
    served.opened[0].abortConnection()
    yield eventually(lambda: len(served.closed) == 1)
    with pytest.raises(ConnectionResetError):
        yield deferToThread(peers[0].recv, 10)
    # A write and a close before the end of the handshake wait for it.
    served.opened[1].write(b"last words")
    served.opened[1].loseConnection()

    def client():
        peer = Client.__new__(Client)
        peer.sock, peer.incoming, peer.outgoing = peers[1], ssl.MemoryBIO(), ssl.MemoryBIO()
        peer.tls = client_context().wrap_bio(peer.incoming, peer.outgoing, server_hostname="localhost")
        return peer.shake().read_to_end()

    answer = yield deferToThread(client)
    assert answer == b"last words"
    for peer in peers:
        peer.close()


@BOTH
@pytest_twisted.inlineCallbacks
def test_handshakes_and_connections_continue_after_the_port_stops(serve, client_context):
    served = serve(Recording())
    done = yield deferToThread(lambda: Client(served.address, client_context()).shake())
    peer = yield deferToThread(Client, served.address, client_context())
    with done, peer:
        yield eventually(lambda: len(served.opened) == 2)
        served.port.stopListening()
        yield deferToThread(peer.shake)
        for client in (done, peer):
            client.write(b"hello")
            answer = yield deferToThread(client.read_exactly, 5)
            assert answer == b"hello"
