"""A protocol on the hub, for tests: each client is a member of one room, and publishes to it."""

import os

from twisted.internet.protocol import Factory
from twisted.protocols.basic import LineOnlyReceiver
from zope.interface import implementer

from rtservice.interfaces import HubFull, HubUnavailable, IHubUser, IReceiver


@implementer(IReceiver)
class Guest(LineOnlyReceiver):
    """A client, whose name is the pid and a number.

    Its commands are `say SEQUENCE [LENGTH]`, `enter TOPIC`, `who` and `claim KEY`.
    """

    delimiter = b"\n"
    MAX_LENGTH = 1000

    def connectionMade(self):
        self.factory.count += 1
        self.name = b"%d.%d" % (os.getpid(), self.factory.count)
        self.ended = []
        self.factory.hub.subscribe("room", self).addCallbacks(self.subscribed, self.failed)

    def subscribed(self, subscription):
        self.keep(subscription.cancel)
        self.factory.hub.join("room", self.name).addCallbacks(self.joined, self.failed)

    def joined(self, membership):
        self.keep(membership.leave)
        self.sendLine(b"ready " + self.name)

    def keep(self, end):
        if self.ended is None:
            end()
        else:
            self.ended.append(end)

    def failed(self, failure):
        failure.trap(HubUnavailable, HubFull)
        self.sendLine(b"failed")

    def lineReceived(self, line):
        word, *arguments = line.split()
        getattr(self, word.decode())(*arguments)

    def say(self, number, length=b"0"):
        message = b"%b %b %b" % (self.name, number, b"x" * int(length))
        published = self.factory.hub.publish("room", message)
        published.addCallbacks(lambda _: self.sendLine(b"accepted " + number), self.failed)

    def enter(self, topic):
        self.factory.hub.subscribe(topic.decode(), self).addCallbacks(self.entered, self.failed)

    def entered(self, subscription):
        self.keep(subscription.cancel)
        self.sendLine(b"entered")

    def who(self):
        members = self.factory.hub.members("room")
        members.addCallbacks(lambda found: self.sendLine(b"here " + b" ".join(found.members)), self.failed)

    def claim(self, key):
        self.factory.hub.claim(key.decode(), self.name).addCallbacks(self.claimed, self.failed)

    def claimed(self, claim):
        self.sendLine(b"denied" if claim is None else b"granted")
        if claim is not None:
            self.keep(claim.release)

    def received(self, topic, message):
        self.sendLine(b"said " + message)

    def gap(self, topic):
        self.sendLine(b"gap")

    def connectionLost(self, reason):
        ended, self.ended = self.ended, None
        for end in ended:
            end()


@implementer(IHubUser)
class Rooms(Factory):
    protocol = Guest
    noisy = False
    count = 0

    def use(self, hub):
        self.hub = hub
