"""An endpoint that listens once a file exists."""

import os

from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.internet.task import LoopingCall
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    prefix = "when"

    def parseStreamServer(self, reactor, path):
        self.reactor, self.path = reactor, path
        return self

    def listen(self, factory):
        waiting = LoopingCall(lambda: os.path.exists(self.path) and waiting.stop())
        endpoint = TCP4ServerEndpoint(self.reactor, 0, interface="127.0.0.1")
        return waiting.start(0.01).addCallback(lambda _: endpoint.listen(factory))


parser = Parser()
