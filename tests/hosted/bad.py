"""Protocols that raise and block, and a factory that builds none."""

import time

from twisted.internet.protocol import Factory, Protocol


class Raises(Protocol):
    def dataReceived(self, data):
        if data == b"block":
            sleep_here()
        elif data == b"raise":
            raise ZeroDivisionError
        self.transport.write(data)


def sleep_here():
    time.sleep(2)


class Builds(Factory):
    protocol = Raises
    count = 0

    def buildProtocol(self, address):
        self.count += 1
        if self.count == 1:
            return None
        if self.count == 2:
            raise RuntimeError("not today")
        return super().buildProtocol(address)


class Clings(Protocol):
    def connectionMade(self):
        self.transport.registerProducer(self, True)
        self.transport.write(b"x")

    def pauseProducing(self):
        pass

    def resumeProducing(self):
        pass

    def stopProducing(self):
        raise RuntimeError("never")
