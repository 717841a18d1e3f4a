"""Random exchanges over TLS against a model: every byte arrives once and in order, and every connection ends once.

Both sides run in this thread, on a reactor with a fake clock, so a seed reproduces the same actions.
"""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from typing import Any

import pytest
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.net.connection import Connection, Stage
from rtservice.net.port import Port
from rtservice.net.tls import ServerTLS

pytest.importorskip("cryptography", reason="cryptography (twisted[tls]) is not installed")
pytest.importorskip("rtservice.net.reactor", reason="epoll is Linux only")

from tests.support.forge import ALERT, APPLICATION_DATA  # after the checks
from tests.support.turns import CLOSE_NOTIFY, STREAM, Peer, Turned

SEEDS, BLOCKS = 150, 5

# Turns without progress after which the clock advances by a second, and the maximum number of advances: a closing
# connection waits 30 seconds for its peer, and unread answers to key updates end a connection after 60 to 120.
STILL_TURNS, STILL_SECONDS = 10, 200


class Producer:
    """Writes up to `left` bytes in pieces: at random while it is not paused, or one per resumeProducing."""

    def __init__(self, protocol: Any, rng: random.Random, *, streaming: bool) -> None:
        self.protocol, self.rng, self.streaming = protocol, rng, streaming
        self.left = rng.choice((0, 1000, 100_000, 500_000))
        self.paused = self.stopped = False

    def resumeProducing(self) -> None:
        self.paused = False
        if not self.streaming:
            self.produce()

    def pauseProducing(self) -> None:
        assert self.streaming
        assert not self.paused
        self.paused = True

    def stopProducing(self) -> None:
        self.stopped = True
        self.protocol.producer = None

    def produce(self) -> None:
        if self.paused or self.stopped:
            return
        size = min(self.left, self.rng.choice((1, 3000, 16384, 40_000)))
        self.left -= size
        self.protocol.write(size)
        if not self.left or self.protocol.written == len(STREAM):
            self.protocol.producer = None
            self.protocol.transport.unregisterProducer()


class Model(Protocol):
    """The server's protocol: performs random actions in every event, and checks the calls it receives."""

    producer: Any = None
    made = lost = finished = write_finished = 0
    paused = closing = write_closing = dropped = False
    written = received = 0
    error: Any = None

    def connectionMade(self) -> None:
        self.factory.protocols.append(self)
        self.rng: random.Random = self.factory.rng
        self.lively = self.factory.lively
        self.made += 1
        self.act()

    def dataReceived(self, data: bytes) -> None:
        assert data
        assert not self.lost
        assert not self.finished
        assert not self.paused, "data while paused"
        assert not self.closing, "data after loseConnection"
        assert STREAM.startswith(data, self.received), "not what was sent"
        self.received += len(data)
        if self.factory.echoes:
            self.write(len(data))
        self.act()

    def connectionLost(self, reason: Any) -> None:
        self.lost += 1
        self.error = self.transport.error
        self.act()

    def act(self) -> None:
        if self.lively and self.rng.random() < 0.7:
            getattr(self, self.rng.choices(*self.factory.actions)[0])()

    def write(self, size: int) -> None:
        size = min(size, len(STREAM) - self.written)
        data = STREAM[self.written : self.written + size]
        if self.transport._writable:
            self.written += size
        if self.rng.random() < 0.1:
            middle = self.rng.randint(0, size)
            self.transport.writeSequence([data[:middle], b"", data[middle:]])
        else:
            self.transport.write(data)

    def nothing(self) -> None:
        pass

    def write_some(self) -> None:
        for _ in range(self.rng.choice((1, 1, 1, 2, 20))):
            self.write(self.rng.choice((0, 1, 100, 5000, 16384, 16385)))

    def write_much(self) -> None:
        self.write(self.rng.randint(0, 300_000))

    def pause(self) -> None:
        if self.transport.producer is self.transport:
            return  # the transport resumes it
        self.paused = True
        self.transport.pauseProducing()

    def resume(self) -> None:
        self.paused = False
        for _ in range(self.rng.choice((1, 1, 2))):
            self.transport.resumeProducing()

    def pause_and_resume(self) -> None:
        self.pause()
        self.resume()

    def push(self) -> None:
        self.produce(streaming=True)

    def pull(self) -> None:
        self.produce(streaming=False)

    def produce(self, *, streaming: bool) -> None:
        if self.producer is None and self.transport.producer is None and not self.closing and not self.write_closing:
            self.producer = Producer(self, self.rng, streaming=streaming)
            self.transport.registerProducer(self.producer, streaming)

    def own(self) -> None:
        if self.producer is None and self.transport.producer is None and not self.paused:
            self.transport.registerProducer(self.transport, True)

    def close(self) -> None:
        self.closing = True
        self.transport.loseConnection()

    def close_writing(self) -> None:
        self.write_closing = True
        self.transport.loseWriteConnection()

    def end(self) -> None:
        self.closing = True
        self.transport.close("enough")

    def abort(self) -> None:
        self.closing = self.dropped = True
        self.rng.choice((self.transport.abortConnection, lambda: self.transport.abort("enough")))()


@implementer(IHalfCloseableProtocol)
class HalfClosingModel(Model):
    def readConnectionLost(self) -> None:
        assert not self.lost
        self.finished += 1
        assert self.finished == 1
        self.act()

    def writeConnectionLost(self) -> None:
        assert not self.lost
        self.write_finished += 1
        assert self.write_finished == 1
        self.act()


class RandomPeer(Peer):
    """The random actions of a client."""

    updated_at = -1  # bytes sent before the last key updates

    def records(self) -> None:
        for _ in range(self.rng.choice((1, 1, 2, 10, 300))):
            if self.sent == len(STREAM):
                break
            size = self.rng.choice((0, 1, 20, 1000, 4000, 16384))
            if not size and self.rng.random() < 0.7:
                size = 1  # OpenSSL rejects more than 32 consecutive empty records
            size = 1 if size > 4000 and self.rng.random() < 0.5 else min(size, len(STREAM) - self.sent)
            data = STREAM[self.sent : self.sent + size]
            self.queue += self.seal(APPLICATION_DATA, data, self.rng.choice((0, 0, 0, min(300, 16384 - size))))
            self.sent += size

    def update(self) -> None:
        if (
            self.seal == self._seal_1_3 and self.sent > self.updated_at
        ):  # otherwise the limit on records without data is exceeded
            self.updated_at = self.sent
            for _ in range(self.rng.choice((1, 2, 50, 700))):
                self.queue += self.key_update(ask=self.rng.random() < 0.9)

    def notify(self) -> None:
        self.queue += self.seal(ALERT, CLOSE_NOTIFY)
        self.finished = True

    def break_off(self) -> None:
        self.broken = self.finished = True
        self.rng.choice((self.fin, self.reset_it, self.garble))()

    def fin(self) -> None:
        self.queue.clear()
        with contextlib.suppress(OSError):  # the server has reset the connection
            self.sock.shutdown(socket.SHUT_WR)

    def reset_it(self) -> None:
        self.queue.clear()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()
        self.ended = True

    def garble(self) -> None:
        record = bytearray(self.seal(APPLICATION_DATA, b"never seen"))
        record[-1] ^= 1
        self.queue += record


SERVER_ACTIONS = {
    "nothing": 20,
    "write_some": 20,
    "write_much": 2,
    "pause": 4,
    "resume": 6,
    "pause_and_resume": 3,
    "push": 2,
    "pull": 2,
    "own": 2,
}
SERVER_ENDS = ("close", "close_writing", "end", "abort")


class Exchange:
    """One connection from its handshake to its end, determined by a seed."""

    def __init__(self, reactor: Any, contexts: dict[str, Any], seed: Any) -> None:
        self.reactor = reactor
        self.rng = rng = random.Random(seed)
        version = rng.choice(("TLSv1_2", "TLSv1_3", "TLSv1_3"))
        unix = rng.random() < 0.7
        if unix:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind("")  # an abstract name chosen by the kernel
            self.socket.listen()
        else:
            self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.setblocking(False)
        self.small = unix and rng.random() < 0.7
        self.factory = Factory.forProtocol(rng.choice((Model, HalfClosingModel)))
        self.factory.noisy = False
        actions = dict(SERVER_ACTIONS)
        for end in rng.sample(SERVER_ENDS, rng.choice((0, 0, 1, 2))):
            actions[end] = 1
        self.factory.actions = list(actions), list(actions.values())
        self.factory.rng, self.factory.protocols = rng, []
        self.factory.lively = True
        self.factory.echoes = rng.random() < 0.3
        self.opened: list[Any] = []
        self.closed: list[Any] = []
        self.port = Port(
            reactor,
            self.socket,
            self.factory,
            name="ssl:test",
            tls=contexts[version],
            opened=self._opened,
            closed=lambda connection, _: self.closed.append(connection),
        )
        if rng.random() < 0.3:
            self.port.write_soon = None
        self.port.startListening()
        name = self.socket.getsockname()
        address = "\0" + name[1:].decode() if unix else name
        self.peer = RandomPeer(address, version, rng, reactor.turn, small_buffers=self.small)

    def _opened(self, connection: Any) -> None:
        self.opened.append(connection)
        if self.small:
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connection.socket.setsockopt(socket.SOL_SOCKET, buffer, 4096)

    def run(self) -> None:
        peer, rng = self.peer, self.rng
        ends = rng.choice(((), (), ("notify",), ("break_off",)))
        for _ in range(rng.choice((0, 5, 40))):
            if not peer.finished:
                action = rng.choices(("records", "update", *ends), (10, 1, *[1] * len(ends)))[0]
                getattr(peer, action)()
            if rng.random() < 0.8:
                peer.push()
            if rng.random() < 0.5:
                peer.pull(rng.choice((1, 1000, 1 << 20)))
            self.turn()
        self.wind_down()
        self.judge()

    def turn(self) -> None:
        self.reactor.turn()
        for protocol in self.factory.protocols:
            if not protocol.lost:
                if protocol.producer is not None and protocol.producer.streaming:
                    protocol.producer.produce()
                protocol.act()
            self.check(protocol)

    def check(self, protocol: Any) -> None:
        transport = protocol.transport
        assert transport.unsent >= 0
        if not protocol.lost and not protocol.dropped:
            assert transport.bytes_out + transport.unsent == protocol.written
            assert transport.bytes_in == protocol.received or transport.phase == "closing"
        assert protocol.lost <= 1

    def wind_down(self) -> None:
        """Resume everything, let one side close, and check that the connection ends."""
        peer = self.peer
        closes = self.rng.choice((self.server_closes, self.server_closes, self.client_closes))
        self.factory.lively = False
        for protocol in self.factory.protocols:
            protocol.lively = False
        self.settle()
        for protocol in self.factory.protocols:
            if not protocol.lost:
                protocol.resume()
        self.settle()
        assert len(self.factory.protocols) == 1 or peer.broken
        if not self.closed:
            closes()
            self.settle()
        for _ in range(STILL_SECONDS):
            if self.closed:
                break
            self.reactor.now += 1
            self.settle()
        self.settle()

    def client_closes(self) -> None:
        if not self.peer.finished:
            self.peer.notify()
            self.settle()
        self.server_closes()  # a protocol with half-close does not close by itself

    def server_closes(self) -> None:
        for protocol in self.factory.protocols:
            if not protocol.lost:
                protocol.transport.loseConnection()

    def settle(self) -> None:
        """Run until there is no progress; then check that there is no busy loop."""
        still, before, events = 0, None, 0
        peer = self.peer
        while still < STILL_TURNS:
            peer.push(1 << 20)
            peer.pull()
            self.turn()
            states = [
                (p.received, p.written, p.transport.bytes_in, p.transport.bytes_out, p.lost)
                for p in self.factory.protocols
            ]
            now = len(peer.queue), peer.received, peer.ended, states, len(self.closed)
            still = still + 1 if now == before else 0
            if not still:
                events = self.reactor.events
            before = now
        assert self.reactor.events - events < STILL_TURNS // 2, "the reactor is in a busy loop"

    def judge(self) -> None:
        peer = self.peer
        assert self.closed == self.opened, "a connection did not end"
        assert not any(isinstance(reader, Connection | Stage) for reader in self.reactor.getReaders())
        assert not self.reactor.getWriters()
        assert [call for call in self.reactor.getDelayedCalls() if call.active()] == []
        for protocol in self.factory.protocols:
            assert protocol.lost == 1
            transport = protocol.transport
            assert transport.producer is None
            if peer.broken or protocol.dropped:
                continue
            assert peer.ended
            assert not peer.reset
            assert peer.notified
            assert peer.received == protocol.written, "output is lost"
            if not protocol.closing:
                assert protocol.error is None
            if not protocol.closing and peer.finished and protocol.finished:
                assert protocol.received == peer.sent, "input is lost"

    def stop(self) -> None:
        self.port.stopListening()
        self.socket.close()
        self.peer.sock.close()
        for connection in self.opened:
            if not connection.disconnected:
                connection.abortConnection()
        for _ in range(3):
            self.reactor.turn()


@pytest.fixture(scope="module")
def turned() -> Any:
    made = Turned()
    yield made
    made.stop_turning()


@pytest.fixture
def tls(certificates: Any) -> Any:
    def make(version: str) -> Any:
        context = ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context
        context.maximum_version = ssl.TLSVersion[version]
        return context

    return {version: make(version) for version in ("TLSv1_2", "TLSv1_3")}


def run(reactor: Any, tls: Any, seed: int) -> None:
    exchange = Exchange(reactor, tls, seed)
    try:
        exchange.run()
    finally:
        exchange.stop()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_exchanges_lose_no_data_and_end_once(turned: Any, tls: Any, block: int) -> None:
    for seed in range(block, SEEDS, BLOCKS):
        try:
            run(turned, tls, seed)
        except BaseException as problem:
            problem.add_note(f"seed {seed}")
            raise
