"""A program for `twistd -y`, which prints its reactor and ends."""

from twisted.application import service
from twisted.internet import reactor

application = service.Application("any")
print("runs on", type(reactor).__module__)
reactor.callLater(0, reactor.stop)
