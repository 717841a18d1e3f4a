"""TLS in the transport: push and pull producers."""

import os

import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread

from tests.support.deadline import DEADLINE
from tests.support.eventually import eventually
from tests.support.puller import Puller
from tests.support.recording import Recording, nothing
from tests.support.tls_client import Client
from tests.support.tls_libraries import BOTH
from tests.support.tls_versions import VERSIONS


@pytest_twisted.inlineCallbacks
def test_a_pull_producer_sends_its_whole_content(serve, client_context):
    def client():
        with Client(served.address, client_context()).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=Puller.start))
    answer = yield deferToThread(client)
    assert answer == Puller.CONTENT


@pytest_twisted.inlineCallbacks
def test_a_push_producer_is_paused_and_resumed_until_all_data_is_sent(serve, client_context):
    calls: list[str] = []

    class Pusher:
        rounds = 20
        paused = False

        def produce(self):
            while not self.paused and self.rounds:
                self.rounds -= 1
                self.transport.write(b"x" * 100_000)
            if not self.rounds and not self.paused:
                self.transport.unregisterProducer()
                self.transport.loseConnection()

        def pauseProducing(self):
            calls.append("pause")
            self.paused = True

        def resumeProducing(self):
            calls.append("resume")
            self.paused = False
            self.produce()

        def stopProducing(self):
            calls.append("stop")

    def start(protocol):
        pusher = Pusher()
        pusher.transport = protocol.transport
        protocol.transport.registerProducer(pusher, True)
        pusher.produce()

    def client():
        with Client(served.address, client_context()).shake() as peer:
            return peer.read_to_end()

    served = serve(Recording(on_connect=start))
    answer = yield deferToThread(client)
    assert answer == b"x" * 2_000_000
    assert calls == ["pause", "resume"] * 20


@BOTH
@pytest_twisted.inlineCallbacks
def test_a_producer_is_stopped_when_the_client_disconnects(serve, client_context):
    calls: list[str] = []

    class Pusher:
        pauseProducing = resumeProducing = nothing

        def stopProducing(self):
            calls.append("stop")

    def client():
        Client(served.address, client_context()).shake().reset()

    served = serve(Recording(on_connect=lambda protocol: protocol.transport.registerProducer(Pusher(), True)))
    yield deferToThread(client)
    yield eventually(lambda: served.closed)
    assert calls == ["stop"]


@VERSIONS
@pytest_twisted.inlineCallbacks
def test_paused_reading_loses_no_data(serve, client_context, version):
    def pause(protocol, data):
        protocol.transport.pauseProducing()
        reactor.callLater(0.002, resume, protocol, data)

    def resume(protocol, data):
        protocol.transport.write(data)
        protocol.transport.resumeProducing()

    def client():
        with Client(served.address, client_context(version)).shake() as peer:
            answer = peer.exchange(data)
            return answer == data

    served = serve(Recording(on_data=pause))
    data = os.urandom(1 << 20)
    same = yield deferToThread(client)
    assert same


@pytest_twisted.inlineCallbacks
def test_data_received_during_a_read_pause_is_delivered_on_resume(serve, client_context):
    """No data may remain inside OpenSSL, where poll does not report it."""
    made: Deferred = Deferred()

    def pause(protocol):
        protocol.transport.pauseProducing()
        made.callback(protocol)

    def client():
        peer = Client(served.address, client_context()).shake(finish=False)
        peer.tls.write(b"first")
        peer.tls.write(b"second")
        peer.flush()
        return peer

    served = serve(Recording(on_connect=pause))
    peer = yield deferToThread(client)
    with peer:
        protocol = yield made.addTimeout(DEADLINE, reactor)
        for _ in range(20):
            yield deferToThread(nothing)  # one iteration of the reactor, including its poll
        assert served.factory.received == b""
        protocol.transport.resumeProducing()
        answer = yield deferToThread(peer.read_exactly, 11)
    assert answer == b"firstsecond"
