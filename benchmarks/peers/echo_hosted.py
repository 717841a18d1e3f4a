"""The echo of Twisted's own tutorial, with a greeting, as somebody's protocol that rtservice hosts."""

from twisted.internet.protocol import Protocol


class Echo(Protocol):
    """Greets, and sends back what it gets."""

    def connectionMade(self) -> None:
        assert self.transport is not None
        self.transport.write(b"Hello from the server!")

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)
