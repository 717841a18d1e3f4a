"""A TLS client and a reactor in one thread, both controlled step by step by the test."""

from __future__ import annotations

import random
import socket
import ssl
from typing import Any

from rtservice.net.reactor import Reactor
from tests.support.forge import ALERT, APPLICATION_DATA, Forger

CLOSE_NOTIFY = b"\x01\x00"
STREAM = random.Random(0).randbytes(1 << 20)  # each side sends this from its start


class Turned(Reactor):
    """A reactor with a fake time, of which the test runs each turn. It counts the events that it handles."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        super().__init__()
        self.installed_poller, self._poller = self._poller, self

    def seconds(self) -> float:
        return self.now

    def poll(self, timeout: float, size: int) -> list[tuple[int, int]]:
        events = self.installed_poller.poll(timeout, size)
        self.events += len(events)
        return events

    def __getattr__(self, name: str) -> Any:
        if name in ("register", "unregister", "modify"):
            return getattr(self.installed_poller, name)
        raise AttributeError(name)

    def turn(self) -> None:
        self.runUntilCurrent()
        self.doIteration(0)

    def stop_turning(self) -> None:
        self.removeAll()
        self.waker.connectionLost(None)
        self.installed_poller.close()


class Peer(Forger):
    """The client: sends the data that the test queues, in pieces of random size."""

    def __init__(self, address: Any, version: str, rng: random.Random, turn: Any, *, small_buffers: bool) -> None:
        self.rng, self.turn = rng, turn
        self.queue = bytearray()
        self.sent = self.received = 0  # positions in the streams
        self.notified = self.ended = self.reset = False  # actions of the server
        self.finished = self.broken = False  # actions of the client
        self.pieces = rng.choice(((1,), (1, 5, 100), (100, 5000), (1 << 20,), (1, 1000, 1 << 20)))
        super().__init__(address, version, small_buffers=small_buffers)

    def _shake(self, context: ssl.SSLContext) -> None:
        self.sock.setblocking(False)
        if self.sock.family == socket.AF_INET:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # otherwise Nagle's algorithm adds delays
        self.incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, outgoing, server_hostname="localhost")
        sent = received = b""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                data = outgoing.read()
                sent += data
                self.queue += data
                while not (data := self.take(1 << 16)):
                    assert not self.ended
                    self.push()
                    self.turn()
                received += data
                self.incoming.write(data)
        self.queue += outgoing.read()
        self._randoms = received[11:43] + sent[11:43]

    def take(self, size: int) -> bytes:
        try:
            data = self.sock.recv(size)
        except BlockingIOError:
            return b""
        except ConnectionResetError:
            self.reset = self.ended = True
            return b""
        self.ended = self.ended or not data
        return data

    def push(self, size: int = 0) -> None:
        """Send queued data until the kernel accepts no more or a random stop; `size` limits each piece."""
        try:
            while self.queue:
                sent = self.sock.send(self.queue[: size or self.rng.choice(self.pieces)])
                del self.queue[:sent]
                if self.rng.random() < 0.5:
                    break
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.queue.clear()

    def pull(self, size: int = 1 << 20) -> None:
        """Read up to `size` bytes, and check the data."""
        if self.ended:
            return
        self.incoming.write(self.take(size))
        while True:
            try:
                data = self.tls.read(1 << 14)
            except ssl.SSLWantReadError:
                return
            except ssl.SSLError:
                if not self.broken:  # the record is not one of the server
                    raise
                return
            if not data:
                self.notified = True
                return
            assert STREAM.startswith(data, self.received), "the data is not what the server wrote"
            self.received += len(data)

    def data(self, data: bytes, padding: int = 0) -> None:
        self.queue += self.seal(APPLICATION_DATA, data, padding)

    def notify(self) -> None:
        self.queue += self.seal(ALERT, CLOSE_NOTIFY)
        self.finished = True
