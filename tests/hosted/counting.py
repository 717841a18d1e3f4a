"""A factory with counters."""

from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.interfaces import IMetrics


class Says(Protocol):
    def connectionMade(self):
        self.factory.here += 1
        self.transport.write(b"here")

    def dataReceived(self, data):
        self.factory.heard += len(data)

    def connectionLost(self, reason):
        self.factory.here -= 1


@implementer(IMetrics)
class Counts(Factory):
    protocol = Says
    noisy = False
    here = heard = 0

    def metrics(self):
        return {"heard_total": self.heard, "here": self.here, "not a name": 1}
