"""A protocol that greets, echoes, and on request sends more than the kernel buffers."""

from twisted.internet.protocol import Protocol


class Spout(Protocol):
    def connectionMade(self):
        self.transport.write(b"Hello from the server!")

    def dataReceived(self, data):
        if data == b"much":
            self.transport.write(bytes(16 << 20))
        elif data != b"x":
            self.transport.write(data)
