"""A room on the hub: each line of a client goes to all clients, in all processes of the service."""

from secrets import token_hex

from twisted.internet.interfaces import IPushProducer
from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from rtservice.interfaces import HubFull, HubUnavailable, IHubUser, IReceiver


@implementer(IReceiver, IPushProducer)
class Client(LineOnlyReceiver):
    delimiter, MAX_LENGTH = b"\n", 1024
    reads, skipped = True, 0

    def connectionMade(self):
        self.name = f"guest-{token_hex(3)}".encode()
        self.transport.registerProducer(self, True)
        self.subscribing = self.factory.hub.subscribe("live", self).addCallback(self.subscribed)
        self.joining = self.factory.hub.join("live", self.name)

    def subscribed(self, subscription):
        self.show(b"* welcome, " + self.name)  # it gets every line from now on, or a notice
        return subscription

    def connectionLost(self, reason):
        for waiting, end in ((self.subscribing, "cancel"), (self.joining, "leave")):
            waiting.addCallbacks(lambda held, end=end: getattr(held, end)(), lambda failure: None)
            waiting.cancel()  # has an effect only if it has not fired yet

    def lineReceived(self, line):
        if line.strip() == b"/who":
            answer = self.factory.hub.members("live").addCallback(self.show_members)
        else:
            answer = self.factory.hub.publish("live", self.name + b": " + line.strip())
        answer.addErrback(self.not_done)

    def show_members(self, members):
        self.show(b"* %d here, such as " % members.total + b" ".join(sorted(members.members)[:20]))

    def not_done(self, failure):
        failure.trap(HubUnavailable, HubFull)
        self.show(b"* not possible now, try again later")

    def received(self, topic, message):
        self.show(message)

    def gap(self, topic):
        self.show(b"* lines may be missing here")

    def show(self, line):
        if self.reads:
            self.sendLine(line)
        else:
            self.skipped += 1  # the client reads too slowly: its output must not grow without limit

    def pauseProducing(self):  # called by the transport: more than 64 KiB are unsent
        self.reads = False

    def resumeProducing(self):  # everything is sent
        skipped, self.reads, self.skipped = self.skipped, True, 0
        if skipped:
            self.show(b"* %d lines were skipped here" % skipped)

    def stopProducing(self):
        self.reads = False


@implementer(IHubUser)
class Live(Factory):
    """A room: each line goes to all clients, and `/who` counts them."""

    protocol = Client

    def use(self, hub):
        self.hub = hub
