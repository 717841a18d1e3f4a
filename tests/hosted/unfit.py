"""Factories that fail at each step of a start."""

from twisted.internet.protocol import Factory, Protocol
from zope.interface import implementer

from rtservice.interfaces import IStartable


class Base(Factory):
    noisy = False
    protocol = Protocol


class Interrupts(Base):
    def __init__(self):
        raise KeyboardInterrupt


class Exits(Base):
    def startFactory(self):
        raise SystemExit(0)


@implementer(IStartable)
class Gives(Base):
    def start(self):
        return None


class Second(Base):
    def doStart(self):
        super().doStart()
        if self.numPorts > 1:
            raise LookupError("the second start")


class Runs(Base):
    def __init__(self):
        from twisted.internet import reactor

        reactor.callWhenRunning(reactor.stop)
        reactor.run()
