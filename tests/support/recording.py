"""A factory that records what its protocols see."""

from typing import Any

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from tests.support.deadline import DEADLINE


class Recorder(Protocol):
    """Does what its factory's hooks say, and tells when it ended, and what its transport was then."""

    def connectionMade(self):
        self.factory.made.append(self)
        self.factory.on_connect(self)

    def dataReceived(self, data):
        self.factory.on_data(self, data)

    def connectionLost(self, reason):
        self.factory.lost.append(reason.value)
        self.factory.transports.append(type(self.transport))
        waiting, self.factory.waiting = self.factory.waiting, []
        for deferred in waiting:
            # Later, since the connection itself ends after its protocol.
            reactor.callLater(0, deferred.callback, reason.value)


@implementer(IHalfCloseableProtocol)
class HalfClosing(Recorder):
    def readConnectionLost(self):
        self.factory.on_fin(self)

    def writeConnectionLost(self):
        self.factory.write_lost += 1


class Recording(Factory):
    noisy = False

    def __init__(self, protocol=Recorder, on_connect=None, on_data=None, on_fin=None):
        self.protocol = protocol
        self.on_connect = on_connect or (lambda protocol: None)
        self.on_data = on_data or (lambda protocol, data: protocol.transport.write(data))
        self.on_fin = on_fin or (lambda protocol: protocol.transport.loseConnection())
        self.made: list[Any] = []
        self.lost: list[Any] = []
        self.transports: list[type] = []
        self.waiting: list[Deferred] = []
        self.write_lost = 0

    def end(self) -> Deferred:
        """Fires with the reason when a connection ends, or at once when one has."""
        deferred: Deferred = Deferred()
        if self.lost:
            deferred.callback(self.lost[-1])
        else:
            self.waiting.append(deferred)
        return deferred.addTimeout(DEADLINE, reactor)
