"""A protocol whose source a test changes."""

from twisted.internet.protocol import Protocol


class Says(Protocol):
    def connectionMade(self):
        self.transport.write(b"old code")
