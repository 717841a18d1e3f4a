"""An endpoint with a key, which its error contains."""

from twisted.internet.endpoints import TCP4ServerEndpoint
from twisted.internet.interfaces import IStreamServerEndpointStringParser
from twisted.plugin import IPlugin
from zope.interface import implementer


@implementer(IPlugin, IStreamServerEndpointStringParser)
class Parser:
    prefix = "keyed"

    def parseStreamServer(self, reactor, port="0", key=""):
        if port == "none":
            raise ValueError(f"no port, but {key}")
        return TCP4ServerEndpoint(reactor, int(port), interface="127.0.0.1")


parser = Parser()
