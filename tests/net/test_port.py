"""Ports: accept, pause, delay after a shortage, refuse, and finish."""

import errno
import os
import select
import socket
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.error import ConnectionDone
from twisted.internet.threads import deferToThread
from twisted.logger import globalLogPublisher
from twisted.python.failure import Failure

from rtservice.net.port import Port
from tests.support.deadline import DEADLINE
from tests.support.fake_reactor import FakeReactor
from tests.support.fake_socket import FakeListeningSocket, listening
from tests.support.recording import Recording


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_a_resource_shortage_delays_accepting_and_is_logged_once(code) -> None:
    logged: list[Any] = []
    clock = FakeReactor()
    problem = OSError(code, os.strerror(code))
    port = Port(clock, FakeListeningSocket(problem, problem), Recording(), name="test")
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
def test_a_connection_that_failed_before_accept_is_skipped(code) -> None:
    near, far = socket.socketpair()
    clock = FakeReactor()
    factory = Recording(on_connect=lambda protocol: protocol.transport.write(b"hello"))
    port = Port(clock, FakeListeningSocket(OSError(code, "x"), (near, "")), factory, name="test")
    port.startListening()
    port.doRead()
    with near, far:
        assert far.recv(10) == b"hello"


# --- pause, shortage delay and refusal ---


def test_a_pause_outlasts_a_shortage_delay() -> None:
    clock, port = listening(OSError(errno.EMFILE, "x"))
    port.doRead()
    port.pause()
    clock.advance(10)
    assert port not in clock.getReaders()
    port.resume()
    assert port in clock.getReaders()
    port.stopListening()


def test_resume_does_not_end_a_shortage_delay() -> None:
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


def test_a_port_paused_before_its_start_accepts_only_after_resume() -> None:
    clock = FakeReactor()
    port = Port(clock, FakeListeningSocket(), Recording(), name="test")
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


def test_stopping_the_port_ends_a_shortage_delay() -> None:
    clock, port = listening(OSError(errno.EMFILE, "x"))
    port.doRead()
    port.stopListening()
    clock.advance(10)
    assert port not in clock.getReaders()


def test_a_pause_during_a_burst_leaves_the_remaining_clients_in_the_backlog() -> None:
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


def test_a_shortage_after_a_successful_accept_is_logged_again() -> None:
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
def test_a_connection_refused_on_accept_is_closed_without_a_closed_callback(proxied) -> None:
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


def test_a_connection_refused_after_its_header_is_closed_without_a_closed_callback() -> None:
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
    # Later calls from a reactor or a protocol do nothing.
    connection.write(b"x")
    connection.loseConnection()
    connection.abortConnection()
    connection.connectionLost(None)
    assert clock.getDelayedCalls() == []
    port.stopListening()


def test_finish_waits_for_a_pause_and_for_a_shortage_delay() -> None:
    near, far = socket.socketpair()
    clock, port = listening(OSError(errno.EMFILE, "x"), (near, ""))
    port.pause()
    finished: list[Any] = []
    port.finish().addCallback(finished.append)
    clock.advance(5)
    assert port.listening
    port.resume()
    clock.pump([0.2] * 2)  # the accept fails with the shortage
    assert port.listening
    clock.pump([0.2] * 10)
    assert finished == [None]
    with near, far:
        assert len(port.factory.made) == 1


# --- finish ---


def state_of(sock: socket.socket) -> int:
    """`tcpi_state` of struct tcp_info, tcp(7)."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


SYN_SENT = 2  # include/net/tcp_states.h


@pytest.mark.parametrize("count", [0, 1, 99])
@pytest.mark.parametrize("description", ["tcp:0:interface=127.0.0.1", "unix:{}/s"], ids=["tcp", "unix"])
@pytest_twisted.inlineCallbacks
def test_finish_serves_the_backlog_and_no_later_clients(serve, tmp_path, description, count):
    """The backlog holds more clients than one event accepts, and accepted connections survive the listener."""
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


def finishing(*results) -> tuple[FakeReactor, Port, Recording, list[bool]]:
    """Return a started port with these accept() results: its reactor, the port, its factory, and a list for results."""
    clock, factory, done = FakeReactor(), Recording(), []
    port = Port(clock, FakeListeningSocket(*results), factory, name="test")
    port.startListening()
    return clock, port, factory, done


def pair() -> tuple[socket.socket, str]:
    """A result of accept()."""
    near, _ = socket.socketpair()
    return near, ""


def test_finish_completes_after_a_handshake_time_without_new_clients() -> None:
    clock, port, factory, done = finishing()
    port.finish().addCallback(done.append)
    clock.advance(0.1)
    port.socket.results.append(pair())  # a distant client whose handshake was in progress
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


def test_a_paused_port_finishes_after_resume() -> None:
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


def test_finish_waits_for_a_pause_that_begins_meanwhile() -> None:
    """The register pauses the port when a queued client reaches the connection limit."""
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


def test_finish_continues_after_a_shortage() -> None:
    clock, port, factory, done = finishing(OSError(errno.EMFILE, "x"), pair())
    port.finish().addCallback(done.append)
    clock.pump([0.1] * 4)
    assert (factory.made, done) == ([], [])
    clock.pump([0.1] * 10)
    assert (len(factory.made), done) == (1, [None])
    factory.made[0].transport.connectionLost(Failure(ConnectionDone()))
    assert clock.getDelayedCalls() == []


def test_finish_completes_when_the_port_is_stopped() -> None:
    clock, port, _, done = finishing()
    port.finish().addCallback(done.append)
    port.stopListening()
    assert done == [None]
    assert clock.getDelayedCalls() == []
    port.finish().addCallback(done.append)  # no call is pending
    assert done == [None, None]
