"""A protocol on the hub: each line of a client is sent to all clients in all processes."""

from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from rtservice.interfaces import IHubUser, IReceiver


@implementer(IReceiver)
class Client(LineOnlyReceiver):
    delimiter = b"\n"

    def connectionMade(self):
        self.subscription = None
        self.subscribing = self.factory.hub.subscribe("all", self)
        self.subscribing.addCallback(self.subscribed)

    def subscribed(self, subscription):
        self.subscription = subscription
        self.transport.write(b"ready\n")

    def lineReceived(self, line):
        self.factory.hub.publish("all", line + b"\n").addErrback(self.failed)

    def failed(self, failure):
        self.transport.write(b"failed: %s\n" % failure.type.__name__.encode())

    def received(self, topic, message):
        self.transport.write(message)

    def gap(self, topic):
        self.transport.write(b"gap\n")

    def connectionLost(self, reason):
        if self.subscription is not None:
            self.subscription.cancel()
        else:
            self.subscribing.cancel()


@implementer(IHubUser)
class Broadcast(Factory):
    protocol = Client
    noisy = False

    def use(self, hub):
        self.hub = hub
