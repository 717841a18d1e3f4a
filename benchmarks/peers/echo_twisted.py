"""A stock Twisted echo as a twistd application file, on Twisted's default reactor.

Usage: ``ECHO_ENDPOINT=tcp:8080:interface=127.0.0.1 twistd -n --pidfile= -y echo_twisted.py``.
"""

# Twisted's services and endpoints are not annotated, and methods of its interfaces have no ``self``.
# mypy: disable-error-code="call-arg,no-untyped-call"

import os

from twisted.application.internet import StreamServerEndpointService
from twisted.application.service import Application
from twisted.internet import reactor
from twisted.internet.endpoints import serverFromString
from twisted.internet.protocol import Factory, Protocol


class Echo(Protocol):
    """The echo of Twisted's tutorial, with a greeting."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"Hello from the server!")

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


factory = Factory.forProtocol(Echo)
factory.noisy = False
endpoint = serverFromString(reactor, os.environ["ECHO_ENDPOINT"])
application = Application("echo")
StreamServerEndpointService(endpoint, factory).setServiceParent(application)
