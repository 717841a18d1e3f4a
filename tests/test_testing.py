"""The public test fixtures: `serve` and `hosted` with the echo protocol and others, and those of the hub."""

import os
import re
import socket
import ssl
import sys
from pathlib import Path

import pytest
from pytest_twisted import ensureDeferred
from twisted.internet.defer import Deferred, DeferredQueue
from twisted.internet.endpoints import HostnameEndpoint, connectProtocol
from twisted.internet.interfaces import ISSLTransport
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.threads import deferToThread
from twisted.protocols.basic import LineOnlyReceiver

from rtservice.net.connection import Connection
from rtservice.protocols.echo import EchoFactory
from rtservice.testing import RecordingReceiver


class Collects(Protocol):
    def __init__(self) -> None:
        self.received = b""
        self.finished: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: object = None) -> None:
        self.finished.callback(self.received)


@ensureDeferred
async def test_serve_uses_the_transport_of_the_service(serve) -> None:
    from twisted.internet import reactor

    factory = EchoFactory()
    transports = []
    build = factory.buildProtocol

    def record_protocol(address: object) -> Protocol:
        protocol = build(address)
        transports.append(protocol)
        return protocol

    factory.buildProtocol = record_protocol
    port = serve(factory)
    client = await connectProtocol(HostnameEndpoint(reactor, "127.0.0.1", port.getHost().port), Collects())
    client.transport.write(b"hi")
    client.transport.loseWriteConnection()
    assert await client.finished == b"Hello from the server!hi"
    assert type(transports[0].transport) is Connection


losses: list[object] = []


class Loses(Protocol):
    def connectionMade(self) -> None:
        self.transport.write(b"x")

    def connectionLost(self, reason: object = None) -> None:
        losses.append(ISSLTransport.providedBy(self.transport))


left_open: list[ssl.SSLSocket] = []


@ensureDeferred
async def test_a_test_may_leave_a_connection_open(serve, certificates) -> None:
    losses.clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates["server.pem"], certificates["server.key"])
    port = serve(Factory.forProtocol(Loses), tls=context)
    trusting = ssl.create_default_context(cafile=certificates["ca.pem"])

    def connect() -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", port.getHost().port), timeout=30)
        client = trusting.wrap_socket(plain, server_hostname="localhost")
        assert client.recv(1) == b"x"
        return client

    left_open.append(await deferToThread(connect))
    assert losses == []


def test_a_connection_left_open_is_closed_before_the_next_test() -> None:
    left_open.pop().close()
    assert losses == [True]


@pytest.mark.parametrize("workers", [1, 2])
def test_hosted_runs_twistd_and_can_reload_and_drain_it(hosted, tmp_path: Path, workers, read_all) -> None:
    (tmp_path / "rt.toml").write_text("idle-timeout = 60")
    running = hosted("echo", "--config=rt.toml", f"--workers={workers}", "--protocol-option=greeting=hi")
    with running.connect() as client:
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"hi"
    (tmp_path / "rt.toml").write_text("idle-timeout = 61")
    done = running.reload()
    assert done["event"] == "reload.done"
    assert done["status"] == "serving: " + ("2 of 2 workers ready, " if workers == 2 else "") + "0 connections open"
    running.wait_event("settings.reloaded", settings="idle-timeout")
    (tmp_path / "rt.toml").write_text("idle-timeout = 'x'")
    assert running.reload()["event"] == "reload.failed"
    assert running.stop() == 0


def test_records_of_the_protocol_are_found_by_their_text_and_fields(hosted) -> None:
    copied = Path(__file__).parent / "hosted"
    running = hosted("good:Shouts", PYTHONPATH=os.pathsep.join([str(copied), *filter(None, sys.path)]))
    with running.connect():
        record = running.wait_record("^shouting at ", namespace=re.compile("good"))
    assert record["listener"] == f"tcp:127.0.0.1:{running.port}"


# --- the hub ---


class Announces(Protocol):
    """Sends each line to all clients of all processes."""

    def connectionMade(self) -> None:
        self.subscribing = self.factory.hub.subscribe("news", self)
        self.subscribing.addCallback(lambda subscription: self.transport.write(b"ready\n"))

    def dataReceived(self, data: bytes) -> None:
        self.factory.hub.publish("news", data)

    def received(self, topic: str, message: bytes) -> None:
        self.transport.write(message)

    def gap(self, topic: str) -> None:
        self.transport.write(b"news are missing\n")

    def connectionLost(self, reason: object = None) -> None:
        # Not after the hub has stopped: this would fail.
        self.factory.hub.publish("news", b"goodbye\n").addCallback(goodbyes.append)


goodbyes: list[None] = []


class News(Factory):
    protocol = Announces
    noisy = False

    def use(self, hub: object) -> None:
        self.hub = hub


class Lines(LineOnlyReceiver):
    """A client."""

    delimiter = b"\n"

    def __init__(self) -> None:
        self.lines: DeferredQueue[bytes] = DeferredQueue()

    def lineReceived(self, line: bytes) -> None:
        self.lines.put(line)


async def connected(port: object) -> Lines:
    from twisted.internet import reactor

    return await connectProtocol(HostnameEndpoint(reactor, "127.0.0.1", port.getHost().port), Lines())


def news(hub: object) -> News:
    factory = News()
    factory.use(hub)
    return factory


@ensureDeferred
async def test_hub_is_the_one_of_a_service_with_one_process(serve, hub) -> None:
    goodbyes.clear()
    receiver = RecordingReceiver()
    await hub.subscribe("news", receiver)
    client = await connected(serve(news(hub)))
    assert await client.lines.get() == b"ready"
    client.sendLine(b"rain")
    assert await client.lines.get() == b"rain"
    hub.gap("news")
    assert await client.lines.get() == b"news are missing"
    assert await receiver.wait(1) == [b"rain\n"]
    assert await receiver.wait_gap() == ["news"]
    assert receiver.events == [b"rain\n", None]


def test_the_hub_stops_after_the_connections_of_serve() -> None:
    assert goodbyes == [None]


@ensureDeferred
async def test_hubs_are_linked_as_those_of_workers(serve, hubs) -> None:
    first, second = hubs(2)
    writer, reader = await connected(serve(news(first))), await connected(serve(news(second)))
    assert await writer.lines.get() == await reader.lines.get() == b"ready"
    writer.sendLine(b"rain")
    assert await reader.lines.get() == b"rain"
    await first.join("news", b"writer")
    assert (await second.members("news")).members == (b"writer",)
    assert await second.claim("nick", b"a")
    assert await first.claim("nick", b"b") is None


@ensureDeferred
async def test_a_receiver_records_messages_in_order_and_waits_for_them(hubs) -> None:
    first, second, third = hubs(3)
    receiver = RecordingReceiver()
    await third.subscribe("topic", receiver)
    everything = receiver.wait(100)
    for number in range(100):
        second.publish("topic", b"%d" % number)
    assert await everything == [b"%d" % number for number in range(100)] == receiver.messages
    assert await receiver.wait(1) == receiver.messages
    first.publish("topic", b"last")
    assert (await receiver.wait(101))[-1] == b"last"


@ensureDeferred
async def test_waiting_for_messages_ends_at_the_deadline(hub, monkeypatch) -> None:
    monkeypatch.setattr("rtservice.testing.DEADLINE", 0.01)
    receiver = RecordingReceiver()
    await hub.subscribe("topic", receiver)
    await hub.publish("topic", b"only")
    with pytest.raises(AssertionError, match=r"1 of 2 messages after 0\.01 s: \[b'only'\]"):
        await receiver.wait(2)
