"""The echo of Twisted's tutorial with a greeting, as a third-party protocol hosted by rtservice."""

from twisted.internet.protocol import Protocol


class Echo(Protocol):
    """Greets, then echoes."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"Hello from the server!")

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)
