"""TLS in the transport, turn by turn: event orders that rarely occur on loopback with threads."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.net.port import Port
from rtservice.net.tls import ServerTLS
from tests.support.recording import nothing
from tests.support.registered import reads

pytest.importorskip("cryptography", reason="cryptography (twisted[tls]) is not installed")
pytest.importorskip("rtservice.net.reactor", reason="epoll is Linux only")

from tests.support.forge import APPLICATION_DATA  # after the checks
from tests.support.turns import STREAM, Peer, Turned


@implementer(IHalfCloseableProtocol)
class CallRecorder(Protocol):
    """Records every call, in order."""

    def connectionMade(self) -> None:
        self.calls: list[Any] = []
        self.factory.made = self
        self.factory.on_connect(self)

    def dataReceived(self, data: bytes) -> None:
        self.calls.append(data)
        self.factory.on_data(self)

    def readConnectionLost(self) -> None:
        self.calls.append("end of input")

    def writeConnectionLost(self) -> None:
        self.calls.append("end of output")

    def connectionLost(self, reason: Any) -> None:
        self.calls.append("end")

    @property
    def received(self) -> bytes:
        return b"".join(event for event in self.calls if isinstance(event, bytes))


class Service:
    """A port on a reactor that the test steps."""

    def __init__(self, certificates: Any, version: str) -> None:
        self.reactor = Turned()
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind("")  # an abstract name chosen by the kernel
        self.socket.listen()
        self.socket.setblocking(False)
        self.version = version
        self.factory = Factory.forProtocol(CallRecorder)
        self.factory.noisy = False
        self.factory.on_connect = self.factory.on_data = nothing
        context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
        context.maximum_version = ssl.TLSVersion[version]
        self.port = Port(self.reactor, self.socket, self.factory, name="ssl:test", tls=context)
        self.port.startListening()

    def connect(self, kind: type[Peer] = Peer) -> Peer:
        """Return a client whose handshake is complete; its last flight stays in its queue."""
        address = "\0" + self.socket.getsockname()[1:].decode()
        self.peer = kind(address, self.version, random.Random(0), self.reactor.turn, small_buffers=False)
        self.peer.pieces = (1 << 20,)
        return self.peer

    def begin(self) -> tuple[Peer, Any]:
        peer = self.connect()
        self.settle()
        return peer, self.factory.made

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.reactor.turn()

    def settle(self) -> None:
        for _ in range(50):
            self.peer.push(1 << 20)
            self.peer.pull()
            self.reactor.turn()

    def stop(self) -> None:
        self.port.stopListening()
        self.socket.close()
        self.peer.sock.close()
        self.turn(3)
        self.reactor.stop_turning()


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def service(certificates: Any, request: Any) -> Iterator[Service]:
    made = Service(certificates, request.param)
    yield made
    made.stop()


def full(_: bytes) -> int:
    raise BlockingIOError


def test_read_connection_lost_is_called_once_if_a_protocol_resumes_twice(service: Service) -> None:
    peer, protocol = service.begin()
    protocol.transport.pauseProducing()
    peer.data(b"hello")
    peer.notify()
    protocol.transport.resumeProducing()
    protocol.factory.on_data = lambda protocol: protocol.transport.pauseProducing()
    service.settle()
    assert protocol.calls == [b"hello"]
    for _ in range(3):
        protocol.transport.resumeProducing()
    service.settle()
    assert protocol.calls == [b"hello", "end of input"]


def test_a_key_update_after_close_notify_is_not_answered_and_data_continues(service: Service) -> None:
    peer, protocol = service.begin()
    protocol.transport.loseWriteConnection()
    service.settle()
    assert peer.notified
    for _ in range(3):
        if service.version == "TLSv1_3":
            peer.queue += peer.key_update(ask=True)
        peer.data(b"more")
        service.settle()
    peer.notify()
    service.settle()
    assert protocol.calls[0] == "end of output"
    assert protocol.received == 3 * b"more"
    assert protocol.calls[-1] == "end of input"
    assert not protocol.transport.disconnected


@pytest.mark.parametrize("close", ["loseConnection", "loseWriteConnection"])
def test_a_write_while_close_notify_is_pending_is_dropped_and_the_close_is_clean(service: Service, close: str) -> None:
    peer, protocol = service.begin()
    transport = protocol.transport
    transport.write(STREAM[:100])
    service.settle()
    send, transport._send = transport._send, full
    getattr(transport, close)()
    service.turn()
    transport.write(b"too late")
    assert not transport.unsent
    transport._send = send
    service.settle()
    transport.loseConnection()
    for _ in range(3):  # it waits until the client reads
        service.settle()
        service.reactor.now += 1
    assert peer.notified
    assert peer.ended
    assert not peer.reset
    assert transport.error is None
    assert protocol.calls.count("end") == 1


@pytest.mark.parametrize("whole", [True, False])
def test_data_with_the_client_finished_message_survives_an_immediate_end_of_output(
    service: Service, whole: bool
) -> None:
    service.factory.on_connect = lambda protocol: protocol.transport.loseWriteConnection()
    peer = service.connect()
    peer.data(b"early")
    record = peer.seal(APPLICATION_DATA, b"second")
    peer.queue += record if whole else record[:10]
    peer.push(1 << 20)
    service.turn(5)
    if not whole:
        peer.queue += record[10:]
    service.settle()
    assert service.factory.made.received == b"earlysecond"


def test_unsent_is_not_negative_after_abort(service: Service) -> None:
    peer, protocol = service.begin()
    transport = protocol.transport
    transport.write(bytes(1 << 20))
    service.turn(3)
    assert transport.unsent
    transport.abortConnection()
    peer.sock.recv(1 << 20)
    transport.close("enough")
    sent = transport.bytes_out
    transport.doWrite()
    assert (transport.unsent, transport.bytes_out) == (0, sent)


def test_a_broken_record_is_the_reason_of_the_close_and_gets_an_alert_despite_writes(
    service: Service,
) -> None:
    peer, protocol = service.begin()
    protocol.factory.on_data = lambda protocol: protocol.transport.write(b"answer")
    peer.data(b"good")
    broken = bytearray(peer.seal(APPLICATION_DATA, b"bad"))
    broken[-1] ^= 1
    peer.queue += broken
    with pytest.raises(ssl.SSLError, match="ALERT_BAD_RECORD_MAC"):
        service.settle()
    service.turn(5)
    assert protocol.calls == [b"good", "end"]
    assert "BAD_RECORD_MAC" in str(protocol.transport.error)


class Slow:
    """A pull producer that writes in later events."""

    def __init__(self) -> None:
        self.asked = 0

    def resumeProducing(self) -> None:
        self.asked += 1

    def stopProducing(self) -> None:
        pass


def test_a_pull_producer_is_resumed_only_after_it_has_written(service: Service) -> None:
    peer, protocol = service.begin()
    producer = Slow()
    protocol.transport.registerProducer(producer, False)
    for _ in range(3):
        peer.data(b"hello")
        service.settle()
    assert producer.asked == 1
    protocol.transport.write(STREAM[:10])
    service.settle()
    assert producer.asked == 2
    protocol.transport.unregisterProducer()


def test_a_protocol_that_pauses_while_its_connection_closes_loses_no_output(service: Service) -> None:
    peer, protocol = service.begin()
    protocol.transport.write(STREAM[:50_000])
    protocol.transport.loseConnection()
    service.turn()
    protocol.transport.pauseProducing()
    peer.data(b"still sending")
    peer.push()
    for _ in range(5):
        service.turn(3)
        service.reactor.now += 1.5
    assert protocol.transport.disconnected
    service.settle()
    assert peer.received == 50_000
    assert not peer.reset
    assert protocol.calls == ["end"]


def test_a_close_in_the_middle_of_input_reads_until_the_peer_has_finished(service: Service) -> None:
    """The kernel resets a connection that is closed with unread input, and the output would be lost."""
    peer, protocol = service.begin()

    def answer_and_close(protocol: Any) -> None:
        protocol.transport.write(STREAM[:50_000])
        protocol.transport.loseConnection()

    protocol.factory.on_data = answer_and_close
    for _ in range(1000):
        peer.data(b"x")
    peer.push()
    service.turn()
    assert protocol.transport._tls.rest, "data remains for a later turn"
    service.turn()
    assert protocol.transport.phase == "closing"
    assert reads(protocol.transport, service.reactor)
    service.settle()
    peer.sock.shutdown(socket.SHUT_WR)
    service.settle()
    assert peer.received == 50_000
    assert not peer.reset
    assert protocol.calls[-1] == "end"


@pytest.mark.parametrize("client", ["finishes", "resets"])
def test_a_protocol_that_closes_at_once_waits_for_no_timer_when_the_client_is_done(service: Service, client) -> None:
    def answer_and_close(protocol: Any) -> None:
        protocol.transport.write(b"bye")
        protocol.transport.loseConnection()

    service.factory.on_connect = answer_and_close
    peer = service.connect()
    peer.data(b"unread")
    peer.push()
    service.turn(5)
    protocol = service.factory.made
    assert protocol.transport.phase == "closing"
    assert reads(protocol.transport, service.reactor)
    if client == "finishes":
        peer.sock.shutdown(socket.SHUT_WR)
    else:
        peer.sock.close()
    service.turn(5)  # the fake time stands still
    assert protocol.calls[-1] == "end"


class Failing:
    """A push producer that raises when it is resumed."""

    def pauseProducing(self) -> None:
        pass

    def resumeProducing(self) -> None:
        raise ZeroDivisionError

    def stopProducing(self) -> None:
        pass


def test_an_exception_in_a_producer_in_a_later_turn_ends_the_connection(service: Service) -> None:
    peer, protocol = service.begin()
    protocol.transport.pauseProducing()
    service.turn()
    for _ in range(300):
        peer.data(b"x")
    peer.push(1 << 20)

    def write_much(protocol: Any) -> None:
        if protocol.received == 300 * b"x":
            protocol.transport.registerProducer(Failing(), True)
            protocol.transport._pause_producer()

    protocol.factory.on_data = write_much
    protocol.transport.resumeProducing()
    service.settle()
    assert protocol.calls[-1] == "end"
    assert not reads(protocol.transport, service.reactor)


def test_close_and_abort_after_the_end_do_nothing(service: Service) -> None:
    _, protocol = service.begin()
    service.port.write_soon = None  # as with other reactors
    protocol.transport.abortConnection()
    service.turn(3)
    protocol.transport.close("enough")
    protocol.transport.abort("enough")
    assert protocol.transport.error is None


def test_input_is_not_delivered_after_a_close_during_the_handshake(service: Service) -> None:
    opened: list[Any] = []
    service.port.connection_opened = opened.append
    service.factory.on_connect = lambda protocol: protocol.transport.write(STREAM)  # more than the kernel accepts

    class Closed(Peer):
        def _shake(self, context: ssl.SSLContext) -> None:
            service.turn()
            opened[0].loseConnection()
            super()._shake(context)

    peer = service.connect(Closed)
    peer.data(b"too late")
    peer.push()
    service.turn(5)
    for _ in range(5):
        service.settle()
        service.reactor.now += 1
    assert service.factory.made.calls == ["end"]
    assert peer.received == len(STREAM)
    assert peer.notified
