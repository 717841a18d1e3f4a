"""An endpoint that listens late, fails, or never listens."""

from twisted.internet.defer import Deferred, fail
from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    prefix = "slow"

    def parseStreamServer(self, reactor, outcome, port="0"):
        self.reactor, self.outcome, self.port = reactor, outcome, int(port)
        return self

    def listen(self, factory):
        if self.outcome == "fails-now":
            return fail(OSError("broken by design"))
        result = Deferred()
        if self.outcome != "never":
            self.reactor.callLater(0.2, result.callback, None)
        endpoint = TCP4ServerEndpoint(self.reactor, self.port, interface="127.0.0.1")
        fails = self.outcome == "fails"
        return result.addCallback(lambda _: fail(OSError("broken by design")) if fails else endpoint.listen(factory))


parser = Parser()
