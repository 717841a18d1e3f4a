"""A broadcaster on the hub of rtservice: each line of a client is sent to all clients of all processes."""

from typing import Any

from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from rtservice.interfaces import IHub, IHubUser, IReceiver, ISubscription


@implementer(IReceiver)
class Client(LineOnlyReceiver):
    """Greets once its subscription is active."""

    delimiter = b"\n"
    transport: Any
    factory: Any

    def connectionMade(self) -> None:
        self.subscribing = self.factory.hub.subscribe("all", self)
        self.subscribing.addCallback(self._subscribed)

    def _subscribed(self, subscription: ISubscription) -> ISubscription:
        self.transport.write(b"Hello from the server!")
        return subscription

    def lineReceived(self, line: bytes) -> None:
        self.factory.hub.publish("all", line + b"\n")

    def received(self, topic: str, message: bytes) -> None:
        """Send a line of any client."""
        self.transport.write(message)

    def gap(self, topic: str) -> None:
        """Close: the benchmark accepts no loss."""
        self.transport.loseConnection()

    def connectionLost(self, reason: Any = None) -> None:
        self.subscribing.addCallback(lambda subscription: subscription.cancel())


@implementer(IHubUser)
class Broadcast(Factory):
    """Keeps the hub."""

    protocol = Client
    noisy = False
    hub: IHub

    def use(self, hub: IHub) -> None:
        self.hub = hub
