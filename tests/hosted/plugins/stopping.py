"""An endpoint that sends SIGTERM to its process when it listens."""

import os
import signal

from twisted.internet.endpoints import UNIXServerEndpoint
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


class Stopped(UNIXServerEndpoint):
    def listen(self, factory):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().listen(factory)


@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    prefix = "stopped"

    def parseStreamServer(self, reactor, path):
        return Stopped(reactor, path)


parser = Parser()
