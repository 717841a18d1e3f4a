"""A program for `twistd -y` that prints its reactor and exits."""

from twisted.application import service
from twisted.internet import reactor

application = service.Application("any")
print("runs on", type(reactor).__module__)
reactor.callLater(0, reactor.stop)
