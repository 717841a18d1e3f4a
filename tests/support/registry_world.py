"""A Registry with ports, clients from any address, and a fake clock."""

import select
import socket
import ssl
from collections import Counter
from dataclasses import replace
from typing import Any, cast

from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger, formatEvent
from twisted.python.failure import Failure

from rtservice.net.port import Port
from rtservice.process.admission import Limits
from rtservice.process.registry import Registry
from rtservice.protocols.echo import EchoFactory
from tests.support.fake_reactor import FakeReactor


class Queue:
    """A fake listening socket whose clients have any address."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        self.waiting: list[tuple[socket.socket, Any]] = []
        self._descriptor = socket.socket()
        self.fileno = self._descriptor.fileno
        self.close = self._descriptor.close

    def accept(self) -> tuple[socket.socket, Any]:
        if not self.waiting:
            raise BlockingIOError
        return self.waiting.pop(0)


class SelectingReactor(FakeReactor):
    """The part of a reactor that connections need; `turn` handles all pending events."""

    def turn(self) -> None:
        busy = True
        while busy:
            busy = False
            for port in [reader for reader in self.readers if isinstance(reader, Port)]:
                if port in self.readers and port.socket.waiting:  # not paused by a previous port
                    busy = True
                    port.doRead()
            selectables = [reader for reader in self.readers if not isinstance(reader, Port)]
            readable, writable, _ = select.select(selectables, list(self.writers), [], 0)
            for selectable in readable:
                busy = True
                why = selectable.doRead()
                if isinstance(why, ConnectionDone):
                    self.readers.discard(selectable)
                    selectable.readConnectionLost(Failure(why))
                elif why:
                    selectable.connectionLost(Failure(why))
            for selectable in writable:
                busy = True
                selectable.doWrite()
        self.advance(0)  # run delayed calls that are due


IPV4 = "192.0.2.1"


class World:
    """A Registry, its ports and its clients, with a clock that only `advance` moves."""

    def __init__(self, factory: Factory | None = None, **limits: Any) -> None:
        self.events: list[dict[str, Any]] = []
        self.clock = SelectingReactor()
        self.factory = factory or EchoFactory()
        self.limits = Limits(**{"max_connections": 100, **limits})
        self.connections = Registry(Logger(observer=self.events.append), self.limits)
        self.connections.start(self.clock)
        self.clients: list[socket.socket] = []
        self.port = self.add_port()

    def add_port(self, *, proxied: bool = False, tls: ssl.SSLContext | None = None) -> Port:
        port = Port(
            self.clock,
            cast(Any, Queue()),
            self.factory,
            name="test",
            proxied=proxied,
            tls=tls,
            opened=self.connections.opened,
            identified=self.connections.identified,
            closed=self.connections.closed,
        )
        self.connections.ports.append(port)
        port.startListening()
        return port

    def client(self, host: str | None = IPV4, port: Port | None = None, first: bytes = b"") -> socket.socket:
        """Connect a client from this address (None: a UNIX socket) that has sent `first`, and handle the events."""
        near, far = socket.socketpair()
        far.settimeout(0)
        far.sendall(first)
        address: Any = "" if host is None else (host, 1, 0, 0) if ":" in host else (host, 1)
        (port or self.port).socket.waiting.append((near, address))  # type: ignore[attr-defined]  # a Queue
        self.clients += [near, far]
        self.clock.turn()
        return far

    def apply(self, **limits: Any) -> None:
        self.limits = replace(self.limits, **limits)
        self.connections.apply(self.limits)
        self.clock.turn()

    def leave(self, client: socket.socket) -> None:
        client.close()
        self.clock.turn()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.clock.turn()

    @property
    def lines(self) -> list[str]:
        return [str(formatEvent(event)) for event in self.events]

    @property
    def reasons(self) -> list[str]:
        """The reasons of closed connections, from their records."""
        return [event["reason"] for event in self.events if "reason" in event]

    @property
    def refused(self) -> dict[str, int]:
        """The number of refused clients, by reason."""
        return refused(self.connections)

    def close(self) -> None:
        self.connections.stop()
        for sock in (*self.clients, *(port.socket for port in self.connections.ports)):
            sock.close()


def refused(registry: Registry) -> dict[str, int]:
    """Return the number of clients refused on all listeners, by reason."""
    found: Counter[str] = Counter()
    for key, count in registry.counters().items():
        if key.name == "refused":
            found[key.label] += count
    return found


def is_served(client: socket.socket) -> bool:
    """Return whether the client was greeted; False while it waits."""
    try:
        return client.recv(100).startswith(b"Hello from the server!")
    except BlockingIOError:
        return False


def is_closed(client: socket.socket) -> bool:
    """Return whether the connection was closed without data."""
    try:
        return client.recv(100) == b""
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


def header(source: str) -> bytes:
    return f"PROXY TCP4 {source} 192.0.2.100 1 2\r\n".encode()


def still_open(world: World, until: float, step: float = 0.25) -> None:
    """Advance the clock to `until`, and check that no connection is closed before."""
    while world.clock.seconds() + step < until:
        world.advance(step)
        assert world.reasons == []
    world.advance(until - world.clock.seconds())


class Flood(Protocol):
    """Sends more than a kernel buffers for a peer."""

    def connectionMade(self) -> None:
        self.transport.write(bytes(10 << 20))
