"""Connections that have ended are freed by reference counting, however they end.

A reference cycle costs garbage collections, which stop all clients of a process with many objects.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from types import TracebackType
from typing import Any

import pytest
import pytest_twisted
from OpenSSL import SSL
from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.logger import Logger
from twisted.python.failure import Failure

from rtservice.net import connection
from rtservice.net.phases import OPEN, PROXY
from rtservice.net.port import Port
from rtservice.process.admission import Limits
from rtservice.process.registry import Registry
from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.reset import reset
from tests.support.unreachable import without_collections

# Connections of each case. What one of them leaves behind is there as often.
COUNT = 20

KINDS = ("plain", "TLS", "PROXY", "PROXY and TLS", "pyOpenSSL")

HEADER = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"


class Ending(Protocol):
    """Ends its connection, or fails, as the factory's `mode` says."""

    factory: Endings
    transport: Any

    def connectionMade(self) -> None:
        match self.factory.mode:
            case "connectionMade raises":
                raise ValueError
            case "closes at once":
                self.transport.write(b"hello")
                self.transport.loseConnection()
            case "registers a producer":
                self.transport.registerProducer(self, True)
                self.transport.write(b"hello")
            case _:
                self.transport.write(b"hello")

    def dataReceived(self, data: bytes) -> None:
        match self.factory.mode:
            case "dataReceived raises":
                raise ValueError
            case "closes":
                self.transport.write(b"bye")
                self.transport.loseConnection()
            case "aborts":
                self.transport.abortConnection()
            case "floods":
                self.transport.write(bytes(4_000_000))
            case _:
                self.transport.write(data)

    def connectionLost(self, reason: Any = None) -> None:
        if self.factory.mode == "connectionLost raises":
            raise ValueError

    def pauseProducing(self) -> None:
        pass

    resumeProducing = stopProducing = pauseProducing


class Endings(Factory[Ending]):
    protocol = Ending
    noisy = False

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def buildProtocol(self, address: Any) -> Any:
        if self.mode == "buildProtocol raises":
            raise ValueError
        return None if self.mode == "no protocol" else super().buildProtocol(address)


class Client:
    """Connects, as one of KINDS, and ends in one of several ways."""

    def __init__(self, address: Any, kind: str, context: ssl.SSLContext) -> None:
        self.address, self.kind, self.context = address, kind, context

    def connected(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=DEADLINE)

    def open(self) -> socket.socket:
        sock = self.connected()
        if "PROXY" in self.kind:
            sock.sendall(HEADER)
        return sock if self.kind in ("plain", "PROXY") else self.context.wrap_socket(sock, server_hostname="localhost")

    @staticmethod
    def read_to_end(sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:  # a reset ends it, too
            while sock.recv(65536):
                pass

    def exchange(self, sock: socket.socket) -> None:
        assert sock.recv(5) == b"hello"
        sock.sendall(b"x")
        assert sock.recv(1)

    # What a client does:

    def finishes(self) -> None:
        with self.open() as sock:
            self.exchange(sock)

    def resets(self) -> None:
        sock = self.open()
        self.exchange(sock)
        reset(sock)

    def sends_and_resets(self) -> None:
        sock = self.open()
        sock.sendall(b"x")
        reset(sock)

    def sends_and_waits(self) -> None:
        sock = self.open()
        sock.sendall(b"x")
        self.read_to_end(sock)

    def waits(self) -> None:
        with contextlib.suppress(OSError):  # within the handshake
            self.read_to_end(self.open())

    def finishes_at_once(self) -> None:
        self.connected().close()

    def resets_at_once(self) -> None:
        reset(self.connected())

    def is_silent(self) -> None:
        self.read_to_end(self.connected())

    def sends_garbage(self) -> None:
        with contextlib.suppress(OSError):
            sock = self.connected()
            sock.sendall(b"\xff\xff no header\r\n\r\n")
            sock.shutdown(socket.SHUT_WR)
            self.read_to_end(sock)


@dataclass(frozen=True)
class Case:
    """A way to end: what the protocol and the client do, limits, and what the service does with open connections."""

    mode: str
    client: Callable[[Client], None]
    handshake_timeout: float = DEADLINE
    idle_timeout: float = 0
    full: bool = False  # another connection of the same peer is open already
    end: Callable[[Registry], None] | None = None


CASES = {
    "the client finishes": Case("echoes", Client.finishes),
    "the client resets after an exchange": Case("echoes", Client.resets),
    "the client resets with data under way": Case("echoes", Client.sends_and_resets),
    "the client resets while much is unsent": Case("floods", Client.resets),
    "the client finishes at once": Case("echoes", Client.finishes_at_once),
    "the client resets at once": Case("echoes", Client.resets_at_once),
    "the client sends garbage": Case("echoes", Client.sends_garbage),
    "the server closes": Case("closes", Client.sends_and_waits),
    "the server closes at once": Case("closes at once", Client.waits),
    "the server aborts": Case("aborts", Client.sends_and_waits),
    "buildProtocol raises": Case("buildProtocol raises", Client.waits),
    "the factory returns no protocol": Case("no protocol", Client.waits),
    "connectionMade raises": Case("connectionMade raises", Client.waits),
    "dataReceived raises": Case("dataReceived raises", Client.sends_and_waits),
    "connectionLost raises": Case("connectionLost raises", Client.finishes),
    "a producer is registered": Case("registers a producer", Client.finishes),
    "the handshake times out": Case("echoes", Client.is_silent, handshake_timeout=0.05, idle_timeout=0.1),
    "the connection is idle": Case("echoes", Client.waits, idle_timeout=0.05),
    "the client is refused": Case("echoes", Client.waits, full=True),
    "the service drains": Case("echoes", Client.waits, end=lambda registry: registry.close_all("drained")),
    "the drain ends": Case("echoes", Client.waits, end=lambda registry: registry.abort_all("cut off")),
}


def is_of_a_connection(thing: object) -> bool:
    """Return whether an object belongs to a connection, or to an exception that ended one."""
    kinds = (Ending, socket.socket, ssl.SSLObject, ssl.MemoryBIO, SSL.Connection, Failure, TracebackType, OSError)
    return isinstance(thing, kinds) or type(thing).__module__.startswith("rtservice.")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
@pytest_twisted.ensureDeferred
async def test_a_connection_that_has_ended_is_no_garbage(kind, case, certificates, trusting, monkeypatch) -> None:
    ending = CASES[case]
    # Until a program begins to log, Twisted keeps all records, and with them the exceptions of protocols.
    monkeypatch.setattr(connection, "_log", Logger(observer=lambda event: None))
    tls: Any = None
    if kind == "pyOpenSSL":
        from twisted.internet.ssl import DefaultOpenSSLContextFactory

        tls = DefaultOpenSSLContextFactory(certificates["server.key"], certificates["server.pem"])
    elif "TLS" in kind:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificates["server.pem"], certificates["server.key"])
    ended: list[str] = []
    limits = Limits(
        max_connections=1000,
        max_connections_per_peer=1 if ending.full else 0,
        idle_timeout=ending.idle_timeout,
        proxy_from=(ip_network("127.0.0.0/8"),),
    )
    registry = Registry(
        Logger(observer=lambda event: None), limits, record=lambda *fields: ended.append(str(fields[-1]))
    )
    registry.start(reactor)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(registry.stop)
        listening = cleanup.enter_context(socket.create_server(("127.0.0.1", 0), backlog=100))
        listening.setblocking(False)
        port = Port(
            reactor,
            listening,
            Endings(ending.mode),
            name="test",
            proxied="PROXY" in kind,
            tls=tls,
            handshake_timeout=ending.handshake_timeout,
            opened=registry.opened,
            identified=registry.identified,
            closed=registry.closed,
        )
        registry.ports.append(port)
        port.startListening()
        cleanup.callback(port.stopListening)
        client = Client(listening.getsockname(), kind, trusting)
        held = client.connected() if ending.full else None
        if held is not None:
            if "PROXY" in kind:
                held.sendall(HEADER)
            await eventually(lambda: any(each.phase != PROXY for each in registry.open))
        with without_collections() as unreachable:
            for _ in range(COUNT):
                waiting = deferToThread(ending.client, client)
                if ending.end is not None:
                    await eventually(lambda: any(each.phase == OPEN and each.bytes_out for each in registry.open))
                    ending.end(registry)
                await waiting
                await eventually(lambda: len(registry.open) == (held is not None))
            del waiting
        # Twisted's threads and the test itself leave cycles of functions, and the test before may leave its port.
        kinds = [type(each).__qualname__ for each in unreachable if is_of_a_connection(each)]
        assert {kind for kind in kinds if kinds.count(kind) >= COUNT / 2} == set()
        refused = sum(count for key, count in registry.counters().items() if key.name == "refused")
        assert (refused if ending.full else len(ended)) == COUNT
        if held is not None:
            held.close()
            await eventually(lambda: not registry.open)
