"""The PROXY header before a connection: addresses, data after the header, deadlines, and rejected peers."""

import contextlib
import errno
import os
import socket
import ssl
import struct
import tracemalloc
from ipaddress import ip_network
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.threads import deferToThread
from twisted.logger import Logger, LogLevel

from rtservice.net.connection import Connection
from rtservice.net.handshakes import ProxyHandshake
from rtservice.net.listen_types import open_description
from rtservice.net.port import Port
from rtservice.net.tls import ServerTLS
from rtservice.process.admission import Limits
from rtservice.process.endings import end_reason
from rtservice.process.registry import Registry
from tests.support.clients import is_closed
from tests.support.deadline import DEADLINE
from tests.support.proxy_headers import tlv, v2
from tests.support.recording import Recording
from tests.support.registry_world import refused
from tests.support.reset import reset
from tests.support.timed_reactor import Timed

CLIENT, SERVER = IPv4Address("TCP", "192.0.2.1", 56324), IPv4Address("TCP", "198.51.100.2", 443)
GREETING = b"Hello!"

# --- headers ---


INET = socket.inet_aton("192.0.2.1") + socket.inet_aton("198.51.100.2") + struct.pack("!HH", 56324, 443)
AUTHORITY = tlv(2, b"www.example.com")
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 443\r\n"
V2 = v2(0x21, 0x11, INET + AUTHORITY)
# The longest possible header.
LONGEST = v2(0x21, 0x11, INET + AUTHORITY + tlv(4, bytes(65535 - 12 - len(AUTHORITY) - 3)))

# Headers without addresses: those of the connection apply.
ANONYMOUS = {
    "v1 UNKNOWN": b"PROXY UNKNOWN\r\n",
    "v1 UNKNOWN with addresses": b"PROXY UNKNOWN 2001:db8::1 2001:db8::2 1 2\r\n",
    "LOCAL": v2(0x20, 0x00),
    "LOCAL with addresses": v2(0x20, 0x11, INET),
    "UNSPEC": v2(0x21, 0x00, AUTHORITY),
}


LOOPBACK = (ip_network("127.0.0.0/8"),)

# --- the server's side ---


class Witness(Recording):
    """Greets and echoes; records the addresses passed to buildProtocol and the state seen in connectionMade."""

    def __init__(self) -> None:
        super().__init__(on_connect=self.greet)
        self.built: list[Any] = []
        self.seen: list[tuple[Any, Any, Any]] = []

    def buildProtocol(self, addr: Any) -> Any:
        self.built.append(addr)
        return super().buildProtocol(addr)

    def greet(self, protocol: Any) -> None:
        transport = protocol.transport
        self.seen.append((transport.getPeer(), transport.getHost(), transport.proxied))
        transport.write(GREETING)


class Served:
    """A listening port that expects headers."""

    def __init__(self, description: str, on: Any, tls: ssl.SSLContext | None, limits: Limits) -> None:
        self.factory = Witness()
        (self.listener,) = open_description(description, backlog=100)
        self.address = self.listener.socket.getsockname()
        self.on = on
        self.opened: list[Any] = []
        self.ended: list[tuple[Any, str]] = []  # connections, each with the reason in its record
        self.events: list[Any] = []  # log lines of the register
        self.register = Registry(Logger(observer=self.events.append), limits)
        self._waiting: list[Deferred[None]] = []
        self.port = Port(
            on,
            self.listener.socket,
            self.factory,
            name=self.listener.name,
            proxied=self.listener.proxied,
            tls=tls,
            opened=self._opened,
            identified=self.register.identified,
            closed=self._closed,
        )
        self.port.startListening()

    def _opened(self, connection: Any) -> None:
        self.opened.append(connection)
        self.register.opened(connection)

    def _closed(self, connection: Any, reason: Any) -> None:
        why = end_reason(reason, peer_finished=connection.peer_finished, problem=connection.error)
        self.ended.append((reason.value, why))
        self.register.closed(connection, reason)
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(None)

    @pytest_twisted.inlineCallbacks
    def end(self, count: int = 1):
        """Wait for this many ended connections; return the Failure value and the reason of the last one."""
        while len(self.ended) < count:
            deferred: Deferred[None] = Deferred()
            self._waiting.append(deferred)
            yield deferred.addTimeout(DEADLINE, reactor)
        return self.ended[count - 1]


@pytest.fixture
def serve():
    """Serve a Witness as the description says, by default on a free loopback port."""
    started: list[Served] = []

    def start(
        description: str = "proxy:tcp:0:interface=127.0.0.1",
        *,
        on: Any = reactor,
        tls: ssl.SSLContext | None = None,
        limits: Limits = Limits(max_connections=100, proxy_from=LOOPBACK),  # noqa: B008  # frozen
    ) -> Served:
        served = Served(description, on, tls, limits)
        started.append(served)
        return served

    yield start
    for served in started:
        served.port.stopListening()
        served.listener.close()
        for connection in list(served.register.open):
            connection.abortConnection()
        if isinstance(served.on, Timed):
            served.on.clock.advance(0)
        elif served.register.open:
            pytest_twisted.blockon(served.end(len(served.ended) + len(served.register.open)))


class ReadCounter:
    """Counts the read events of connections that wait for their header."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[Deferred[None]] = []

    def count_read(self) -> None:
        self.count += 1
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            deferred.callback(None)

    @pytest_twisted.inlineCallbacks
    def wait(self, count: int):
        """Wait until this many have happened."""
        while self.count < count:
            deferred: Deferred[None] = Deferred()
            self._waiting.append(deferred)
            yield deferred.addTimeout(DEADLINE, reactor)


@pytest.fixture
def reads(monkeypatch):
    counter = ReadCounter()
    read = ProxyHandshake.doRead

    def counted(self):
        try:
            return read(self)
        finally:
            counter.count_read()

    monkeypatch.setattr(ProxyHandshake, "doRead", counted)
    return counter


@pytest.fixture
def context(certificates) -> ssl.SSLContext:
    return ServerTLS(certificates["server.key"], certificates["server.pem"]).load().context


# --- the client's side ---


@pytest.fixture
def connect():
    """Connect a blocking socket that sends each write as one segment."""
    with contextlib.ExitStack() as stack:

        def start(address: Any) -> socket.socket:
            if isinstance(address, tuple):
                sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            else:
                sock = socket.socket(socket.AF_UNIX)
            stack.enter_context(sock)
            sock.settimeout(DEADLINE)
            sock.connect(address)
            return sock

        yield start


def read(sock: socket.socket, size: int) -> bytes:
    """Read this many bytes, or fewer at EOF."""
    received = bytearray()
    while len(received) < size and (piece := sock.recv(size - len(received))):
        received += piece
    return bytes(received)


def nothing_came(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) is None  # EOF counts as input too
    except BlockingIOError:
        return True
    finally:
        sock.settimeout(DEADLINE)


class TLS:
    """A TLS client on a socket; `before` is sent in one segment with its first flight."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, before: bytes = b"") -> None:
        self.sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self._before = before

    def _do(self, step: Any, *arguments: Any) -> Any:
        while True:
            try:
                result = step(*arguments)
            except ssl.SSLWantReadError:
                result = None
            before, self._before = self._before, b""
            self.sock.sendall(before + self._outgoing.read())
            if result is not None:
                return result
            data = self.sock.recv(1 << 16)
            assert data, "the server has closed"
            self._incoming.write(data)

    def exchange(self, data: bytes) -> bytes:
        """Perform the handshake, send data, and read the greeting and the same number of bytes."""
        self._do(lambda: self._tls.do_handshake() or True)
        self._do(self._tls.write, data)
        received = b""
        while len(received) < len(GREETING) + len(data):
            received += self._do(self._tls.read, 1 << 16)
        return received


# --- a header, then everything else ---


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@pytest_twisted.inlineCallbacks
def test_a_header_may_be_split_at_any_byte_and_the_protocol_is_built_after_its_last(serve, connect, reads, header):
    service = serve()
    for split in range(1, len(header)):
        before = reads.count
        sock = connect(service.address)
        sock.sendall(header[:split])
        yield reads.wait(before + 1)
        assert nothing_came(sock)
        assert service.opened[-1].phase == "proxy"
        assert len(service.factory.built) == split - 1
        sock.sendall(header[split:] + b"hello")
        answer = yield deferToThread(read, sock, 11)
        assert answer == b"Hello!hello"
        assert reads.count == before + 2  # one per piece: no data is read twice
        assert service.factory.built[-1] == CLIENT
    assert service.factory.received == b"hello" * (len(header) - 1)


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
@pytest_twisted.inlineCallbacks
def test_data_in_the_segment_of_the_header_is_neither_lost_nor_duplicated(serve, connect, header):
    service = serve()
    for size in (0, 1, 1023 - len(header), 1024 - len(header), 1025 - len(header), 200_000):
        data = os.urandom(size)
        before = len(service.factory.received)
        sock = connect(service.address)
        sending = deferToThread(sock.sendall, header + data)
        answer = yield deferToThread(read, sock, len(GREETING) + size)
        yield sending
        assert answer == GREETING + data
        assert service.factory.received[before:] == data
        # The header does not count as received data.
        connection = service.opened[-1]
        assert (connection.bytes_in, connection.bytes_out) == (size, len(GREETING) + size)


@pytest_twisted.inlineCallbacks
def test_a_second_header_is_data(serve, connect):
    service = serve()
    sock = connect(service.address)
    sock.sendall(V1 + V2 + V1)
    answer = yield deferToThread(read, sock, len(GREETING + V2 + V1))
    assert answer == GREETING + V2 + V1


@pytest_twisted.inlineCallbacks
def test_urgent_data_within_a_header_is_ignored(serve, connect):
    service = serve()
    for split in range(1, len(V1) + 5):
        sock = connect(service.address)
        sock.sendall((V1 + b"hello")[:split])
        sock.send(b"!", socket.MSG_OOB)
        sock.sendall((V1 + b"hello")[split:])
        answer = yield deferToThread(read, sock, 11)
        assert answer == b"Hello!hello"


@pytest.mark.parametrize("size", [1, 7, 1000, len(LONGEST)])
@pytest_twisted.inlineCallbacks
def test_the_longest_header_is_accepted_even_byte_by_byte(serve, connect, reads, size):
    service = serve()
    sock = connect(service.address)

    def send():
        for at in range(0, len(LONGEST), size):
            sock.sendall(LONGEST[at : at + size])
        sock.sendall(b"hello")

    sending = deferToThread(send)
    answer = yield deferToThread(read, sock, 11)
    yield sending
    assert answer == b"Hello!hello"
    ((peer, _, header),) = service.factory.seen
    assert peer == CLIENT
    assert header.length == len(LONGEST)
    assert header.tlvs[0] == (2, b"www.example.com")
    assert reads.count <= len(LONGEST) // min(size, 1000) + 2


@pytest_twisted.inlineCallbacks
def test_the_memory_for_a_header_is_bounded_by_its_length(serve, connect):
    service = serve()
    header = v2(0x21, 0x11, INET + tlv(4, b"") * ((65535 - len(INET)) // 3))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20):
            sock = connect(service.address)
            sending = deferToThread(sock.sendall, header)
            yield deferToThread(read, sock, len(GREETING))
            yield sending
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20 * (len(header) + 16 * 1024)


# --- before TLS ---


@pytest.mark.parametrize("header", [V1, V2, LONGEST], ids=["v1", "v2", "longest"])
@pytest.mark.parametrize("together", [True, False], ids=["together", "apart"])
@pytest_twisted.inlineCallbacks
def test_a_header_comes_before_the_tls_handshake(serve, connect, reads, context, trusting, header, together):
    service = serve(tls=context)
    sock = connect(service.address)
    if together:
        client = TLS(sock, trusting, header)
    else:
        sock.sendall(header[:-1])
        yield reads.wait(-(-len(header[:-1]) // 1024))
        sock.sendall(header[-1:])
        client = TLS(sock, trusting)
    answer = yield deferToThread(client.exchange, b"hello")
    assert answer == GREETING + b"hello"
    ((peer, host, proxied),) = service.factory.seen
    assert (peer, host, proxied.length) == (CLIENT, SERVER, len(header))
    assert ISSLTransport.providedBy(service.opened[0])


@pytest_twisted.inlineCallbacks
def test_a_header_inside_tls_is_data(serve, connect, context, trusting):
    service = serve(tls=context)
    sock = connect(service.address)
    with pytest.raises((AssertionError, ConnectionResetError)):
        yield deferToThread(TLS(sock, trusting).exchange, V1)
    yield service.end()
    assert service.ended[0][1] == "invalid PROXY header"
    assert not service.factory.built


# --- addresses ---


@pytest_twisted.inlineCallbacks
def exchange(service: Served, sock: socket.socket, header: bytes):
    """Exchange data; return what the protocol saw in connectionMade."""
    sock.sendall(header + b"hello")
    answer = yield deferToThread(read, sock, 11)
    assert answer == b"Hello!hello"
    seen = service.factory.seen[-1]
    transport = service.factory.made[-1].transport
    assert (transport.getPeer(), transport.getHost(), transport.proxied) == seen
    assert transport.phase == "open"
    assert service.factory.built[-1] == seen[0]
    return seen


@pytest_twisted.inlineCallbacks
def test_the_protocol_sees_the_addresses_of_the_header(serve, connect):
    service = serve()
    for header in (V1, V2):
        peer, host, proxied = yield exchange(service, connect(service.address), header)
        assert (peer, host) == (CLIENT, SERVER)
        assert (proxied.source, proxied.destination, proxied.length) == (CLIENT, SERVER, len(header))
        assert type(service.opened[-1]) is Connection
        assert not ISSLTransport.providedBy(service.opened[-1])
        assert "192.0.2.1" in service.opened[-1].logPrefix()
    assert proxied.tlvs == ((2, b"www.example.com"),)


@pytest_twisted.inlineCallbacks
def test_client_and_proxy_may_have_different_address_families(serve, connect):
    service = serve()
    peer, host, _ = yield exchange(
        service, connect(service.address), b"PROXY TCP6 2001:DB8:0::1 2001:db8::2 4711 443\r\n"
    )
    assert (peer, host) == (IPv6Address("TCP", "2001:db8::1", 4711), IPv6Address("TCP", "2001:db8::2", 443))


@pytest_twisted.inlineCallbacks
def test_the_client_of_a_proxys_unix_socket_has_its_path(serve, connect):
    service = serve()
    peer, host, _ = yield exchange(service, connect(service.address), v2(0x21, 0x31, UNIX))
    assert (type(peer), peer.name) == (UNIXAddress, b"/run/client")
    assert (type(host), host.name) == (UNIXAddress, b"/run/server")
    assert service.opened[-1].logPrefix().endswith(",unix")


@pytest.mark.parametrize("header", ANONYMOUS.values(), ids=ANONYMOUS)
@pytest_twisted.inlineCallbacks
def test_a_header_without_addresses_keeps_the_addresses_of_the_connection(serve, connect, header):
    service = serve()
    sock = connect(service.address)
    peer, host, proxied = yield exchange(service, sock, header)
    assert peer == IPv4Address("TCP", *sock.getsockname())
    assert host == IPv4Address("TCP", *service.address)
    assert proxied.length == len(header)
    assert (proxied.source, proxied.destination) == (None, None)


@pytest_twisted.inlineCallbacks
def test_a_proxy_may_connect_to_a_unix_socket(serve, connect, tmp_path):
    path = f"{tmp_path}/s"
    service = serve(f"proxy:unix:{path}")
    assert (yield exchange(service, connect(path), V2))[:2] == (CLIENT, SERVER)
    peer, host, _ = yield exchange(service, connect(path), b"PROXY UNKNOWN\r\n")
    assert (peer.name, host.name) == (None, path.encode())


# --- rejected connections ---


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"\0",
        b"PROXY TCP4 192.0.2.1 198.51.100.2 56324 65536\r\nhello",
        V1[:-2] + b" " * 100,
        v2(0x21, 0x11, INET + b"\2\xff\xff"),
        v2(0x31, 0x11, INET),
    ],
)
@pytest_twisted.inlineCallbacks
def test_a_connection_without_a_header_is_closed_and_nothing_is_sent(serve, connect, data):
    service = serve()
    sock = connect(service.address)
    sock.sendall(data)
    assert (yield deferToThread(is_closed, sock))
    reason, why = yield service.end()
    assert isinstance(reason, ConnectionLost)
    assert why == "invalid PROXY header"
    # The problem and the received bytes are logged.
    detail, record = service.events
    assert (detail["log_level"], record["log_level"]) == (LogLevel.info, LogLevel.info)
    assert (detail["event"], record["event"]) == ("proxy.header_invalid", "connection.closed")
    assert detail["beginning"] == repr(data[:64])[1:]
    assert record["reason"] == why
    assert not service.factory.built
    assert not service.register.open
    # The next client is served.
    yield exchange(service, connect(service.address), V1)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("begun", [b"", b"PROXY ", V2[:20]], ids=["nothing", "v1", "v2"])
@pytest_twisted.inlineCallbacks
def test_an_incomplete_header_ends_at_the_deadline_and_uses_no_cpu(serve, connect, reads, context, begun, secured):
    timed = Timed()
    service = serve(on=timed, tls=context if secured else None)
    service.port.handshake_timeout = 10.0
    sock = connect(service.address)
    sock.sendall(begun)
    yield reads.wait(len(begun) and 1)
    other = connect(service.address)  # many reactor turns, none with an event of the first connection
    for byte in V1[:-1]:
        count = reads.count
        other.sendall(bytes([byte]))
        yield reads.wait(count + 1)
    assert reads.count == bool(begun) + len(V1) - 1
    assert not service.ended
    timed.clock.advance(9.999)
    assert not service.ended
    timed.clock.advance(0.001)
    assert [why for _, why in service.ended] == ["PROXY header timed out"] * 2
    assert (yield deferToThread(is_closed, sock))
    assert not service.factory.built
    assert not timed.clock.getDelayedCalls()


@pytest_twisted.inlineCallbacks
def test_received_header_bytes_do_not_extend_the_deadline(serve, connect, reads):
    timed = Timed()
    service = serve(on=timed)
    sock = connect(service.address)
    for at in range(10):
        assert not service.ended
        sock.sendall(V1[at : at + 1])
        yield reads.wait(at + 1)
        timed.clock.advance(1)
    assert [why for _, why in service.ended] == ["PROXY header timed out"]


@pytest_twisted.inlineCallbacks
def test_a_complete_header_cancels_its_timer_and_the_tls_handshake_has_another(serve, connect, reads, context):
    timed = Timed()
    plain, secure = serve(on=timed), serve(on=timed, tls=context)
    sock, other = connect(plain.address), connect(secure.address)
    sock.sendall(V1[:1])
    other.sendall(V1[:1])
    yield reads.wait(2)
    timed.clock.advance(9)
    sock.sendall(V1[1:])
    other.sendall(V1[1:])
    yield reads.wait(4)
    timed.clock.advance(9)
    assert not plain.ended
    assert not secure.ended
    timed.clock.advance(1)
    assert [why for _, why in secure.ended] == ["TLS handshake timed out"]
    assert not plain.ended
    assert not timed.clock.getDelayedCalls()


@pytest.mark.parametrize("begun", [b"", V1[:20], V2[:20]], ids=["nothing", "v1", "v2"])
@pytest_twisted.inlineCallbacks
def test_a_half_close_before_the_header_ends_the_connection_cleanly(serve, connect, begun):
    service = serve()
    sock = connect(service.address)
    sock.sendall(begun)
    sock.shutdown(socket.SHUT_WR)
    assert (yield deferToThread(is_closed, sock))
    reason, why = yield service.end()
    assert isinstance(reason, ConnectionDone)
    assert why == "peer finished"
    assert not service.factory.built


@pytest.mark.parametrize("begun", [b"", V1[:20], V2[:20]], ids=["nothing", "v1", "v2"])
@pytest_twisted.inlineCallbacks
def test_a_reset_before_the_header_is_reported_as_connection_lost(serve, connect, reads, begun):
    service = serve()
    sock = connect(service.address)
    sock.sendall(begun)
    yield reads.wait(len(begun) and 1)
    reset(sock)
    reason, why = yield service.end()
    assert isinstance(reason, ConnectionLost)
    assert why == "reset by peer"
    assert service.opened[0].error.errno == errno.ECONNRESET
    assert not service.factory.built


@pytest_twisted.inlineCallbacks
def test_a_client_that_half_closes_right_after_its_header_receives_everything(serve, connect):
    service = serve()
    for _ in range(20):
        sock = connect(service.address)
        sock.sendall(V1)
        sock.shutdown(socket.SHUT_WR)
        assert (yield deferToThread(read, sock, 100)) == GREETING


@pytest.mark.parametrize("how", ["abortConnection", "loseConnection"])
@pytest_twisted.inlineCallbacks
def test_the_server_can_end_a_connection_before_its_header(serve, connect, reads, how):
    service = serve()
    sock = connect(service.address)
    sock.sendall(V1[:20])
    yield reads.wait(1)
    getattr(service.opened[0], how)()
    sock.sendall(V1[20:] + b"hello")  # too late
    assert (yield deferToThread(is_closed, sock))
    reason, why = yield service.end()
    assert (type(reason), why) == {
        "abortConnection": (ConnectionAborted, "aborted"),
        "loseConnection": (ConnectionDone, "closed"),
    }[how]
    assert not service.factory.built
    assert service.opened[0]._stage is None
    assert not [
        call for call in reactor.getDelayedCalls() if isinstance(getattr(call.func, "__self__", None), ProxyHandshake)
    ]


# --- limits and trust ---


@pytest_twisted.inlineCallbacks
def test_a_limit_per_peer_counts_clients_instead_of_the_proxy(serve, connect):
    service = serve(limits=Limits(max_connections=100, max_connections_per_peer=2, proxy_from=LOOPBACK))
    socks = [connect(service.address) for _ in range(4)]
    for sock in socks[:2]:
        yield exchange(service, sock, V1)
    socks[2].sendall(V2)
    assert (yield deferToThread(is_closed, socks[2]))
    yield exchange(service, socks[3], V1.replace(b"192.0.2.1", b"192.0.2.2"))
    assert refused(service.register) == {"max-connections-per-peer": 1}
    assert len(service.register.open) == 3
    assert len(service.factory.built) == 3
    # One of the two disconnects, which admits another.
    socks[0].close()
    yield service.end()
    yield exchange(service, connect(service.address), V2)


@pytest_twisted.inlineCallbacks
def test_an_untrusted_proxy_is_closed_before_reading(serve, connect, reads):
    service = serve(limits=Limits(max_connections=100))
    for header in (V1, b""):
        sock = connect(service.address)
        sock.sendall(header)
        assert (yield deferToThread(is_closed, sock))
    assert refused(service.register) == {"proxy-from": 2}
    assert not service.register.open
    assert reads.count == 0
    assert not service.ended  # a refused connection does not count as ended
