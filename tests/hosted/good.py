"""Factories and a protocol that use every interface correctly."""

from twisted.internet import defer, reactor, task
from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.interfaces import ConnectionLogger, IDrainable, IMetrics, IOneProcess, IStartable


@implementer(IDrainable)
class Shout(Protocol):
    def connectionMade(self):
        self.log = ConnectionLogger(self)
        self.log.info("shouting at {peer} on {listener}, {connection}")

    def dataReceived(self, data):
        self.factory.shouts += 1
        self.transport.write(data.upper() + self.factory.mark)

    def drain(self):
        self.transport.write(b"bye")
        self.transport.loseConnection()


@implementer(IStartable, IDrainable, IMetrics)
class Shouts(Factory):
    protocol = Shout
    noisy = False
    shouts = 0

    def __init__(self, mark: bytes = b"!", fails: bool = False, hangs: bool = False):
        self.mark = mark
        self.fails = fails
        self.hangs = hangs

    def startFactory(self):
        print("startFactory", flush=True)

    async def start(self):
        await task.deferLater(reactor, 0.05)
        print("start", flush=True)
        if self.hangs:
            await defer.Deferred(lambda d: print("start is cancelled", flush=True))
        if self.fails:
            raise ConnectionRefusedError("no database\nat all")

    def drain(self):
        print("drain", flush=True)

    def stopFactory(self):
        print("stopFactory", flush=True)

    def metrics(self):
        return {"shouts_total": self.shouts}


@implementer(IOneProcess)
class Alone(Factory):
    protocol = Shout
