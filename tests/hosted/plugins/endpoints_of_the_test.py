"""Endpoints that stop the reactor, listen or fail at SIGUSR2."""

import signal

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    def __init__(self, prefix):
        self.prefix = prefix

    def parseStreamServer(self, reactor, argument=""):
        self.reactor = reactor
        return self

    def listen(self, factory):
        """`stopper:` stops the reactor at SIGUSR2; `late:` listens at SIGUSR2, `broken:` fails then."""
        result = Deferred()
        act = {
            "stopper": self.reactor.stop,
            "late": lambda: result.callback(self),
            "broken": lambda: result.errback(OSError("broken by design")),
        }[self.prefix]
        before = signal.getsignal(signal.SIGUSR2)

        def handle(*signalled):
            self.reactor.callFromThread(act)
            if callable(before):
                before(*signalled)

        signal.signal(signal.SIGUSR2, handle)
        return succeed(self) if self.prefix == "stopper" else result

    def getHost(self):
        return self.prefix

    def stopListening(self):
        pass


stopper = Parser("stopper")
late = Parser("late")
broken = Parser("broken")
