"""Protocols and factories that exit, block, log, and fail in every method."""

import sys
import time

from twisted.internet import reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.logger import Logger, globalLogPublisher
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from zope.interface import implementer

from rtservice.interfaces import IDrainable, IMetrics


@implementer(IDrainable, IMetrics)
class Exits(Factory):
    # Raises SystemExit in every method that the service calls.
    noisy = False

    def buildProtocol(self, address):
        return Leaves()

    def metrics(self):
        sys.exit("metrics")

    def drain(self):
        sys.exit("drain")

    def stopFactory(self):
        sys.exit("stopFactory")


@implementer(IDrainable)
class Leaves(Protocol):
    def connectionMade(self):
        self.transport.write(b"here")

    def dataReceived(self, data):
        self.transport.write(data)

    def drain(self):
        sys.exit("drain")


class Pulls(Protocol):
    # Fails in resumeProducing and in logPrefix.
    count = 0

    def logPrefix(self):
        return self.name

    def connectionMade(self):
        self.factory.count += 1
        if self.factory.count < 3:
            self.transport.registerProducer(self, False)
        else:
            self.transport.write(b"good")

    def resumeProducing(self):
        self.count += 1
        if self.count > 1:
            raise OSError("no more")
        self.transport.write(b"one")

    def stopProducing(self):
        pass

    def connectionLost(self, reason):
        raise ZeroDivisionError


class Worse(Factory):
    protocol = Pulls
    noisy = False
    count = 0


@implementer(IDrainable)
class Wraps(ProtocolWrapper):
    def drain(self):
        self.transport.write(b"goodbye")
        self.transport.loseConnection()


def wrapped():
    factory = Factory.forProtocol(Leaves)
    made = WrappingFactory(factory)
    made.protocol = Wraps
    return made


class Threads(Protocol):
    def dataReceived(self, data):
        if data == b"loop":
            while True:
                pass
        reactor.callInThread(time.sleep, 600)
        self.transport.write(data)


class Logs(Protocol):
    log = Logger()

    def dataReceived(self, data):
        globalLogPublisher({"log_format": "bare"})
        self.log.warn("{x:.2f} of {y:05d}", x=1.2345, y=7)
        print("printed")
        print("complained", file=sys.stderr)
        sys.stdout.flush()
        self.transport.write(data)
